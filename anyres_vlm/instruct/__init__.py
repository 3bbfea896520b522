"""Instruction data from captions and boxes: generated through an OpenAI-compatible endpoint, checked and mixed."""
