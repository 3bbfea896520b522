#!/usr/bin/env python3
"""Benchmarks of the data layer; each runs in turn with what it is compared with.

    tools/bench/data.py tiling            JPEG bytes to tiles, compared with the processors of transformers
    tools/bench/data.py plan              packing a million samples, compared with next fit and first fit
    tools/bench/data.py index             headers and text of 100,000 images, compared with the bare calls

`--json` prints the figures as one object. Every benchmark has its own options: `tools/bench/data.py plan --help`.
"""

from __future__ import annotations

import common
import data_indexing
import data_packing
import data_tiling

if __name__ == "__main__":
    common.main(__doc__, {"tiling": data_tiling, "plan": data_packing, "index": data_indexing})
