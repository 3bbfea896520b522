"""Result files as `anyres eval`, `eval heldout` and `probe` write them, in small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROTOCOL = {"prompt": "<image>\n{question}", "post_processing": "none", "scorer": "official"}


def mark(number: int, points: float, **more: Any) -> dict[str, Any]:
    """A line of marks; what is not named is made up from its number."""
    return {
        "question_id": str(number),
        "question": f"What is {number}?",
        "image": f"{number // 2}.png",
        "text": "red" if points else "blue",
        "reference": "red",
        "kinds": ["what"],
        "points": points,
    } | more


def write_result(folder: Path, benchmark: str, marks: Sequence[dict[str, Any]], **more: Any) -> Path:
    """`NAME.json` and its marks."""
    folder.mkdir(parents=True, exist_ok=True)
    points = {line["question_id"]: line["points"] for line in marks}
    result = {
        "benchmark": benchmark,
        "model": f"models/{folder.name}",
        "questions": len(marks),
        "limit": None,
        "unasked": [],
        "max_new_tokens": 128,
        "tiling": {"pinpoints": [[28, 56], [56, 28]], "tile": 28, "patch": 14, "layout": "flat", "dialect": "hf"},
        "protocol": PROTOCOL,
        "score": round(100 * sum(points.values()) / max(len(points), 1), 2),
        "scores": {},
        "points": points,
    }
    (folder / f"{benchmark}.marks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in marks))
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps(result | more))
    return path


def write_heldout(path: Path, correct: Sequence[bool], blind: bool = False) -> Path:
    answers = [
        {
            "id": str(number),
            "task": ["sign", "count"][number % 2],
            "question": "?",
            "expected": "a",
            "answer": "a" if hit else "b",
            "image": "",
            "correct": hit,
        }
        for number, hit in enumerate(correct)
    ]
    content = {"model": "m", "limit": None, "blind": blind, "tiling": None, "accuracy": {}, "answers": answers}
    path.write_text(json.dumps(content))
    return path
