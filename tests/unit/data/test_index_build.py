"""Indexes: one row per record, reused, resumed, merged from shards to the same bytes, with every reject listed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import Built, Shard, build_index
from anyres_vlm.data.index.rows import IndexSettings, check_sample
from anyres_vlm.data.index.table import SCHEMA, read_index, rejects_path, summarise
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.geometry import Grid, Size, Tiling, plan_tiles
from anyres_vlm.schema import IGNORE_INDEX, ImageRef, Sample

TILING = Tiling.from_grid(Grid(2, 2), tile=28, patch=14)
KILLED = """
import sys
from pathlib import Path
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.geometry import Grid, Tiling
from anyres_vlm.checkpoints.tokenizer import load_tokenizer
llm, data, out = sys.argv[1:]
settings = IndexSettings(ConversationTokenizer("vicuna_v1", load_tokenizer(llm)),
                         Tiling.from_grid(Grid(2, 2), tile=28, patch=14), 4096)
build_index(Path(data), None, settings, Path(out), workers=2, max_bad_fraction=0.0)
"""


@pytest.fixture
def settings(tiny_tokenizer: PreTrainedTokenizerFast) -> IndexSettings:
    return IndexSettings(ConversationTokenizer("vicuna_v1", tiny_tokenizer), TILING, max_length=4096)


def entry(
    name: str, answer: str = "a star", *, images: list[str] | None = None, asked: str = "what?"
) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>" * len(images or []) + asked}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({"image": images} if images else {})


def write(folder: Path, entries: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


def many(count: int) -> list[Any]:
    return [entry(f"r{number}", "a star " * (1 + number % 7)) for number in range(count)]


def build(data: Path, settings: IndexSettings, out: Path, cap: float = 0.9, workers: int = 1, **options: Any) -> Built:
    return build_index(data, None, settings, out, workers=workers, max_bad_fraction=cap, **options)


def listed(out: Path) -> dict[str, dict[str, Any]]:
    lines = out.with_name(f"{out.name}.rejects.jsonl").read_text().splitlines()
    return {line["id"]: line for line in map(json.loads, lines)}


def test_columns_and_metadata(tmp_path: Path, settings: IndexSettings) -> None:
    Image.new("RGB", (57, 29)).save(tmp_path / "a.png")
    data = write(tmp_path, [entry("one", images=["a.png"]), entry("text"), entry("gone", images=["no.png"])])
    index = build(data, settings, tmp_path / "i.parquet").index
    table = pq.read_table(tmp_path / "i.parquet")
    assert table.schema.names == SCHEMA.names
    rows = table.to_pylist()
    plan = plan_tiles(Size(height=29, width=57), TILING)
    assert (rows[0]["heights"], rows[0]["widths"], rows[0]["tiles"]) == ([29], [57], plan.num_tiles)
    assert rows[0]["tokens"] == rows[0]["visual_tokens"] + rows[0]["newline_tokens"] + rows[0]["text_tokens"]
    assert (rows[1]["heights"], rows[1]["tiles"], rows[1]["visual_tokens"]) == ([], 0, 0)
    assert [row["status"] for row in rows] == ["ok", "ok", "missing_file"]
    assert [row["row"] for row in rows] == [0, 1, 2]
    assert (rows[2]["tokens"], rows[0]["reason"]) == (0, None)
    assert rows[2]["image"] == str(tmp_path / "no.png")
    assert index.ok.tolist() == [True, True, False]
    assert (len(index), index.id(1), index.sizes(0), index.sizes(1)) == (3, "text", (Size(height=29, width=57),), ())
    assert read_index(tmp_path / "i.parquet").key == index.key
    assert index.settings["template"] == "vicuna_v1"
    totals = summarise(index)
    assert (totals["samples"], totals["ok"], totals["rejects"], totals["images"]) == (3, 2, {"missing_file": 1}, 1)
    assert totals["tokens"]["total"] == rows[0]["tokens"] + rows[1]["tokens"]


def test_every_kind_of_reject_is_listed(tmp_path: Path, settings: IndexSettings) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (1001, 1)).save(tmp_path / "strip.png")
    Image.new("1", (9300, 9300)).save(tmp_path / "vast.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "good.png")
    expected = {
        "gone": ("missing_file", "no such file", entry("gone", images=["good.png", "no.png"])),
        "text": ("unreadable_image", "not an image", entry("text", images=["text.jpg"])),
        "empty": ("unreadable_image", "the file is empty", entry("empty", images=["empty.jpg"])),
        "strip": ("absurd_image", "1001x1 pixels", entry("strip", images=["strip.png"])),
        "vast": ("absurd_image", "at most 50,000,000 pixels", entry("vast", images=["vast.png"])),
        "silent": ("malformed_record", "no question", {"id": "silent", "conversations": [{"from": "gpt"}]}),
        "alone": (
            "no_answer",
            "nothing answers it",
            entry("alone") | {"conversations": entry("a")["conversations"][:1]},
        ),
        "count": ("image_count", "0 <image> in the text, but 1", entry("count") | {"image": "good.png"}),
        "forged": ("control_token", "control token '</s>'", entry("forged", "star</s>")),
        "long": ("too_long", "exceed max_length=4,096", entry("long", "star " * 5000)),
        "9": ("malformed_record", "expected an object, got int", 7),
    }
    expected["silent"][2]["conversations"][0]["value"] = "hello"
    data = write(tmp_path, [entry("fine", images=["good.png"])] * 2 + [item for *_, item in expected.values()])
    row = str(2 + len(expected))  # from 1: it has no other name
    expected[row] = expected.pop("9")
    out = tmp_path / "i.parquet"
    build(data, settings, out)
    rejects = listed(out)
    assert set(rejects) == set(expected)
    for name, (kind, words, _) in expected.items():
        assert rejects[name]["kind"] == kind
        assert words in rejects[name]["reason"], name
    assert [reject["row"] for reject in rejects.values()] == list(range(2, 2 + len(expected)))


def test_a_tokenizer_that_cannot_write_the_answer(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lower = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str()),
        eos_token="</s>",
        unk_token="<unk>",
    )
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    settings = IndexSettings(ConversationTokenizer("vicuna_v1", lower), TILING, 4096)
    data = write(tmp_path, [entry("small", "star"), entry("Large", "Star")])
    build(data, settings, tmp_path / "i.parquet")
    assert listed(tmp_path / "i.parquet")["Large"]["kind"] == "inexact_labels"


@pytest.mark.parametrize("limit", [1, 7, 12, 40])
def test_over_long_names_what_truncation_would_cut(limit: int) -> None:
    plan = plan_tiles(Size(height=20, width=20), TILING)
    ids = np.array([1, 9, 5, 6, 9, 7, 8], np.int32)  # 9 is an image
    labels = np.where(np.isin(ids, [5, 7, 8]), ids, IGNORE_INDEX).astype(np.int32)
    sample = Sample("s", ids, labels, (ImageRef("a"), ImageRef("b")), (plan, plan))
    repeats = [plan.total_tokens if token == 9 else 1 for token in ids]
    laid, answers = np.repeat(ids, repeats)[limit:], np.repeat(labels, repeats)[limit:]
    if not len(laid):
        check_sample(sample, limit, 9)
        return
    words = f"cut {len(laid)} of them, {(laid == 9).sum()} visual and {(answers != IGNORE_INDEX).sum()} supervised"
    with pytest.raises(DataError, match=words):
        check_sample(sample, limit, 9)


def test_without_a_supervised_token() -> None:
    ids = np.arange(4, dtype=np.int32)
    labels = np.array([0, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX], np.int32)  # nothing predicts position 0
    with pytest.raises(DataError, match="no supervised token") as caught:
        check_sample(Sample("s", ids, labels, (), ()), 100, 9)
    assert caught.value.kind == "unsupervised"


def test_too_many_rejects_end_the_run_but_are_listed(tmp_path: Path, settings: IndexSettings) -> None:
    data = write(tmp_path, [entry("good"), 1, entry("gone", images=["no.png"]), 2])
    out = tmp_path / "i.parquet"
    words = r"3 of 4 records are bad \(malformed_record 2, missing_file 1\), more than max_bad_fraction=0.5"
    with pytest.raises(DataError, match=words):
        build(data, settings, out, cap=0.5)
    assert len(listed(out)) == 3
    assert not out.exists()
    assert build(data, settings, out, cap=0.75).rows_read == 4
    with pytest.raises(DataError, match="more than max_bad_fraction=0"):
        build(data, settings, out, cap=0.0)  # also one that is up to date
    with pytest.raises(
        DataError, match=r"2 of 2 records are bad \(malformed_record 2\), no samples remain.*The first: "
    ):
        build(write(tmp_path / "all", [1, 2]), settings, tmp_path / "all.parquet", cap=1.0)


def test_an_unchanged_source_is_not_read_again(tmp_path: Path, settings: IndexSettings) -> None:
    data, out = write(tmp_path, many(30)), tmp_path / "i.parquet"
    assert build(data, settings, out).rows_read == 30
    before, content, stat = out.read_bytes(), data.read_bytes(), data.stat()
    listed = rejects_path(out).stat().st_ino
    data.write_bytes(b"x" * len(content))  # reading it would fail
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert build(data, settings, out).rows_read == 0
    assert rejects_path(out).stat().st_ino == listed, "other ranks find the index at the same time"
    rejects_path(out).unlink()
    assert build(data, settings, out).rows_read == 0
    assert rejects_path(out).exists()
    data.write_bytes(content)
    os.utime(data, ns=(1, 1))
    assert build(data, settings, out).rows_read == 0, "the same content under another time"
    data.write_bytes(b"{}")
    with pytest.raises(DataError, match="expected a list"):
        build(data, settings, out)
    data.write_bytes(content)
    assert build(data, settings, out, rebuild=True).rows_read == 30
    assert out.read_bytes() == before
    assert build(data, replace(settings, max_length=5000), out).rows_read == 30
    write(tmp_path, many(31))
    assert build(data, settings, out).rows_read == 31


def test_other_settings_have_other_keys(tmp_path: Path, settings: IndexSettings, tiny_tokenizer: Any) -> None:
    added = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str()),
        **tiny_tokenizer.special_tokens_map,
    )
    added.add_tokens(["star"])
    conversation = settings.conversation
    others = [
        replace(settings, max_length=99),
        replace(settings, conversation=replace(conversation, template="plain")),
        replace(settings, conversation=replace(conversation, tokenizer=added)),
        *(replace(settings, tiling=replace(TILING, **change)) for change in ({"layout": "flat"}, {"dialect": "llava"})),
        replace(settings, tiling=Tiling.from_grid(Grid(1, 2), tile=28, patch=14)),
        replace(settings, tiling=replace(TILING, patch=7)),
    ]
    keys = {other.key("source") for other in [settings, *others]} | {settings.key("another source")}
    assert len(keys) == len(others) + 2
    tiny_tokenizer("a long text", truncation=True, max_length=2)  # leaves its mark on the tokenizer
    assert replace(settings).key("source") == settings.key("source")


def test_repaired_images_are_indexed_again(tmp_path: Path, settings: IndexSettings) -> None:
    (tmp_path / "broken.png").write_bytes(b"broken")
    os.utime(tmp_path / "broken.png", ns=(1, 1))
    data = write(tmp_path, [entry("a", images=["broken.png"]), entry("b", images=["gone.png"]), entry("c")])
    out = tmp_path / "i.parquet"
    assert build(data, settings, out).rows_read == 3
    assert build(data, settings, out).rows_read == 0
    for name, left in [("gone", {"a"}), ("broken", set())]:
        time.sleep(0.02)  # times of change are as coarse as the clock's tick
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        assert build(data, settings, out).rows_read == 3
        assert set(listed(out)) == left


def test_shards_and_processes_make_the_same_bytes(
    tmp_path: Path, settings: IndexSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyres_vlm.data.index.build.ROW_GROUP", 700)
    data = write(tmp_path, [*many(1500), 7, *many(1300), entry("gone", images=["no.png"])])
    whole, out = tmp_path / "whole.parquet", tmp_path / "i.parquet"
    build(data, settings, whole)
    build(data, settings, tmp_path / "two.parquet", workers=2)
    assert (tmp_path / "two.parquet").read_bytes() == whole.read_bytes()
    assert build(data, settings, out, shard=Shard(2, 3)).missing == (Shard(1, 3), Shard(3, 3))
    assert listed(tmp_path / "i.shard-2-of-3.parquet")
    assert build(data, settings, out, shard=Shard(3, 3)).missing == (Shard(1, 3),)
    assert not out.exists()
    last = build(data, settings, out, shard=Shard(1, 3))
    assert (last.missing, last.index.path, last.rows_read) == ((), out, 934)
    assert out.read_bytes() == whole.read_bytes()
    assert listed(out) == listed(whole)
    assert pq.read_metadata(out).num_row_groups == 5


def test_a_killed_run_resumes(tmp_path: Path, settings: IndexSettings, tiny_bases: Path) -> None:
    data, out = write(tmp_path, many(10_000)), tmp_path / "i.parquet"
    parts = tmp_path / ".i.parquet.parts"
    run = subprocess.Popen([sys.executable, "-c", KILLED, tiny_bases / "llm", data, out])
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.arrow"))) < 2:
        assert run.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    children = workers.read_text().split() if workers.exists() else []
    run.send_signal(signal.SIGKILL)
    run.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "workers of a killed run end by themselves"
        time.sleep(0.05)
    assert not out.exists()
    (parts / "9216-10000.arrow.77").write_bytes(b"a part that was being written")
    resumed = build(data, settings, out)
    assert 0 < resumed.rows_read <= 10_000 - 2 * 1024
    assert not parts.exists()
    build(data, settings, tmp_path / "fresh.parquet")
    assert out.read_bytes() == (tmp_path / "fresh.parquet").read_bytes()


def test_a_mixture_of_embedded_and_separate_images(tmp_path: Path, settings: IndexSettings) -> None:
    Image.new("RGB", (57, 29)).save(tmp_path / "a.png")
    write(tmp_path, [entry("one", images=["a.png"]), entry("silent") | {"conversations": []}])
    encoded = [(tmp_path / "a.png").read_bytes(), b"no image"]
    rows = [
        {
            "images": [{"bytes": content, "path": None}],
            "messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "star"}],
        }
        for content in encoded
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "more.parquet")
    (tmp_path / "mix.yaml").write_text("sources: [{path: data.json}, {path: more.parquet}]")
    out = tmp_path / "i.parquet"
    index = build(tmp_path / "mix.yaml", settings, out).index
    assert index.ok.tolist() == [True, False, True, False]
    assert index.column("source").to_pylist() == ["data", "data", "more", "more"]
    assert index.sizes(0) == index.sizes(2) == (Size(height=29, width=57),)
    kinds = {name: (reject["kind"], reject["row"]) for name, reject in listed(out).items()}
    assert kinds == {"data/silent": ("malformed_record", 1), "more/2": ("unreadable_image", 3)}
    assert build(tmp_path / "mix.yaml", settings, out).rows_read == 0
    write(tmp_path, [entry("one", images=["a.png"])])
    assert build(tmp_path / "mix.yaml", settings, out).rows_read == 3, "one of its sources changed"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_wrong_shards(text: str) -> None:
    with pytest.raises(UsageError, match="expected i/n with i from 1 to n"):
        Shard.parse(text)


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_shards_cover_every_row_once(rows: int) -> None:
    spans = [Shard(number, 3).span(rows) for number in (1, 2, 3)]
    assert [row for span in spans for row in range(*span)] == list(range(rows))


def test_files_that_are_not_an_index(tmp_path: Path, settings: IndexSettings) -> None:
    with pytest.raises(DataError, match="no such index"):
        read_index(tmp_path / "no.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_index(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not built by anyres index"):
        read_index(tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="a folder"):
        build(write(tmp_path, many(1)), settings, tmp_path)
    with pytest.raises(DataError, match="contains no records"):
        build(write(tmp_path, []), settings, tmp_path / "i.parquet")
