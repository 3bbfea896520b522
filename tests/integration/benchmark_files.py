"""Small benchmarks in the official formats and folders, their pictures rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from anyres_vlm.synthetic.rendering import render

NUM_PICTURES = 3


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def draw(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        render("sign", seed, "heldout").image.convert("RGB").save(folder / name)


def human(answers: list[str]) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, start=1)]


def vqav2(root: Path) -> None:
    questions = [{"image_id": n % 3 + 40, "question": f"What is {n}?", "question_id": 4000 + n} for n in range(6)]
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "question_type": "what is",
            "answer_type": ["other", "number"][number % 2],
            "multiple_choice_answer": "red",
            "answers": human(["red"] * 7 + ["a red", "dark red", "2"]),
        }
        for number, question in enumerate(questions)
    ]
    meta = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    write(
        root / "v2_OpenEnded_mscoco_val2014_questions.json", meta | {"task_type": "Open-Ended", "questions": questions}
    )
    write(root / "v2_mscoco_val2014_annotations.json", meta | {"annotations": annotations})
    draw(root / "val2014", [f"COCO_val2014_{40 + n:012d}.jpg" for n in range(NUM_PICTURES)])


def gqa(root: Path) -> None:
    entries = {
        f"20{n}": {
            "semantic": [],
            "entailed": [],
            "equivalent": [],
            "question": f"Is number {n} there?",
            "imageId": f"n{n % 3}",
            "isBalanced": True,
            "groups": {"global": None, "local": ""},
            "answer": ["yes", "no"][n % 2],
            "semanticStr": "",
            "types": {
                "detailed": "existC",
                "semantic": ["obj", "attr"][n % 2],
                "structural": ["verify", "query"][n % 2],
            },
            "fullAnswer": "",
        }
        for n in range(5)
    }
    write(root / "testdev_balanced_questions.json", entries)
    draw(root / "images", [f"n{n}.jpg" for n in range(NUM_PICTURES)])


def textvqa(root: Path) -> None:
    data = [
        {
            "question": f"what does sign {n} say?",
            "image_id": f"00a{n % 3}",
            "image_classes": ["Sign"],
            "image_width": 100,
            "image_height": 100,
            "answers": ["bakery"] * 8 + ["Bakery.", "answering does not require reading text in the image"],
            "question_tokens": [],
            "question_id": 34602 + n,
            "set_name": "val",
        }
        for n in range(4)
    ]
    write(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": data})
    tokens = [{"image_id": f"00a{n}", "ocr_tokens": ["BAK", "ERY,"], "ocr_info": []} for n in range(NUM_PICTURES)]
    write(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    draw(root / "train_images", [f"00a{n}.jpg" for n in range(NUM_PICTURES)])


def pope(root: Path) -> None:
    for split in ("adversarial", "popular", "random"):
        lines = [
            {
                "question_id": n,
                "image": f"COCO_val2014_{n % 3:012d}.jpg",
                "text": f"Is there a {split} {n} in the image?",
                "label": ["no", "yes"][n % 2],
            }
            for n in range(1, 5)
        ]
        path = root / "coco" / f"coco_pope_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw(root / "val2014", [f"COCO_val2014_{n:012d}.jpg" for n in range(NUM_PICTURES)])


def mmvet(root: Path) -> None:
    entries = {
        f"v1_{n}": {
            "imagename": f"v1_{n}.png",
            "imagesource": "rendered",
            "question": f"What is {n}?",
            "answer": "-1<AND>-5",
            "capability": [["ocr"], ["rec", "ocr"], ["ocr", "math"]][n],
        }
        for n in range(NUM_PICTURES)
    }
    write(root / "mm-vet.json", entries)
    draw(root / "images", [f"v1_{n}.png" for n in range(NUM_PICTURES)])


def write_all(root: Path) -> Path:
    """One folder a benchmark."""
    for make in (vqav2, gqa, textvqa, pope, mmvet):
        make(root / make.__name__)
    return root
