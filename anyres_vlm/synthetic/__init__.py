"""Training data of the embedded default: seeded renderings with exact ground truth."""
