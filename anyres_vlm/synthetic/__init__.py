"""The embedded default's little world: a renderer with exact ground truth, seeded and unlimited."""
