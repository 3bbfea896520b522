"""Rendered folders are LLaVA data: readable, reproducible, made once, made anew after an interruption."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from anyres_vlm.data.headers import read_size
from anyres_vlm.data.sources import read_records
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Grid, Size, Tiling, plan_tiles
from anyres_vlm.synthetic.dataset import KIND_OF_TASK, write_dataset
from anyres_vlm.synthetic.dialogue import BRIEFLY
from anyres_vlm.synthetic.prose import passages, talk, transcript
from anyres_vlm.synthetic.rendering import render
from anyres_vlm.synthetic.textonly import text_instruction
from anyres_vlm.synthetic.words import HELDOUT_WORDS

TILING = Tiling.from_grid(Grid(rows=2, cols=2), tile=84, patch=14)


@pytest.mark.parametrize("purpose", ["captions", "instructions", "heldout"])
def test_folders_are_read_whole(tmp_path: Path, purpose) -> None:
    path = write_dataset(tmp_path / "a", purpose, 44, seed=1)
    records = read_records(path, None)
    assert len(records) == 44
    assert all(read_size(image) for record in records for image in record.images)
    again = write_dataset(tmp_path / "b", purpose, 44, seed=1)
    assert again.read_bytes() == path.read_bytes()
    other = write_dataset(tmp_path / "c", purpose, 44, seed=2)
    assert other.read_bytes() != path.read_bytes()
    if purpose == "captions":
        assert all(record.turns[0].text == "<image>" and len(record.turns) == 2 for record in records)
    elif purpose == "instructions":
        assert 2 <= sum(not record.images for record in records) <= 20
        assert max(len(record.turns) for record in records) > 2
    else:
        assert Counter(record.task for record in records) == dict.fromkeys(KIND_OF_TASK, 4)
        assert all(len(record.turns) == 2 for record in records)


def test_a_finished_folder_is_reused_and_an_interrupted_one_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    path = write_dataset(tmp_path / "a", "captions", 5, seed=1)
    stamp = path.stat().st_mtime_ns
    assert write_dataset(tmp_path / "a", "captions", 5, seed=1).stat().st_mtime_ns == stamp
    write_dataset(tmp_path / "a", "captions", 7, seed=1)
    assert len(json.loads(path.read_text())) == 7

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "b", "captions", 5, seed=1)
    assert not (tmp_path / "b").exists()
    assert len(json.loads(write_dataset(tmp_path / "b", "captions", 5, seed=1).read_text())) == 5
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}


def test_generated_and_academic_are_the_halves_of_instructions(tmp_path: Path) -> None:
    both, generated, academic = (
        read_records(write_dataset(tmp_path / purpose, purpose, 60, seed=1), None)
        for purpose in ("instructions", "generated", "academic")
    )
    for records in zip(both, generated, academic, strict=True):
        pictures = [[image.path.read_bytes() for image in record.images] for record in records]
        assert pictures[0] == pictures[1] == pictures[2]
        if not pictures[0]:
            assert records[0].turns == records[1].turns == records[2].turns
            continue
        asked, brief = ([BRIEFLY in turn.text for turn in record.turns[::2]] for record in records[1:])
        assert not any(asked)
        assert all(brief)
    asked = [BRIEFLY in turn.text for record in both if record.images for turn in record.turns[::2]]
    assert 0.3 < sum(asked) / len(asked) < 0.7


def test_pictures_of_chosen_kinds(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "a", "captions", 40, seed=1, kinds=("sign", "page"))
    beginnings = Counter(re.match(r"A (page|\w+ sign) ", r.turns[1].text)[1][-4:] for r in read_records(path, None))
    assert beginnings.keys() == {"sign", "page"}
    assert min(beginnings.values()) > 8
    stamp = path.stat().st_mtime_ns
    assert write_dataset(tmp_path / "a", "captions", 40, seed=1, kinds=("sign", "page")).stat().st_mtime_ns == stamp
    assert write_dataset(tmp_path / "a", "captions", 40, seed=1).stat().st_mtime_ns != stamp


@pytest.mark.parametrize("name", ["thesis.txt", "data.json", "manifest.json"])
def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, name) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="name a new folder"):
        write_dataset(tmp_path, "captions", 2, seed=1)
    assert (tmp_path / name).read_text() == "{}"


def test_what_was_added_to_a_rendered_folder_is_not_deleted(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", "captions", 2, seed=1).parent
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else than rendered data"):
        write_dataset(folder, "captions", 3, seed=1)
    assert (folder / "notes.txt").read_text() == "mine"


def test_pictures_of_the_stages_and_of_the_test_differ(tmp_path: Path) -> None:
    shown = []
    for purpose in ("captions", "instructions", "heldout"):
        folder = write_dataset(tmp_path / purpose, purpose, 60, seed=0).parent
        shown.append({image.read_bytes() for image in (folder / "images").iterdir()})
    assert not shown[0] & shown[1]
    assert not (shown[0] | shown[1]) & shown[2]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_text_only_answers_are_right(split) -> None:
    rng = random.Random(0)
    seen = Counter()
    for _ in range(600):
        question, answer = text_instruction(rng, split)
        if match := re.fullmatch(r"What is (\d+) (plus|minus) (\d+)\?", question):
            a, b = int(match[1]), int(match[3])
            assert answer.endswith(f" is {a + b if match[2] == 'plus' else a - b}.")
            assert ((a + b) % 7 == 0) == (split == "heldout")
            seen["sum"] += 1
        elif match := re.fullmatch(r"Which is larger, (\d+) or (\d+)\?", question):
            assert answer.startswith(str(max(int(match[1]), int(match[2]))))
            seen["larger"] += 1
        elif match := re.fullmatch(r"How do you spell ([A-Z]+)\?", question):
            assert answer == f"{match[1]} is spelled {' '.join(match[1])}."
            assert (match[1] in HELDOUT_WORDS) == (split == "heldout")
            seen["spell"] += 1
    assert min(seen.values()) > 20


def test_prose_is_endless_text_of_training_words() -> None:
    stream = passages(seed=4, tiling=TILING)
    pairs = [next(stream) for _ in range(300)]
    texts = ["".join(pair) for pair in pairs]
    assert all(text.endswith("</s>") for text in texts)
    assert len(set(texts)) > 290
    assert not {word for text in texts for word in re.findall("[A-Z]+", text)} & HELDOUT_WORDS
    assert {given == "" for given, _ in pairs} == {True, False}
    assert all(given.endswith("\n") and follows for given, follows in pairs if given)
    again = passages(seed=4, tiling=TILING)
    assert [next(again) for _ in range(20)] == pairs[:20]
    assert next(passages(seed=5, tiling=TILING)) != pairs[0]


def test_a_transcript_names_what_stands_in_each_patch() -> None:
    for seed in range(20):
        scene = render("scene", seed, "train")
        plan = plan_tiles(Size(height=scene.image.height, width=scene.image.width), TILING)
        thumbnail, *rows = [split_cells(line) for line in transcript(scene, plan).split("\n")]
        assert len(thumbnail) == plan.side**2
        assert [len(row) for row in rows] == [plan.kept_cols] * plan.kept_rows
        for mark in scene.objects:
            name, (y, x) = f"{mark.colour} {mark.shape}", mark.centre
            row, col = int(y / scene.image.height * plan.side), int(x / scene.image.width * plan.side)
            assert name in thumbnail[row * plan.side + col]
            line = rows[int(y / scene.image.height * plan.kept_rows)]
            assert any(name in cell for cell in line)
        shown = {f"{mark.colour} {mark.shape}" for mark in scene.objects}
        named = {cell for cell in itertools.chain(thumbnail, *rows) if cell != "."}
        assert named == shown


def test_a_transcript_spells_text_once() -> None:
    sign = render("sign", 3, "train")
    plan = plan_tiles(Size(height=sign.image.height, width=sign.image.width), TILING)
    letters = "".join(transcript(sign, plan, thumbnail=False).replace(".", " ").split())
    assert letters == sign.questions[0].answer.replace(" ", "")
    assert talk([("Q?", "A."), ("R?", "B.")]) == "User: Q? Assistant: A.</s>User: R? Assistant: B.</s>"


def split_cells(line: str) -> list[str]:
    """The cells of one line of a scene's transcript: `.` or a colour and a shape."""
    return re.findall(r"\.|[a-z]+ [a-z]+", line)
