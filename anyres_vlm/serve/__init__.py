"""Interactive use of a model: terminal chat and web page."""
