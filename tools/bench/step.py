#!/usr/bin/env python3
"""Benchmarks of the training step, each side by side with what it is compared with, in one run.

    tools/bench/step.py pass              forward and backward of stage 2, against stock LlavaNext padded and packed
    tools/bench/step.py loss              head and loss alone, against logits for every position
    tools/bench/step.py --loop            the loop's own share of a step, and the wait for data, at the embedded default

`--json` prints the figures as one object; each has its own options, see `tools/bench/step.py pass --help`.
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
