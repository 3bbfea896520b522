"""Benchmarks on one checkpoint: check everything, answer in durable batches over any number of processes, score."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from anyres_vlm.checkpoints.describe import describe
from anyres_vlm.checkpoints.folders import checkpoint_folder
from anyres_vlm.config import TemplateName
from anyres_vlm.data.headers import plan_image
from anyres_vlm.data.images import open_image
from anyres_vlm.data.index.build import Shard
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import first_few, read_answers
from anyres_vlm.evaluate.benchmarks.base import Benchmark, Question, Scored, image_path
from anyres_vlm.evaluate.report.results import write_result
from anyres_vlm.files import append, cut_partial_line, replacing, whole_lines
from anyres_vlm.inference.assistant import Assistant, Conversation
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.model.quantize import Load
from anyres_vlm.schema import ImageRef, Turn

logger = logging.getLogger(__name__)

WINDOW = 1024  # questions whose prompts are in memory and sorted by length together: 25 MB at 3,000 tokens each
MODEL_FILES = {".safetensors", ".bin", ".json", ".jinja", ".model"}  # what decides an answer; a model card does not
MAX_UNASKED = 0.01  # of the questions may be too long or contain control tokens: their answer is ""
TOO_LONG = "context limit"  # in the message of `room_for_answer`

Progress = Callable[[int, int], None]
"""Called with the number of answers and of questions."""


@dataclass(frozen=True)
class Run:
    """A checkpoint, the range of questions to answer, and the folder for the files."""

    model: str
    images: Path | None
    out: Path
    limit: int | None
    shard: Shard
    batch_tokens: int
    template: TemplateName | None = None
    load: Load | None = None  # in how few bits the model is held


@dataclass(frozen=True)
class Task:
    """One benchmark of a run. `title` is the stem of its files, usually the benchmark's name."""

    benchmark: Benchmark
    data: Path
    title: str


@dataclass(frozen=True)
class Prepared:
    """A benchmark whose files are checked. `open` are the positions of this shard's questions without an answer."""

    run: Run
    task: Task
    questions: list[Question]
    annotations: list[Path]
    log: AnswerLog
    open: list[int]
    unasked: set[int] = field(default_factory=set)  # of the open ones; see check_prompts


def prepare(run: Run, tasks: Sequence[Task]) -> list[Prepared]:
    """Check whatever needs no model, of all benchmarks: question files, ids, right answers, images, the output folder.

    Raises `DataError` for files, `UsageError` for flags.
    """
    prepared = [_read_task(run, task) for task in tasks]
    tiling = describe(_model_folder(run), run.template).tiling
    for one in prepared:
        _check_images(one, one.open, lambda ref: plan_image(ref, tiling))
    _check_writable(run.out)
    return prepared


def check_prompts(prepared: Sequence[Prepared], load: Callable[[], Assistant]) -> None:
    """Find the questions that the model cannot be asked and warn about each. Raises `DataError` if they are many.

    `load` is called if a question is open.
    """
    for one in prepared:
        reasons: list[str] = []
        for place in one.open:
            question = one.questions[place]
            try:
                load().prompt(_conversation(question))
            except (UsageError, DataError) as error:
                reasons.append(str(error))
                logger.warning("question %s gets an empty answer: %s", question.id, error)
                one.unasked.add(place)
        earlier = {place for place, text in one.log.read().items() if text is None}
        _check_unasked(one, earlier | one.unasked, reasons)


def evaluate(
    one: Prepared, load: Callable[[], Assistant], progress: Progress = lambda done, total: None
) -> dict[str, Any] | None:
    """Answer this shard's open questions; the process that finishes last writes the files and returns the result.

    Others return None. Raises `DataError` for images that cannot be decoded; answers are kept, and the same call
    resumes.
    """
    if one.open:
        _answer(one, load(), progress)
    answers = one.log.read()
    if len(answers) < len(one.questions):
        return None
    _check_unasked(one, {place for place, text in answers.items() if text is None})
    return _finish(one, answers)


def _read_task(run: Run, task: Task) -> Prepared:
    benchmark = task.benchmark
    questions = benchmark.questions(task.data, run.images, run.limit)
    if not questions:
        raise DataError(f"{task.data}: no {benchmark.name} questions in it")
    twice = [name for name, count in Counter(str(question.id) for question in questions).items() if count > 1]
    if twice:
        names = first_few(twice)
        raise DataError(f"{task.data}: {len(twice)} {benchmark.name} ids occur twice ({names}); use the official file")
    annotations = benchmark.annotations(task.data)
    log = AnswerLog(run.out, task.title, _key(run, benchmark, questions))
    answers = log.read()
    still_open = [place for place in range(*run.shard.span(len(questions))) if place not in answers]
    if annotations and still_open:
        benchmark.check_annotations(annotations, questions, partial=run.limit is not None)
    return Prepared(run, task, questions, annotations, log, still_open)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot write there ({error.strerror}): name another folder") from None


def _check_images(one: Prepared, places: Sequence[int], read: Callable[[ImageRef], object]) -> None:
    """Raise one `DataError` for all images that cannot be read, with their number and the first questions' ids."""
    faults: dict[ImageRef, DataError | None] = {}
    broken = []
    for question in (one.questions[place] for place in places):
        for image in question.images:
            if image not in faults:
                try:
                    read(image)
                    faults[image] = None
                except DataError as error:
                    faults[image] = error
            if faults[image] is not None:
                broken.append(f"question {question.id}: {faults[image]}")
    if broken:
        raise DataError(
            f"{one.task.title}: images of {len(broken)} of {len(places)} questions are missing or broken "
            f"({first_few(broken, '; ')}); "
            "a score needs all of them: add them or name their folder with --images, then rerun to resume"
        )


def _check_unasked(one: Prepared, places: set[int], reasons: Sequence[str] = ()) -> None:
    """Raise `DataError` if too many questions cannot be asked, with the first reason of the more frequent kind."""
    if len(places) > MAX_UNASKED * len(one.questions):
        unasked = [str(one.questions[place].id) for place in sorted(places)]
        too_long = [reason for reason in reasons if TOO_LONG in reason]
        others = [reason for reason in reasons if TOO_LONG not in reason]
        why = [*max(others, too_long, key=len), "the warnings of the run that found them say why"][0]
        if TOO_LONG in why:
            has_hints = one.task.benchmark.protocol.get("ocr_tokens", "").startswith("in the prompt")
            why += "; use a checkpoint of a smaller grid" + " or --no-ocr-tokens" * has_hints
        raise DataError(
            f"{one.task.title}: {len(unasked)} of {len(one.questions)} questions cannot be asked "
            f"({first_few(unasked)}; see the warnings), at most {MAX_UNASKED:.0%} may: {why}"
        )


def _conversation(question: Question) -> Conversation:
    return Conversation([Turn("user", question.turn)], question.images, question.system)


def _answer(one: Prepared, assistant: Assistant, progress: Progress) -> None:
    """Answer the open questions; every batch is on disk before the next one starts."""
    questions, log, run = one.questions, one.log, one.run
    shard = f"{run.shard.number}-of-{run.shard.count}"
    log.open(shard)
    start, stop = run.shard.span(len(questions))
    done = stop - start - len(one.open)
    decoding = Decoding(one.task.benchmark.max_new_tokens)
    for first in range(start, stop, WINDOW):  # fixed windows, so that a resumed run has the batches of a whole one
        window = [place for place in one.open if first <= place < first + WINDOW]
        if left_out := {place: None for place in window if place in one.unasked}:
            log.append(shard, left_out)
        places = [place for place in window if place not in one.unasked]
        asked = [_conversation(questions[place]) for place in places]
        try:
            for batch in assistant.answer_batches(asked, decoding, run.batch_tokens):
                log.append(shard, {places[number]: answer.text for number, answer in batch.items()})
                done += len(batch)
                progress(done, stop - start)
        except DataError:
            _check_images(one, window, open_image)
            raise


def _finish(one: Prepared, answers: Mapping[int, str | None]) -> dict[str, Any]:
    """Write answers, submission and result. The score is that of the answer file, as `anyres score` reads it."""
    run, task, benchmark = one.run, one.task, one.task.benchmark
    texts = [(question, answers[place] or "") for place, question in enumerate(one.questions)]
    answer_file = run.out / f"{task.title}.answers.jsonl"
    lines = [
        {
            "question_id": question.id,
            "prompt": question.prompt,
            "text": text,
            "image": ", ".join(map(image_path, question.images)),
        }
        for question, text in texts
    ]
    _write(answer_file, lines)
    if submission := benchmark.submission(task.data, texts):
        suffix, content = submission
        _write(run.out / f"{task.title}.submission{suffix}", content)
    scored = Scored(None, {}, {})
    if one.annotations:
        scored = benchmark.score(one.annotations, read_answers(answer_file), partial=run.limit is not None)
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "model": run.model,
        "load": run.load,
        "questions": len(one.questions),
        "limit": run.limit,
        "unasked": [one.questions[place].id for place in sorted(answers) if answers[place] is None],
        "max_new_tokens": benchmark.max_new_tokens,
        "tiling": asdict(describe(_model_folder(run), run.template).tiling),
        "annotations": [path.name for path in one.annotations],
        "protocol": dict(benchmark.protocol),
        "score": scored.score,
        "scores": dict(scored.scores),
    }
    write_result(run.out, task.title, result, scored)
    return result


def _write(path: Path, content: Any) -> None:
    """Write a list as the lines of a .jsonl file, anything else as indented JSON."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(line) + "\n" for line in content)
    else:
        text = json.dumps(content, indent=1) + "\n"
    with replacing(path) as file:
        file.write(text)


def _model_folder(run: Run) -> Path:
    folder = checkpoint_folder(run.model)
    if not folder.is_dir():
        raise UsageError(f"{run.model}: no such folder; name a checkpoint folder or a hub id with --model")
    return folder


def _key(run: Run, benchmark: Benchmark, questions: Sequence[Question]) -> str:
    """Return a key of the weights (by size and time of change), template, bits, prompts, images and answer length."""
    files = sorted(path for path in _model_folder(run).iterdir() if path.suffix in MODEL_FILES)
    weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    asked = [
        (q.id, ", ".join(image.name for image in q.images), q.prompt, *filter(None, [q.system])) for q in questions
    ]
    more = [setting for setting in (run.template, run.load) if setting is not None]
    return hashlib.sha256(json.dumps([weights, benchmark.max_new_tokens, asked, *more]).encode()).hexdigest()


@dataclass(frozen=True)
class AnswerLog:
    """The answers of an unfinished evaluation: each process appends to its own file, and all of them are read.

    A line holds a whole batch, so a killed run leaves whole batches; the remaining questions are then batched as they
    would have been, and every answer is the same to the bit. Logs with another `key` are ignored.
    """

    folder: Path
    title: str
    key: str

    def path(self, shard: str) -> Path:
        """Return the log of the process of a shard, such as `1-of-4`."""
        return self.folder / f"{self.title}.log.{shard}.jsonl"

    def read(self) -> dict[int, str | None]:
        """Return the answers of all shards by the question's position; None is a question that cannot be asked."""
        answers: dict[int, str | None] = {}
        for path in sorted(self.folder.glob(f"{escape(self.title)}.log.*.jsonl")):
            lines = whole_lines(path)
            if next(lines, b"") != _line({"key": self.key}):
                continue
            for number, line in enumerate(lines, start=2):
                try:
                    answers |= dict(json.loads(line)["answers"])
                except (ValueError, KeyError, TypeError):
                    raise DataError(f"{path} line {number}: not a batch; delete the file to answer again") from None
        return answers

    def open(self, shard: str) -> None:
        """Prepare the log for appending: cut a partial last line, replace a log with another key."""
        path = self.path(shard)
        if next(whole_lines(path), b"") == _line({"key": self.key}):
            cut_partial_line(path)
            return
        with replacing(path, "wb") as file:
            file.write(_line({"key": self.key}))

    def append(self, shard: str, answers: Mapping[int, str | None]) -> None:
        """Append one batch and wait until it is on disk."""
        append(self.path(shard), _line({"answers": list(answers.items())}))


def _line(entry: object) -> bytes:
    return json.dumps(entry).encode() + b"\n"
