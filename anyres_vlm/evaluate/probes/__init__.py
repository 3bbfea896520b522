"""Probes of failure modes on images drawn for them, with exact answers."""
