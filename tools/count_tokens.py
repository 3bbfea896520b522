#!/usr/bin/env python3
"""Count the tiles and visual tokens of images from their headers: `anyres tokens`, straight from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anyres_vlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["tokens", *sys.argv[1:]]))
