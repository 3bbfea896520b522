"""The AnyRes model: encoder, projector, merge, document-exact attention and loss, and its checkpoints."""
