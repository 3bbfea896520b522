"""Answer files: raw answers of a model or official submissions, and their match with the annotations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.errors import DataError

ID_KEYS = ("question_id", "questionId")
SUBMITTED_KEYS = ("answer", "prediction")
SHOWN = 3  # questions named in a message


@dataclass(frozen=True, slots=True)
class Answered:
    """One line of an answer file. `id` is None if the file relies on its order.

    A `raw` answer is a model's text, which a benchmark may post-process; a submission is scored unchanged.
    """

    id: str | None
    text: str
    raw: bool
    prompt: str = ""
    category: str = ""
    image: str = ""


def read_answers(path: Path) -> list[Answered]:
    """Read an answer file. Raises `DataError` for an unknown format.

    Known are lines or a list of `question_id` and `text` (raw answers), `question_id` and `answer` or `questionId` and
    `prediction` (submissions), and one object of answers by id (MM-Vet).
    """
    content = read_json(path)
    if isinstance(content, dict) and not any(key in content for key in (*ID_KEYS, *SUBMITTED_KEYS, "text")):
        return [Answered(name, _text(text, f"{path}: answer {name}"), raw=False) for name, text in content.items()]
    entries = content if isinstance(content, list) else [content]
    return [_answered(entry, f"{path}: answer {number}") for number, entry in enumerate(entries, start=1)]


def read_json(path: Path) -> Any:
    """Read JSON, or JSON lines as a list. Raises `DataError` if it is neither or an object repeats a key."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected JSON in UTF-8") from None
    try:
        return _parse(text, path)
    except json.JSONDecodeError as whole:
        lines = [line for line in text.split("\n") if line.strip()]  # not splitlines: a text may contain U+2028
        if len(lines) < 2 or whole.msg != "Extra data":
            raise DataError(f"{path}: not JSON ({whole}); expected JSON or JSON lines") from None
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(_parse(line, path))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number}: not JSON ({error.msg}); fix or remove it") from None
    return parsed


def as_id(value: Any, where: str) -> str:
    """Return a question's id as text, the same for 12 and "12"."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: expected a number or text as the question's id, got {value!r}")
    return str(value)


def match(
    given: Sequence[Answered], questions: Iterable[str], path: Path, partial: bool, ids: Sequence[str] | None = None
) -> dict[str, Answered]:
    """Return the answers by question, in the order given; `ids` replaces the ids in the answers.

    Raises `DataError` unless every answer has a question and every question exactly one answer or, if `partial`, at
    most one. `path` is the file of the questions, for the error if there are none.
    """
    names = [answer.id or "" for answer in given] if ids is None else list(ids)
    expected = set(questions)
    if partial:
        expected &= set(names)
    twice = [name for name, count in Counter(names).items() if count > 1]
    unknown = [name for name in dict.fromkeys(names) if name not in expected]
    missing = sorted(expected - set(names))
    for kind, found, remedy in (
        ("answered twice", twice, "keep one answer each"),
        ("not among the annotations", unknown, "check that both files are of the same split"),
        ("without an answer", missing, "answer every question; the text may be empty"),
    ):
        if found:
            shown = first_few([repr(name) for name in found])
            plural = "question" if len(found) == 1 else "questions"
            raise DataError(f"{len(found)} {plural} {kind} ({shown}) of {len(expected)}: {remedy}")
    if not names:
        raise DataError(f"{path}: no questions in it")
    return dict(zip(names, given, strict=True))


def first_few(words: Sequence[str], separator: str = ", ") -> str:
    """Return the first few of the words of a message."""
    return separator.join([*words[:SHOWN], "..."] if len(words) > SHOWN else words)


def _answered(entry: Any, where: str) -> Answered:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, got {type(entry).__name__}")
    id_key = next((key for key in ID_KEYS if key in entry), None)
    text_key = next((key for key in ("text", *SUBMITTED_KEYS) if key in entry), None)
    if text_key is None:
        raise DataError(f"{where}: expected 'text', 'answer' or 'prediction', got only {sorted(entry)}")
    return Answered(
        None if id_key is None else as_id(entry[id_key], where),
        _text(entry[text_key], where),
        raw=text_key == "text",
        prompt=_text(entry.get("prompt", ""), f"{where}: prompt"),
        category=_text(entry.get("category", ""), f"{where}: category"),
        image=image if isinstance(image := entry.get("image"), str) else "",  # not in any official format
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text, got {json.dumps(value)[:40]}")
    return value


def _parse(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise DataError(f"{path}: key {twice!r} occurs twice in one object: keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise DataError(f"{path}: nested too deeply; expected an answer or annotation file") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{path}: cannot be parsed as JSON: {error}") from None
