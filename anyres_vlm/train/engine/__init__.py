"""Ranks, devices and the optimizer step: the only package that knows accelerate and DeepSpeed."""
