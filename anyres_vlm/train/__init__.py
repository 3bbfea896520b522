"""Two-stage training: what a stage trains, the optimizer, the engine, checkpoints and the loop."""
