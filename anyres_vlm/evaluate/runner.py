"""One benchmark on one checkpoint: questions, answers in durable batches over any number of processes, files, score."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyres_vlm.config import TemplateName
from anyres_vlm.data.checks import plan_image
from anyres_vlm.data.images import open_image
from anyres_vlm.data.index.build import Shard
from anyres_vlm.durable import replacing
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answer_log import AnswerLog
from anyres_vlm.evaluate.answers import read_answers
from anyres_vlm.evaluate.benchmark import Benchmark, Question, Scored
from anyres_vlm.evaluate.marks import image_path, write_result
from anyres_vlm.inference import Assistant, Conversation
from anyres_vlm.model.description import describe
from anyres_vlm.model.files import checkpoint_folder
from anyres_vlm.model.generation import Decoding
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Turn

logger = logging.getLogger(__name__)

WINDOW = 1024  # questions whose prompts are in memory and sorted by length together: 25 MB at 3,000 tokens each
MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model"}  # what decides an answer; a model card does not
MAX_UNASKED = 0.01  # of the questions may be too long for the model or hold its control tokens: they count as ""
SHOWN = 3  # questions named in a message

Progress = Callable[[int, int], None]
"""Called with the answered and all questions."""


@dataclass(frozen=True)
class Run:
    """What is asked of which checkpoint, and where the files go. `assistant` is called when a question is open."""

    model: str
    assistant: Callable[[], Assistant]
    data: Path
    images: Path | None
    out: Path
    limit: int | None
    shard: Shard
    batch_tokens: int
    template: TemplateName | None = None


def evaluate(run: Run, benchmark: Benchmark, progress: Progress = lambda done, total: None) -> dict[str, Any] | None:
    """Answer this shard's questions; the process that ends last writes the files in `out` and returns the result.

    Others return None. Raises `DataError` for broken files and for images that are missing or cannot be decoded; what
    has been answered is kept, and the same call goes on.
    """
    questions = benchmark.questions(run.data, run.images, run.limit)
    if not questions:
        raise DataError(f"{run.data}: no {benchmark.name} questions in it")
    log = AnswerLog(run.out, benchmark.name, _key(run, benchmark, questions))
    answers = log.read()
    start, stop = run.shard.span(len(questions))
    still_open = [place for place in range(start, stop) if place not in answers]
    reason = "the warnings of the run that asked them say why"
    if still_open:
        reason = _answer(run, benchmark, questions, still_open, log, progress) or reason
        answers = log.read()
    if len(answers) < len(questions):
        return None
    unasked = [question.id for place, question in enumerate(questions) if answers[place] is None]
    if len(unasked) > MAX_UNASKED * len(questions):
        shown = ", ".join(str(name) for name in unasked[:SHOWN])
        raise DataError(
            f"{benchmark.name}: {len(unasked)} questions cannot be asked ({shown}; see the warnings), "
            f"at most {MAX_UNASKED:.0%} may: {reason}; where prompts are too long, lower the checkpoint's grid or "
            "leave OCR tokens out"
        )
    return _finish(run, benchmark, questions, [answers[place] or "" for place in range(len(questions))], unasked)


def _answer(
    run: Run,
    benchmark: Benchmark,
    questions: Sequence[Question],
    still_open: Sequence[int],
    log: AnswerLog,
    progress: Progress,
) -> str | None:
    """Answer what is open. Returns why the first question that cannot be asked cannot."""
    assistant = run.assistant()
    reason: str | None = None
    _check(benchmark, [questions[place] for place in still_open], lambda ref: plan_image(ref, assistant.model.tiling))
    shard = f"{run.shard.number}-of-{run.shard.count}"
    log.open(shard)
    start, stop = run.shard.span(len(questions))
    done = stop - start - len(still_open)
    for first in range(start, stop, WINDOW):  # fixed, so that a run that goes on has the batches of one that was whole
        window = [place for place in still_open if first <= place < first + WINDOW]
        asked, refusal = _conversations(assistant, questions, window)
        reason = reason or refusal
        if unasked := {place: None for place in window if place not in asked}:
            log.append(shard, unasked)
        places = list(asked)
        decoding = Decoding(benchmark.max_new_tokens)
        try:
            for batch in assistant.answer_batches(list(asked.values()), decoding, run.batch_tokens):
                log.append(shard, {places[number]: answer.text for number, answer in batch.items()})
                done += len(batch)
                progress(done, stop - start)
        except DataError:
            _check(benchmark, [questions[place] for place in window], open_image)
            raise
    return reason


def _conversations(
    assistant: Assistant, questions: Sequence[Question], window: Sequence[int]
) -> tuple[dict[int, Conversation], str | None]:
    """Conversations by place. A question that the model cannot be asked is left out with a warning.

    The second value is the reason for the first one left out.
    """
    asked, reason = {}, None
    for place in window:
        question = questions[place]
        conversation = Conversation([Turn("user", f"{IMAGE_TOKEN}\n{question.prompt}")], [question.image])
        try:
            assistant.check(conversation)
        except (UsageError, DataError) as error:
            reason = reason or str(error)
            logger.warning("question %s is answered with an empty text: %s", question.id, error)
        else:
            asked[place] = conversation
    return asked, reason


def _check(benchmark: Benchmark, questions: Sequence[Question], read: Callable[[ImageRef], object]) -> None:
    """Raises one `DataError` for all images that cannot be read, with their number and the first questions' ids."""
    broken = []
    for question in questions:
        try:
            read(question.image)
        except DataError as error:
            broken.append(f"question {question.id}: {error}")
    if broken:
        shown = "; ".join(broken[:SHOWN]) + ("; ..." if len(broken) > SHOWN else "")
        raise DataError(
            f"{benchmark.name}: images of {len(broken)} of {len(questions)} questions are missing or broken ({shown}); "
            "a score needs all of them: mend them or name their folder with --images, and run it again"
        )


def _finish(
    run: Run, benchmark: Benchmark, questions: Sequence[Question], texts: Sequence[str], unasked: Sequence[int | str]
) -> dict[str, Any]:
    """Write answers, submission and result; the score is that of the answer file, as `anyres score` would read it."""
    answer_file = run.out / f"{benchmark.name}.answers.jsonl"
    lines = [
        {"question_id": question.id, "prompt": question.prompt, "text": text, "image": image_path(question.image)}
        for question, text in zip(questions, texts, strict=True)
    ]
    _write(answer_file, lines)
    suffix, submission = benchmark.submission(run.data, list(zip(questions, texts, strict=True)))
    _write(run.out / f"{benchmark.name}.submission{suffix}", submission)
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "model": run.model,
        "questions": len(questions),
        "limit": run.limit,
        "unasked": list(unasked),
        "max_new_tokens": benchmark.max_new_tokens,
        "tiling": asdict(describe(checkpoint_folder(run.model)).tiling),
        "protocol": dict(benchmark.protocol),
    }
    scored = Scored(None, {}, {})
    if annotations := benchmark.annotations(run.data):
        scored = benchmark.score(annotations, read_answers(answer_file), partial=run.limit is not None)
    result |= {"score": scored.score, "scores": dict(scored.scores)}
    write_result(run.out, result, scored)
    return result


def _write(path: Path, content: Any) -> None:
    """A .jsonl file of a list, else indented JSON."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(line) + "\n" for line in content)
    else:
        text = json.dumps(content, indent=1) + "\n"
    with replacing(path) as file:
        file.write(text)


def _key(run: Run, benchmark: Benchmark, questions: Sequence[Question]) -> str:
    """Answers are kept for the same weights, template, prompts, images and length; weights by size and change time."""
    folder = checkpoint_folder(run.model)
    if not folder.is_dir():
        raise UsageError(f"{run.model}: no such folder; name a checkpoint folder or a hub id with --model")
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    asked = [(question.id, question.image.name, question.prompt) for question in questions]
    template = [] if run.template is None else [run.template]
    return hashlib.sha256(json.dumps([weights, benchmark.max_new_tokens, asked, *template]).encode()).hexdigest()
