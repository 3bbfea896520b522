"""What people touch: chat and the tiling picture."""
