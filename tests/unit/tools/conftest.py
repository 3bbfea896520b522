"""Tools are scripts, not a package: each folder is on the path, as it is when one of them runs."""

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[3] / "tools"
sys.path[:0] = [str(TOOLS), *(str(TOOLS / folder) for folder in ("bench", "check", "fetch", "pretrain"))]
