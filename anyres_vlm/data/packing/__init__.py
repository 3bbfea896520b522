"""From lengths to packs and optimizer steps."""
