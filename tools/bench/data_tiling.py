"""From JPEG bytes to uint8 tiles on one core: our two modes compared with the two LlavaNext processors of transformers.

Run as `tools/bench/data.py tiling`. All get the same bytes and one thread, and alternate. The torchvision processor
runs once with Pillow's decoder and once with torchvision's, and the faster one counts. Neither processor has to
rescale, normalise or pad a batch. Times are CPU time, medians over the rounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from common import of_peer
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from anyres_vlm.data.headers import IMAGE_SUFFIXES
from anyres_vlm.data.images import open_image
from anyres_vlm.data.tiling import tile_image
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size, TilePlan, Tiling, plan_tiles

SIZES = (
    Size(height=480, width=640),
    Size(height=640, width=480),
    Size(height=768, width=1024),
    Size(height=1080, width=1920),
    Size(height=2339, width=1654),
    Size(height=3508, width=2480),
)
PHOTOGRAPHS = (  # in the wheels of scikit-image and scikit-learn
    (
        "skimage",
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
QUALITY = 90
ENLARGE_AT_MOST = 2  # beyond this factor, small photographs are continued as in a mirror, to stay sharp
LEAST_ROUNDS = 5
QUICK = {"pictures": 1, "rounds": LEAST_ROUNDS}

Tiles = NDArray[np.uint8]
Tiler = Callable[[bytes, TilePlan], Tiles]


@dataclass(frozen=True)
class Picture:
    """A JPEG and its tile plan."""

    data: bytes
    plan: TilePlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs (default: scikit-image's)")
    parser.add_argument("--pictures", type=int, default=2, metavar="N", help="pictures of each size (2)")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help=f"alternating rounds, {LEAST_ROUNDS} or more"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure. Raises `UsageError` for too few rounds or no photographs, `DataError` for a broken photograph."""
    if arguments.rounds < LEAST_ROUNDS or arguments.pictures < 1:
        raise UsageError(f"--rounds must be at least {LEAST_ROUNDS} and --pictures at least 1")
    photographs = cycle(list(_photographs(arguments.photos)))
    pictures = {size: [_picture(next(photographs), size) for _ in range(arguments.pictures)] for size in SIZES}
    tilers = _tilers()
    flat = [picture for group in pictures.values() for picture in group]
    rounds = _measure(tilers, flat, arguments.rounds)
    times = {name: [statistics.median(values) for values in lists] for name, lists in rounds.items()}
    rows = []
    for index, size in enumerate(SIZES):
        group = slice(index * arguments.pictures, (index + 1) * arguments.pictures)
        rows.append(
            {"height": size.height, "width": size.width, **_ratios({k: sum(v[group]) for k, v in times.items()})}
        )
    return {
        "rounds": arguments.rounds,
        "pictures": len(flat),
        "sizes": rows,
        "mix": _ratios({name: sum(values) for name, values in times.items()}),
        "pixels": _differences(tilers, flat),
        "ratios": _ratios_by_round(
            {name: [sum(each) for each in zip(*lists, strict=True)] for name, lists in rounds.items()}
        ),
    }


def show(result: dict[str, Any]) -> None:
    """Print what `run` returned."""
    print(f"JPEG bytes to uint8 tiles, CPU ms on one core, medians of {result['rounds']} alternating rounds")
    print(f"{'width x height':>16}{'torchvision':>12}{'PIL':>9}{'exact':>9}{'fast':>9}   exact/tv fast/tv fast/PIL")
    for row in [*result["sizes"], result["mix"]]:
        ms, ratio = row["ms"], row["ratio"]
        label = f"{row['width']} x {row['height']}" if "width" in row else f"mix of {result['pictures']}"
        tv = min(ms["torchvision"], ms["torchvision_pillow"])
        times = f"{tv:>12.1f}{ms['pil']:>9.1f}{ms['exact']:>9.1f}{ms['fast']:>9.1f}"
        print(
            f"{label:>16}{times}   {ratio['exact_torchvision']:>8.2f}{ratio['fast_torchvision']:>8.2f}"
            f"{ratio['fast_pil']:>9.2f}"
        )
    print("Difference in levels of 255 without padding: mean, 99th percentile, maximum; mean and p99 of the worst")
    for name, d in result["pixels"].items():
        print(f"{name:>28}  {d['mean']:.3f} {d['p99']} {d['max']}   {d['worst_mean']:.3f} {d['worst_p99']}")


def _photographs(folder: Path | None) -> Iterator[Image.Image]:
    if folder is None:
        specs = [(find_spec(package), below, names) for package, below, names in PHOTOGRAPHS]
        paths = [
            Path(spec.origin).parent / below / name
            for spec, below, names in specs
            if spec is not None
            for name in names
        ]
    elif folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    else:
        raise UsageError(f"--photos {folder}: no such folder")
    if not paths:
        raise UsageError("no photographs: pip install scikit-image, or give a folder of them with --photos FOLDER")
    yield from map(open_image, paths)


def _picture(photograph: Image.Image, size: Size) -> Picture:
    """Return a JPEG of this size: the photograph reduced and cropped, or enlarged and continued as in a mirror."""
    cover = max(size.height / photograph.height, size.width / photograph.width)
    scale = min(cover, ENLARGE_AT_MOST)
    width, height = (math.ceil(side * scale) for side in photograph.size)
    pixels = np.asarray(photograph.resize((width, height), Image.Resampling.LANCZOS))
    missing = [(0, max(0, size.height - pixels.shape[0])), (0, max(0, size.width - pixels.shape[1])), (0, 0)]
    pixels = np.pad(pixels, missing, mode="symmetric")[: size.height, : size.width]
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return Picture(stream.getvalue(), plan_tiles(size, Tiling()))


def _tilers() -> dict[str, Tiler]:
    """Return functions from bytes and plan to (T, 3, S, S). Sets this process to one thread for good."""
    import cv2
    import torch
    from torchvision.io import decode_image
    from transformers import LlavaNextImageProcessor, LlavaNextImageProcessorPil

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    tiling = Tiling()
    options = {
        "size": {"shortest_edge": tiling.tile},
        "crop_size": {"height": tiling.tile, "width": tiling.tile},
        "image_grid_pinpoints": [list(pair) for pair in tiling.pinpoints],
        "do_normalize": False,
        "do_rescale": False,
        "do_pad": False,
    }
    pil, torchvision = LlavaNextImageProcessorPil(**options), LlavaNextImageProcessor(**options)

    def stock(processor: Any, decode: Callable[[bytes], Any]) -> Tiler:
        return lambda data, plan: np.asarray(processor(images=decode(data))["pixel_values"][0])

    def from_torchvision(data: bytes) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the decoder, which is still the fastest
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    return {
        "torchvision": stock(torchvision, from_torchvision),
        "torchvision_pillow": stock(torchvision, lambda data: Image.open(BytesIO(data))),
        "pil": stock(pil, lambda data: Image.open(BytesIO(data))),
        "exact": partial(_ours, "exact"),
        "fast": partial(_ours, "fast"),
    }


def _ours(mode: Any, data: bytes, plan: TilePlan) -> Tiles:
    return tile_image(data, plan, "benchmark picture", mode)


def _measure(tilers: dict[str, Tiler], pictures: list[Picture], rounds: int) -> dict[str, list[list[float]]]:
    """Return the CPU ms of each picture in each round, after one round of warm-up."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in pictures] for name in tilers}
    for _ in range(rounds + 1):
        for index, picture in enumerate(pictures):
            for name, tiler in tilers.items():
                start = time.process_time()
                tiler(picture.data, picture.plan)
                times[name][index].append(1000 * (time.process_time() - start))
    return {name: [values[1:] for values in lists] for name, lists in times.items()}


def _ratios(ms: dict[str, float]) -> dict[str, Any]:
    torchvision = min(ms["torchvision"], ms["torchvision_pillow"])
    ratio = {
        "exact_torchvision": torchvision / ms["exact"],
        "fast_torchvision": torchvision / ms["fast"],
        "exact_pil": ms["pil"] / ms["exact"],
        "fast_pil": ms["pil"] / ms["fast"],
    }
    return {"ms": ms, "ratio": ratio}


def _ratios_by_round(ms: dict[str, list[float]]) -> dict[str, list[float]]:
    torchvision = list(map(min, ms["torchvision"], ms["torchvision_pillow"]))
    return {
        f"{mode} to {name}": of_peer(peer, ms[mode])
        for mode in ("fast", "exact")
        for name, peer in (("torchvision", torchvision), ("PIL", ms["pil"]))
    }


def _differences(tilers: dict[str, Tiler], pictures: list[Picture]) -> dict[str, Any]:
    """Return the differences between each of our modes and each processor of transformers, without padding."""
    counts: dict[str, list[NDArray[np.int64]]] = {}
    for picture in pictures:
        inside = _inside(picture.plan)
        tiles = {name: tiler(picture.data, picture.plan).astype(np.int16) for name, tiler in tilers.items()}
        for mode in ("exact", "fast"):
            for stock in ("torchvision", "pil"):
                distance = np.abs(tiles[mode] - tiles[stock]).transpose(0, 2, 3, 1)[inside]
                counts.setdefault(f"{mode} to {stock}", []).append(np.bincount(distance.ravel(), minlength=256))
    return {
        name: {
            **_summary(sum(each)),
            "worst_mean": max(_summary(one)["mean"] for one in each),
            "worst_p99": max(_summary(one)["p99"] for one in each),
        }
        for name, each in counts.items()
    }


def _summary(count: NDArray[np.int64]) -> dict[str, Any]:
    share = np.cumsum(count) / count.sum()
    return {
        "mean": float((count * np.arange(256)).sum() / count.sum()),
        "p99": int(np.searchsorted(share, 0.99)),
        "max": int(np.flatnonzero(count)[-1]),
    }


def _inside(plan: TilePlan) -> NDArray[np.bool_]:
    """Return a mask of the pixels that show the image. (T, S, S)."""
    canvas = np.zeros((plan.canvas.height, plan.canvas.width), bool)
    canvas[plan.top : plan.top + plan.resized.height, plan.left : plan.left + plan.resized.width] = True
    grid = rearrange(canvas, "(r h) (c w) -> (r c) h w", r=plan.grid.rows, c=plan.grid.cols)
    return np.concatenate([np.ones((1, plan.tile, plan.tile), bool), grid])
