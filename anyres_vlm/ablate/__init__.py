"""Ablations: a grid of runs that share what they have in common, and the table of what each choice made of it."""
