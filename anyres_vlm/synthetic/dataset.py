"""Rendered data as a LLaVA JSON folder, the same for the same arguments and made once."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, get_args

from anyres_vlm.config import PictureKind
from anyres_vlm.errors import UsageError
from anyres_vlm.synthetic.dialogue import BRIEFLY, Dialogue, converse, pick_dialogue, pick_kind
from anyres_vlm.synthetic.rendering import KINDS, Rendering, render
from anyres_vlm.synthetic.textonly import text_instruction
from anyres_vlm.synthetic.words import Split, Task

Purpose = Literal["captions", "instructions", "generated", "academic", "heldout"]

DATA_FILE = "data.json"
MANIFEST_FILE = "manifest.json"
FORMAT = 2  # raised whenever the same arguments would give other data
KIND_OF_TASK: dict[Task, PictureKind] = {
    task: task if task in KINDS else "scene"  # the tasks of documents are named as their kinds
    for task in get_args(Task)
}


def write_dataset(
    folder: Path, purpose: Purpose, count: int, seed: int, kinds: Sequence[PictureKind] | None = None
) -> Path:
    """Write `count` records with their pictures; returns the JSON file. A finished folder of the same call is reused.

    `captions` are for stage 1, `instructions` for stage 2 (one in five without a picture); of the same pictures,
    `generated` has conversations, details and reasons in sentences alone, `academic` questions with brief answers.
    `heldout` has one brief question a record, the tasks in turn, on pictures with words and combinations that training
    never shows. Training pictures are of `kinds`, one as likely as another; without them in the default's mix.
    A folder with anything else in it is left alone and raises UsageError.
    """
    manifest: dict[str, object] = {"format": FORMAT, "purpose": purpose, "count": count, "seed": seed}
    manifest |= {} if kinds is None else {"kinds": list(kinds)}
    if _read_manifest(folder) == manifest:
        return folder / DATA_FILE
    _refuse_foreign(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    tasks = cycle(get_args(Task))
    records = [
        _heldout(partial, seed, number, next(tasks))
        if purpose == "heldout"
        else _training(partial, purpose, seed, number, kinds)
        for number in range(count)
    ]
    (partial / DATA_FILE).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    # Renamed before it is deleted: a kill in between never leaves a folder without its manifest.
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder / DATA_FILE


def picture_seed(seed: int, number: int) -> int:
    """Seeds of different runs' pictures do not meet."""
    return seed * 1_000_000_000 + number


def _training(
    folder: Path, purpose: Purpose, seed: int, number: int, kinds: Sequence[PictureKind] | None
) -> dict[str, Any]:
    stage = "captions" if purpose == "captions" else "instructions"
    rng = random.Random(f"{stage}/{seed}/{number}")
    name = f"{purpose}-{seed}-{number:06d}"
    if stage == "instructions" and rng.random() < 0.2:
        return _record(name, None, [text_instruction(rng, "train") for _ in range(rng.randint(1, 3))])
    offset = 500_000_000 if stage == "instructions" else 0  # stage 2 sees other pictures than stage 1
    rendering = render(pick_kind(rng, kinds), picture_seed(seed, number + offset), "train")
    image = _save(folder, name, rendering)
    if purpose == "captions":
        return _record(name, image, [("", rendering.caption)])
    kind = pick_dialogue(rng)
    match purpose:
        case "generated":
            dialogue = converse(rendering, kind, rng, brief_share=0)
        case "academic":
            dialogue = converse(rendering, "conversation", rng, brief_share=1)
        case _:
            dialogue = converse(rendering, kind, rng)
    return _record(name, image, dialogue)


def _heldout(folder: Path, seed: int, number: int, task: Task) -> dict[str, Any]:
    """The first picture from this number on that a question of the task can be asked about."""
    split: Split = "heldout"
    for attempt in range(1000):
        rng = random.Random(f"heldout/{seed}/{number}/{attempt}")
        rendering = render(KIND_OF_TASK[task], picture_seed(seed, 1000 * number + attempt), split)
        questions = [question for question in rendering.questions if question.task == task]
        if questions:
            asked = rng.choice(questions)
            name = f"heldout-{seed}-{number:06d}"
            record = _record(name, _save(folder, name, rendering), [(f"{asked.question} {BRIEFLY}", asked.answer)])
            return {**record, "task": task}
    raise AssertionError(f"no picture in 1000 answers a {task} question")


def _record(name: str, image: str | None, dialogue: Dialogue) -> dict[str, Any]:
    turns = []
    for position, (question, answer) in enumerate(dialogue):
        prefix = "" if image is None or position else "<image>\n" if question else "<image>"
        turns += [{"from": "human", "value": prefix + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({} if image is None else {"image": image}), "conversations": turns}


def _save(folder: Path, name: str, rendering: Rendering) -> str:
    image = f"images/{name}.png"
    rendering.image.save(folder / image, compress_level=1)
    return image


def _refuse_foreign(folder: Path) -> None:
    """Rendering replaces the folder, so it must be absent, empty, or a rendered folder and nothing more."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = {DATA_FILE, MANIFEST_FILE, "images"}
    if _read_manifest(folder) is None or any(entry.name not in ours for entry in folder.iterdir()):
        raise UsageError(f"{folder} holds something else than rendered data: name a new folder, or empty this one")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The arguments that a rendered folder was made with; None for any other folder."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    known = {"format", "purpose", "count", "seed"}
    return content if isinstance(content, dict) and content.keys() - {"kinds"} == known else None
