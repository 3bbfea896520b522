#!/usr/bin/env python3
"""Benchmarks of the data layer, each side by side with what it is compared with, in one run.

    tools/bench_data.py tiling            JPEG bytes to tiles, against transformers' two LlavaNext processors
    tools/bench_data.py plan              a million samples packed, against next fit and first fit
    tools/bench_data.py index             headers and text of 100,000 images, against the bare calls

`--json` prints the figures as one object; each has its own options, see `tools/bench_data.py plan --help`.
"""

from __future__ import annotations

import bench_indexing
import bench_packing
import bench_tiling
import benchmarks

if __name__ == "__main__":
    benchmarks.main(__doc__, {"tiling": bench_tiling, "plan": bench_packing, "index": bench_indexing})
