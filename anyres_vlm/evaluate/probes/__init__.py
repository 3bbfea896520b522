"""Probes of failure modes on pictures drawn for the purpose, with exact ground truth."""
