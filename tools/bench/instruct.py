#!/usr/bin/env python3
"""Requests per second of `anyres instruct generate` against a local server that answers immediately.

    python tools/bench/instruct.py [--items 6000] [--concurrency 32]

The server is that of the tests, in a process of its own on the same machine, so both share the cores. The rate is
measured between the first and the last answer. CPU time is that of the whole command: start, input, requests, data set
and report.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Generate, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=6000)
    parser.add_argument("--concurrency", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(ROOT / "tests" / "integration" / "openai_server.py"), name]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            generate(folder, server.stdout.readline().strip(), given.items // 3, given.concurrency)
        finally:
            server.kill()
        times = [json.loads(line)["at"] for line in (folder / "answered.jsonl").read_text().splitlines()]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    print(f"{len(times) / (times[-1] - times[0]):,.0f} requests/s over {len(times):,} requests")
    load = os.getloadavg()[0]
    print(f"{1000 * seconds / len(times):.1f} ms of CPU time per request; load of the machine {load:.1f}")


def generate(folder: Path, port: str, scenes: int, concurrency: int) -> None:
    """Run the command on this many scenes, each with all three kinds."""
    with (folder / "scenes.jsonl").open("w") as stream:
        for number in range(scenes):
            captions = [f"Dog number {number} runs over a meadow, seen from place {view}." for view in range(5)]
            boxes = [{"category": "dog", "box": [9 * place, 20, 50, 60]} for place in range(7)]
            scene = {"id": number, "width": 640, "height": 480, "captions": captions, "boxes": boxes}
            stream.write(json.dumps(scene) + "\n")
    count = ",".join(f"{kind}={scenes}" for kind in ("conversation", "detail", "reasoning"))
    command = [sys.executable, "-m", "anyres_vlm", "instruct", "generate", "--count", count, "--model", "m"]
    command += ["--base-url", f"http://127.0.0.1:{port}/v1", "--concurrency", str(concurrency)]
    command += ["--descriptions", str(folder / "scenes.jsonl"), "--out", str(folder / "out")]
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
