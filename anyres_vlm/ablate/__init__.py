"""Ablations: a grid of runs that share stages and data, and the table of their differences."""
