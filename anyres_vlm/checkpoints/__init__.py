"""Checkpoint folders and base models: described, loaded, saved, imported and exported."""
