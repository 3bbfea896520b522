"""Academic sets in their official formats as one mixture that the data layer reads."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from anyres_vlm.cli.main import main
from anyres_vlm.config import shipped_config
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.job import load_settings
from anyres_vlm.instruct.mix import PRESETS, MixConfig, mix

SHORT = "\nAnswer the question using a single word or phrase."
QUESTIONS = [
    {"image_id": 7, "question_id": 1, "question": "What is it?"},
    {"image_id": 8, "question_id": 2, "question": "Where?"},
    {"image_id": 7, "question_id": 3, "question": "How many?"},
]
ANNOTATIONS = [
    {"question_id": 3, "image_id": 7, "multiple_choice_answer": "2", "answers": []},
    {"question_id": 1, "image_id": 7, "multiple_choice_answer": "dog", "answers": []},
    {
        "question_id": 2,
        "image_id": 8,
        "answers": [{"answer": word} for word in ("park", "lawn", "park")],
    },  # as OK-VQA's
]
REFS = [
    {"split": "train", "image_id": 7, "ann_id": 5, "sentences": [{"sent": f"dog {n}."} for n in range(11)]},
    {"split": "val", "image_id": 8, "ann_id": 5, "sentences": [{"sent": "not this one"}]},
]
BOXES = {
    "images": [{"id": 7, "height": 100, "width": 200}],
    "annotations": [{"id": 5, "image_id": 7, "bbox": [20, 10, 100, 50]}],
}


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Every set's files, with what the config says of them."""
    content: dict[str, Any] = {
        "generated": [
            {"id": f"{n}-{kind}", "kind": kind, "image": "x.jpg", "conversations": turns("<image>\nq", "a")}
            for n, kind in enumerate(["detail"] * 5 + ["reasoning"] * 2)
        ],
        "questions": {"questions": QUESTIONS},
        "annotations": {"annotations": ANNOTATIONS},
        "gqa": {"q1": {"imageId": "n1", "question": "Red?", "answer": "yes"}},
        "textvqa": {
            "data": [
                {
                    "image_id": "t",
                    "question": "What brand?",
                    "answers": ["unanswerable"] * 6 + ["acme", "ACME", "acme"],
                },
                {
                    "image_id": "t",
                    "question": "And?",
                    "answers": ["answering does not require reading text in the image"],
                },
            ]
        },
        "ocrvqa": {
            "b1": {
                "split": 1,
                "imageURL": "http://h/i/b1.png",
                "questions": ["Who?", "When?"],
                "answers": ["Eve", "1"],
            },
            "b2": {"split": 3, "imageURL": "http://h/i/b2.png", "questions": ["Who?"], "answers": ["Ann"]},
        },
        "aokvqa": [{"image_id": 7, "question": "Why?", "choices": ["w", "x", "y"], "correct_choice_idx": 1}],
        "instances": BOXES,
        "genome": [
            {
                "id": 3,
                "width": 100,
                "height": 50,
                "regions": [{"phrase": f"r{n}", "x": 10, "y": 5, "width": 50, "height": 25} for n in range(30)],
            }
        ],
        "chat": [
            {"id": "c", "conversations": [*turns("late", "first")[1:], *turns("hi", "ho"), *turns("so", "")]},
            {"id": "none", "conversations": [{"from": "gpt", "value": "alone"}]},
        ],
    }
    for name, value in content.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    simple = {
        name: {"data": f"{name}.json", "images": "i"} for name in ("generated", "gqa", "textvqa", "ocrvqa", "aokvqa")
    }
    vqa = {"data": "questions.json", "annotations": "annotations.json", "images": "i"}
    refcoco = {"data": "refs(unc).p", "annotations": "instances.json", "images": "i"}
    others = {"genome": {"data": "genome.json", "images": "i"}, "chat": {"data": "chat.json"}}
    return {**simple, "vqav2": vqa, "okvqa": vqa | {"image_name": "{:03d}.png"}, "refcoco": refcoco, **others}


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def mixed(folder: Path, sources: dict[str, Any], **more: Any) -> dict[str, list[dict[str, Any]]]:
    """The files that a mix writes, by set."""
    (folder / "mix.yaml").write_text(yaml.safe_dump({"sources": sources, **more}))
    mix(folder / "mix.yaml", folder / "out", None)
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out").glob("*.json")}


def said(entry: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in entry["conversations"]]


def test_questions_of_an_image_are_joined_and_the_format_is_said_once(tmp_path: Path, sets: dict[str, Any]) -> None:
    found = mixed(tmp_path, sets)
    dog = ["<image>\nWhat is it?" + SHORT, "dog", "How many?", "2"]
    assert [said(entry) for entry in found["vqav2"]] == [dog, ["<image>\nWhere?" + SHORT, "park"]]
    assert [entry["image"] for entry in found["vqav2"]] == [
        "COCO_train2014_000000000007.jpg",
        "COCO_train2014_000000000008.jpg",
    ]
    assert [entry["image"] for entry in found["okvqa"]] == ["007.png", "008.png"]
    assert found["gqa"][0]["image"] == "n1.jpg"
    assert said(found["gqa"][0]) == ["<image>\nRed?" + SHORT, "yes"]
    assert [said(entry) for entry in found["textvqa"]] == [["<image>\nWhat brand?" + SHORT, "acme"]]
    assert [(entry["image"], said(entry)) for entry in found["ocrvqa"]] == [
        ("b1.png", ["<image>\nWho?" + SHORT, "Eve", "When?", "1"])
    ]
    assert [said(entry) for entry in found["chat"]] == [["hi", "ho"]]
    assert "image" not in found["chat"][0]


def test_choices_turn_so_that_every_letter_is_right_once(tmp_path: Path, sets: dict[str, Any]) -> None:
    entries = mixed(tmp_path, sets)["aokvqa"]
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert [said(entry) for entry in entries] == [
        ["<image>\nWhy?\nA. w\nB. x\nC. y" + letter, "B"],
        ["<image>\nWhy?\nA. x\nB. y\nC. w" + letter, "A"],
        ["<image>\nWhy?\nA. y\nB. w\nC. x" + letter, "C"],
    ]


def test_regions_are_described_and_located(tmp_path: Path, sets: dict[str, Any]) -> None:
    found = mixed(tmp_path, sets)
    assert [len(said(entry)) // 2 for entry in found["refcoco"]] == [9, 2]
    lines = [line for entry in found["refcoco"] for line in said(entry)]
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    described = {
        answer
        for question, answer in pairs
        if "short description for this region: [0.10, 0.10, 0.60, 0.60]" in question
    }
    located = {
        question.rpartition(": ")[2].rstrip(".") for question, answer in pairs if answer == "[0.10, 0.10, 0.60, 0.60]"
    }
    assert described | located == {f"dog {n}" for n in range(11)}
    assert len(described) + len(located) == 11
    assert described
    assert located
    assert sum(len(said(entry)) // 2 for entry in found["genome"]) == 10


def test_the_mixture_is_read_by_the_data_layer(tmp_path: Path, sets: dict[str, Any]) -> None:
    found = mixed(tmp_path, sets, seed=3)
    source = open_source(tmp_path / "out" / "mixture.yaml")
    records = list(source.records(0, len(source)))
    assert not [record for record in records if isinstance(record, DataError)]
    assert len(records) == sum(map(len, found.values()))
    assert next(record.id for record in records if record.id.startswith("detail/")) == "detail/0-detail"
    images = {record.images[0].path for record in records if record.id.startswith("gqa/")}
    assert {path.resolve() for path in images} == {tmp_path / "i" / "n1.jpg"}


def test_presets_draw_their_volumes_and_name_what_is_missing(
    tmp_path: Path, sets: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "665k", {"detail": 3, "reasoning": 9, "gqa": 1, "vqav2": 1, "textvqa": 4})  # type: ignore[arg-type]
    names = ("generated", "gqa", "vqav2")
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": {name: sets[name] for name in names}}))
    assert (
        main(["instruct", "mix", str(tmp_path / "mix.yaml"), "--out", str(tmp_path / "out"), "--preset", "665k"]) == 0
    )
    parts = yaml.safe_load((tmp_path / "out" / "mixture.yaml").read_text())["sources"]
    drawn = {part["path"]: part.get("random") for part in parts}
    assert drawn == {"detail.json": 3, "reasoning.json": None, "gqa.json": None, "vqav2.json": 1}
    assert len(open_source(tmp_path / "out" / "mixture.yaml")) == 3 + 2 + 1 + 1
    listed = (tmp_path / "out" / "SOURCES.md").read_text()
    assert "7 conversations of preset 665k" in listed
    assert "| vqav2 | 1 | 2 | https://visualqa.org | annotations CC BY 4.0 |" in listed
    assert "Not given: textvqa (4)." in listed
    assert "7 conversations" in capsys.readouterr().out


def test_the_presets_have_the_published_sums() -> None:
    assert [sum(PRESETS[name].values()) for name in ("80k", "158k", "665k")] == [80_000, 158_000, 665_586]


def test_the_shipped_configurations_are_valid() -> None:
    folder = shipped_config("instruct/default").parent
    assert MixConfig.model_validate(yaml.safe_load((folder / "mix.yaml").read_text())).preset == "665k"
    settings = load_settings(folder / "default.yaml", {})
    assert settings.model in settings.prices


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("vqav2", {"annotations": None}, DataError, "answers are in another file: give it as annotations"),
        ("refcoco", {"annotations": None}, DataError, "boxes are in another file: give its instances.json"),
        ("gqa", {"data": "gone.json"}, DataError, "gone.json: no such file"),
        ("gqa", {"data": "genome.json"}, DataError, "no conversations for gqa"),
        ("okvqa", {"image_name": "{x}.png"}, UsageError, "expected a name with one number"),
        ("generated", {"data": "chat.json"}, DataError, "KeyError 'kind'"),
        ("refcoco", {"data": "evil.p"}, DataError, "it names posix.system, which plain data does not"),
        ("refcoco", {"data": "cut.p"}, DataError, "cannot be read as RefCOCO's references"),
    ],
)
def test_broken_sets(
    tmp_path: Path, sets: dict[str, Any], name: str, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    (tmp_path / "evil.p").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    (tmp_path / "cut.p").write_bytes(pickle.dumps(REFS, protocol=2)[:40])
    with pytest.raises(error) as caught:
        mixed(tmp_path, {name: sets[name] | change})
    assert said in str(caught.value)


def test_a_set_that_the_preset_has_not(tmp_path: Path, sets: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="preset 158k has no gqa"):
        mixed(tmp_path, {"gqa": sets["gqa"]}, preset="158k")
