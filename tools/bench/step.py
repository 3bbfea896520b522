#!/usr/bin/env python3
"""Benchmarks of the training step; each runs in turn with what it is compared with.

    tools/bench/step.py pass              forward and backward of stage 2, compared with stock LlavaNext
    tools/bench/step.py loss              head and loss only, compared with logits for every position
    tools/bench/step.py --loop            time of the loop itself and of waiting for data, embedded default

`--json` prints the figures as one object. Every benchmark has its own options: `tools/bench/step.py pass --help`.
"""

from __future__ import annotations

import sys

import common
import step_loop
import step_loss
import step_pass

if __name__ == "__main__":
    sys.argv[1:] = ["loop" if word == "--loop" else word for word in sys.argv[1:]]
    common.main(__doc__, {"pass": step_pass, "loss": step_loss, "loop": step_loop})
