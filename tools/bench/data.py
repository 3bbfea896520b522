#!/usr/bin/env python3
"""Benchmarks of the data layer, each side by side with what it is compared with, in one run.

    tools/bench/data.py tiling            JPEG bytes to tiles, against transformers' two LlavaNext processors
    tools/bench/data.py plan              a million samples packed, against next fit and first fit
    tools/bench/data.py index             headers and text of 100,000 images, against the bare calls

`--json` prints the figures as one object; each has its own options, see `tools/bench/data.py plan --help`.
"""

from __future__ import annotations

import common
import data_indexing
import data_packing
import data_tiling

if __name__ == "__main__":
    common.main(__doc__, {"tiling": data_tiling, "plan": data_packing, "index": data_indexing})
