"""Marks on the disk: a line a question beside a result, with all that a report shows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyres_vlm.durable import replacing
from anyres_vlm.evaluate.benchmark import Scored
from anyres_vlm.schema import ImageRef


def write_result(folder: Path, result: Mapping[str, Any], scored: Scored) -> None:
    """`NAME.json`, every question's points in it, and `NAME.marks.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["benchmark"]
    lines = [
        {
            "question_id": question,
            "question": mark.answer.prompt or mark.question,
            "image": mark.answer.image or mark.image,
            "text": mark.answer.text,
            "reference": mark.reference,
            "kinds": mark.kinds,
            "points": mark.points,
        }
        for question, mark in scored.marks.items()
    ]
    with replacing(folder / f"{name}.marks.jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    content = {**result, "points": {question: mark.points for question, mark in scored.marks.items()}}
    with replacing(folder / f"{name}.json") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def image_path(ref: ImageRef) -> str:
    """Where a picture that is a file of its own lies, absolute; of any other its name."""
    is_file = ref.path is not None and ref.offset == 0 and ref.length is None
    return str(ref.path.absolute()) if is_file and ref.path else ref.name
