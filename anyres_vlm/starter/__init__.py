"""A configuration of one's own, from a few answers."""
