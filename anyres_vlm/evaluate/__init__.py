"""Evaluation: benchmarks, probes and reports."""
