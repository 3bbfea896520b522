"""Hostile datasets, benchmark files and descriptions as JSON, and what the project makes of them."""

from __future__ import annotations

import json
import string
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from images import TILING, encoded, photo
from target import Target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.data.index.table import count_rejects, rejects_path
from anyres_vlm.data.sources.open import open_single
from anyres_vlm.data.sources.record import Source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.evaluate.answers import Answered, read_answers
from anyres_vlm.evaluate.benchmarks import make_benchmark
from anyres_vlm.evaluate.benchmarks.base import Benchmark
from anyres_vlm.instruct.annotations import read_coco, read_descriptions
from anyres_vlm.schema import Record

RECORD = {
    "id": "r",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a star"}],
}
DEEP = "[" * 900 + "]" * 900  # what Python's parser still takes
ODD_TEXTS = [
    "",
    "\0",
    "\ud800",
    "..",
    "/etc/passwd",
    "../a.png",
    "a.png",
    "<image>",
    "</s>",
    "x" * 5000,
    "\u2028",
    "1e9",
]
ODD_NUMBERS = [0, -1, 10**30, 2**63, float("nan"), float("inf"), 1.5, True]


@cache
def settings() -> IndexSettings:
    """For an index: a tokenizer of characters, and small tiles."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = {word: number for number, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    return IndexSettings(ConversationTokenizer("vicuna_v1", fast), TILING, max_length=2048)


def good_record(**changes: Any) -> dict[str, Any]:
    """A record with its image `a.png`, but for the changes."""
    return RECORD | changes


def index(data: Path) -> dict[str, int]:
    """Index a data file beside it with the images there: rejects by kind and, under `ok`, the rest.

    Raises `DataError` as the command does, for the whole file alone.
    """
    out = data.with_name("index.parquet")
    built = build_index(data, None, settings(), out, workers=1, max_bad_fraction=1.0)
    rejects = count_rejects(built.index)
    lines = rejects_path(out).read_text(encoding="utf-8").split("\n")[:-1]  # a name may hold U+2028
    assert len(lines) == sum(rejects.values()), "a reject is not listed"
    assert all(json.loads(line)["reason"] for line in lines)
    return rejects | {"ok": len(built.index) - len(lines)}


def check_data(content: bytes, folder: Path, suffix: str = ".json") -> bool:
    """Read every row in order and by itself, then index it; True where a record is good."""
    (folder / "a.png").write_bytes(_picture())
    data = folder / f"data{suffix}"
    data.write_bytes(content)
    try:
        source = open_single(data, None)
        good = sum(_agrees(source, row, item) for row, item in enumerate(source.records(0, len(source))))
        counted = index(data)
    except DataError as error:
        _check_message(error)
        return False
    assert counted["ok"] <= good
    return counted["ok"] > 0


def _agrees(source: Source, row: int, item: Record | DataError) -> bool:
    """Whether a row is good, which it has to be in order and by itself."""
    try:
        alone: Record | DataError = source.record(row)
    except DataError as error:
        _check_message(error)
        alone = error
    if isinstance(item, DataError):
        assert str(alone) == str(item)
        return False
    assert alone == item
    return True


def _check_message(error: DataError | UsageError) -> None:
    assert len(str(error).splitlines()) <= 1, f"a message of several lines: {error}"


@cache
def _picture() -> bytes:
    return encoded(photo(), "PNG")


BENCHMARKS: dict[str, tuple[Benchmark, str, Any]] = {
    "vqav2": (
        make_benchmark("vqav2"),
        "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {"data_subtype": "test-dev2015", "questions": [{"image_id": 1, "question": "what?", "question_id": 2}]},
    ),
    "gqa": (
        make_benchmark("gqa"),
        "testdev_balanced_questions.json",
        {
            "2": {
                "imageId": "a",
                "question": "what?",
                "answer": "a",
                "fullAnswer": "a",
                "isBalanced": True,
                "groups": {"global": None, "local": ""},
                "types": {"structural": "verify", "semantic": "obj"},
                "semantic": [],
                "entailed": [],
                "equivalent": [],
            }
        },
    ),
    "textvqa": (
        make_benchmark("textvqa", ocr_tokens=False),
        "TextVQA_0.5.1_val.json",
        {"data": [{"image_id": "a", "question": "what?", "question_id": 2, "answers": ["a"] * 10}]},
    ),
    "pope": (
        make_benchmark("pope"),
        "coco_pope_random.json",
        [{"question_id": 2, "image": "a.png", "text": "is it?", "label": "yes"}],
    ),
    "mmvet": (
        make_benchmark("mmvet"),
        "mm-vet.json",
        {"v1_0": {"imagename": "a.png", "question": "what?", "answer": "a", "capability": ["ocr"]}},
    ),
}
DESCRIPTION = [
    {
        "id": 7,
        "image": "a.png",
        "width": 46,
        "height": 30,
        "captions": ["A dog runs."],
        "boxes": [{"category": "dog", "box": [1, 2, 3, 4]}],
        "regions": [{"phrase": "a dog", "x": 1, "y": 2, "width": 3, "height": 4}],
    }
]
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 46, "height": 30}],
    "annotations": [{"id": 1, "image_id": 1, "caption": "A dog.", "category_id": 3, "bbox": [1, 2, 3, 4]}],
    "categories": [{"id": 3, "name": "dog"}],
}


def check_benchmark(given: tuple[str, str], folder: Path) -> bool:
    """Questions and scores of a benchmark's file; the file is one of answers, too."""
    name, content = given
    benchmark, file, _ = BENCHMARKS[name]
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(_picture())
    (folder / file).write_text(content, encoding="utf-8", errors="surrogatepass")
    try:
        questions = benchmark.questions(folder, None, None)
        for question in questions:
            (image,) = question.images
            assert image.path is not None
            assert image.path.resolve().is_relative_to(folder.resolve())
        answers = [(question, "yes") for question in questions]
        submitted = benchmark.submission(folder, answers)
        assert submitted is not None
        suffix, submission = submitted
        lines = submission if suffix == ".jsonl" else [submission]
        (folder / "answers").mkdir()
        said = folder / "answers" / f"answers{suffix}"
        said.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        annotations = benchmark.annotations(folder)
        if annotations:
            benchmark.score(annotations, read_answers(said), partial=True)
    except (DataError, UsageError) as error:
        _check_message(error)
        return _is_scored(benchmark, folder / file)
    return True


def _is_scored(benchmark: Benchmark, file: Path) -> bool:
    """Whether answers made elsewhere are, where the questions cannot be asked."""
    try:
        annotations = benchmark.annotations(file)
        if not annotations:
            return False
        benchmark.score(annotations, [Answered(name, "yes", raw=True) for name in ("2", "v1_0")], partial=True)
    except (DataError, UsageError) as error:
        _check_message(error)
        return False
    return True


def check_descriptions(content: str, folder: Path) -> bool:
    """Descriptions for `instruct`."""
    return _scenes(content, folder, False)


def check_coco(content: str, folder: Path) -> bool:
    """COCO's captions and instances in one file."""
    return _scenes(content, folder, True)


def _scenes(content: str, folder: Path, coco: bool) -> bool:
    images = folder / "images"
    images.mkdir()
    (images / "a.png").write_bytes(_picture())
    file = folder / "said.json"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    try:
        scenes = read_coco(file, file, images) if coco else read_descriptions(file, images)
    except DataError as error:
        _check_message(error)
        return False
    for scene in scenes:
        assert not scene.image.startswith("/")
        assert ".." not in scene.image.split("/")
        assert all(0 <= side <= 1 for item in scene.objects for side in item.box)
    return True


odd_values = st.one_of(
    st.none(),
    st.sampled_from(ODD_TEXTS),
    st.sampled_from(ODD_NUMBERS),
    st.text(string.printable, max_size=5),
    st.just([]),
    st.just({}),
    st.just("DEEP"),
    st.lists(st.sampled_from(["a.png", 1, None, {}, []]), max_size=3),
    st.dictionaries(st.sampled_from(["type", "text", "id", "value"]), st.sampled_from(["text", "image", 1, None])),
)


@st.composite
def odd_json(draw: st.DrawFn, good: Any) -> Any:
    """A good value with some of its parts changed, left out or doubled."""
    if draw(st.integers(0, 24)) == 0:
        return draw(odd_values)
    if isinstance(good, dict):
        kept = {key: value for key, value in good.items() if draw(st.integers(0, 39))}
        return {key: draw(odd_json(value)) for key, value in kept.items()}
    if isinstance(good, list):
        times = draw(st.sampled_from([1] * 9 + [2, 0]))
        return [draw(odd_json(value)) for value in good * times]
    return good


def spelled(value: Any) -> str:
    """JSON with what Python writes and others do not take, too: NaN, half characters, deep nests, large numbers."""
    text = json.dumps(value).replace('"DEEP"', DEEP)
    return text.replace(str(10**30), "9" * 5000)


@st.composite
def damaged_text(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """Text of which, now and then, something is cut off or put in."""
    text = draw(texts)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        put = draw(st.sampled_from(["", "\0", "]", "}", '"', "\n", "\ufeff", "NaN", '"id": 1,', "\\", ","]))
        text = text[:at] + put + draw(st.sampled_from([text[at:], ""]))
    return text


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


DATA = [RECORD, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, RECORD]
data_json = damaged_text(odd_json(DATA).map(spelled)).map(_bytes)
data_lines = damaged_text(st.lists(odd_json(RECORD).map(spelled), min_size=1, max_size=4).map("\n".join)).map(_bytes)
benchmark_files = st.sampled_from(sorted(BENCHMARKS)).flatmap(
    lambda name: damaged_text(odd_json(BENCHMARKS[name][2]).map(spelled)).map(lambda content: (name, content))
)

TARGETS = {
    "dataset JSON": Target(data_json, check_data),
    "dataset JSONL": Target(data_lines, lambda content, folder: check_data(content, folder, ".jsonl")),
    "benchmark JSON": Target(benchmark_files, check_benchmark),
    "descriptions JSON": Target(damaged_text(odd_json(DESCRIPTION).map(spelled)), check_descriptions),
    "COCO JSON": Target(damaged_text(odd_json(COCO).map(spelled)), check_coco),
}
