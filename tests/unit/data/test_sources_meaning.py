"""What real files hold, in every kind of source: used as LLaVA uses it, or a counted reject, never silence."""

from __future__ import annotations

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from anyres_vlm.data.sources import open_source
from anyres_vlm.data.sources.record import DROPPED_TURN
from anyres_vlm.errors import DataError
from anyres_vlm.schema import Record, Turn

KINDS = ["json", "jsonl", "parquet", "tar", "mixture"]
ANSWERED = (Turn("user", "Q"), Turn("assistant", "A"))


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": said(("human", "Q"), ("gpt", "A"))} | changes


def png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    archive.addfile(header, BytesIO(content))


def read(folder: Path, kind: str, content: dict[str, Any]) -> Record | DataError:
    """The one record of a source of this kind with this content."""
    if kind == "tar":
        with tarfile.open(folder / "data.tar", "w") as archive:
            add(archive, "r.json", json.dumps(content).encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([content]), folder / "data.parquet")
    elif kind == "mixture":
        (folder / "one.json").write_text(json.dumps([content]))
        (folder / "data.yaml").write_text("sources: [{path: one.json}]")
        kind = "yaml"
    else:
        (folder / f"data.{kind}").write_text(json.dumps([content] if kind == "json" else content))
    source = open_source(folder / f"data.{kind}")
    (item,) = source.records(0, 1)
    if isinstance(item, DataError):
        with pytest.raises(DataError, match=re.escape(str(item))):
            source.record(0)
    else:
        assert source.record(0) == item
    return item


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "reject"),
    [
        ({"video": "a.mp4"}, "video"),
        ({"videos": ["a.mp4"]}, "video"),
        ({"audio": "a.wav"}, "audio"),
        ({"audios": ["a.wav"]}, "audio"),
        ({"tools": [{"name": "search"}]}, "tools"),
        ({"tools": '[{"name": "search"}]'}, "tools"),
        ({"tool_calls": [{"name": "search"}]}, "tools"),
        ({"function_call": {"name": "search"}}, "tools"),
        ({"conversations": said(("human", "<video>\nQ"), ("gpt", "A"))}, "video"),
        ({"conversations": said(("human", "Q"), ("gpt", "A"), ("human", "and <audio>?"), ("gpt", "A"))}, "audio"),
        ({"conversations": said(("human", "Q"), ("function_call", "f()"), ("gpt", "A"))}, "tools"),
        ({"conversations": said(("human", "Q"), ("observation", "3"), ("gpt", "A"))}, "tools"),
        ({"system": "Look at <video>."}, "video"),
        ({"video_path": "a.mp4"}, "video"),
        ({"videoPaths": ["a.mp4"]}, "video"),
        ({"video_1": "a.mp4"}, "video"),
        ({"Video": {"bytes": b"x".decode(), "path": None}}, "video"),
        ({"audio_path": "a.wav"}, "audio"),
        ({"audio_urls": ["https://a.wav"]}, "audio"),
        ({"sound": "a.wav"}, "audio"),
        ({"tool": "search"}, "tools"),
        ({"functions": [{"name": "search"}]}, "tools"),
        ({"toolCalls": [{"name": "search"}]}, "tools"),
        ({"conversations": said(("human", "<|video_pad|>\nQ"), ("gpt", "A"))}, "video"),
        ({"conversations": said(("human", "<Audio_1> Q"), ("gpt", "A"))}, "audio"),
        ({"conversations": said(("human", "<video /> Q"), ("gpt", "A"))}, "video"),
        ({"conversations": said(("human", "Q"), ("tool_response", "3"), ("gpt", "A"))}, "tools"),
        ({"conversations": None, "texts": [{"user": "Q", "assistant": "A", "video_path": "a.mp4"}]}, "video"),
    ],
)
def test_what_cannot_be_used_is_a_reject_of_its_kind(
    tmp_path: Path, kind: str, changes: dict[str, Any], reject: str
) -> None:
    item = read(tmp_path, kind, entry(**changes))
    assert isinstance(item, DataError)
    assert item.kind == reject
    assert "not supported" in str(item)


NEW_KEYS = ["video_path", "audios", "functions", "system_message", "image_path"]


@pytest.mark.parametrize("kind", ["json", "parquet", "tar"])
@pytest.mark.parametrize("key", ["image_path", "imagePaths", "Image", "image_1", "img", "image_url"])
def test_images_under_another_key_are_a_reject_unless_the_record_has_images(
    tmp_path: Path, kind: str, key: str
) -> None:
    item = read(tmp_path, kind, entry(**{key: "a.png"}))
    assert isinstance(item, DataError)
    assert (item.kind, f"it has {key!r}: list all images" in str(item)) == ("image_count", True)
    if kind != "tar":
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        turns = said(("human", "<image>"), ("gpt", "A"))
        kept = read(tmp_path, kind, entry(image="a.png", conversations=turns, **{key: "elsewhere.png"}))
        assert isinstance(kept, Record)
        assert len(kept.images) == 1


def test_the_metadata_of_a_caption_counts_as_well(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "r.json", json.dumps({"url": "https://x", "video_path": "a.mp4"}).encode())
        add(archive, "r.png", png())
        add(archive, "r.txt", b"A cat.")
    (item,) = open_source(tmp_path / "a.tar").records(0, 1)
    assert isinstance(item, DataError)
    assert item.kind == "video"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["video", "videos", "audio", "tools", "system", "image", "images", *NEW_KEYS])
@pytest.mark.parametrize("value", [None, "", [], float("nan"), "none"])
def test_values_of_nothing_are_nothing(tmp_path: Path, kind: str, key: str, value: Any) -> None:
    item = read(tmp_path, kind, entry(**{key: value}))
    assert isinstance(item, Record)
    assert (item.turns, item.images, item.system, item.changes) == (ANSWERED, (), "", ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"system": " Be brief.\n"},
        {"system_prompt": "Be brief."},
        {"system_message": "Be brief."},
        {"systemPrompt": "Be brief."},
        {"sys_prompt": "Be brief.", "video_path": ""},
        {"conversations": said(("developer", "Be brief."), ("human", "Q"), ("gpt", "A"))},
        {"system": "Be brief.", "system_prompt": "Be brief."},
        {"conversations": said(("system", "Be brief."), ("human", "Q"), ("gpt", "A"))},
        {"system": "Be brief.", "conversations": said(("system", ""), ("human", "Q"), ("gpt", "A"))},
    ],
)
def test_system_texts_are_read(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    item = read(tmp_path, kind, entry(**changes))
    assert isinstance(item, Record)
    assert (item.system, item.turns, item.changes) == ("Be brief.", ANSWERED, ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"system": "a", "system_prompt": "b"}, "two different system texts"),
        ({"system": "a", "conversations": said(("system", "b"), ("human", "Q"), ("gpt", "A"))}, "two different"),
        ({"system": 5}, "expected text under 'system', got int"),
        ({"conversations": said(("human", "Q"), ("system", "b"), ("gpt", "A"))}, "a system turn must be the first"),
        ({"conversations": said(("system", "b"))}, "no question"),
        ({"conversations": said(("gpt", "b"))}, "no question"),
        ({"conversations": said(("gpt", "b"), ("gpt", "c"), ("human", "Q"), ("gpt", "A"))}, "expected the user"),
        ({"conversations": said(("human", "Q"), ("human", "Q"), ("gpt", "A"))}, "expected the assistant, got 'human'"),
    ],
)
def test_conversations_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    item = read(tmp_path, "json", entry(**changes))
    assert isinstance(item, DataError)
    assert reason in str(item)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opening", [[], [("system", "Be brief.")]])
def test_a_leading_assistant_turn_is_dropped_and_told(
    tmp_path: Path, kind: str, opening: list[tuple[str, str]]
) -> None:
    turns = said(*opening, ("gpt", "Hello!"), ("human", "Q"), ("gpt", "A"))
    item = read(tmp_path, kind, entry(conversations=turns))
    assert isinstance(item, Record)
    assert (item.turns, item.changes) == (ANSWERED, (DROPPED_TURN,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user", ["user", "human", "Human", " USER "])
@pytest.mark.parametrize("assistant", ["assistant", "gpt", "model", "bot", "chatgpt", "Assistant"])
def test_words_for_the_roles(tmp_path: Path, kind: str, user: str, assistant: str) -> None:
    item = read(tmp_path, kind, entry(conversations=said((user, "Q"), (assistant, "A"))))
    assert isinstance(item, Record)
    assert item.turns == ANSWERED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize("words", [("from", "value"), ("role", "content"), ("role", "value"), ("from", "content")])
def test_either_layout_of_turns_under_either_key(tmp_path: Path, kind: str, key: str, words: tuple[str, str]) -> None:
    turns = [dict(zip(words, turn, strict=True)) for turn in (("human", "Q"), ("gpt", "A"))]
    item = read(tmp_path, kind, {"id": "r", key: turns})
    assert isinstance(item, Record)
    assert item.turns == ANSWERED


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "mixture"])
def test_content_as_parts(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Q"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    item = read(tmp_path, kind, {"id": 7, "image": "a.png", "messages": messages})
    assert isinstance(item, Record)
    assert item.turns == (Turn("user", "<image>\nQ"), Turn("assistant", "A"))
    assert item.id.removeprefix("one/") == "7"


@pytest.mark.parametrize(
    ("part", "reject"),
    [
        ({"type": "video", "video": "a.mp4"}, "video"),
        ({"type": "input_audio"}, "audio"),
        ({"type": "tool_use"}, "tools"),
        ({"type": "image_url", "image_url": {"url": "https://x"}}, "remote_image"),
    ],
)
def test_parts_that_cannot_be_used(tmp_path: Path, part: dict[str, Any], reject: str) -> None:
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A"}]
    item = read(tmp_path, "json", {"messages": messages})
    assert isinstance(item, DataError)
    assert item.kind == reject


@pytest.mark.parametrize(
    ("extra", "reject"),
    [
        ({"tool_calls": [{"id": 1}]}, "tools"),
        ({"video_url": "a.mp4"}, "video"),
        ({"image": "a.png"}, "image_count"),
        ({"image_path": "a.png"}, "image_count"),
        ({"system_prompt": "Be brief."}, "system"),
    ],
)
def test_turns_that_hold_more_than_text(tmp_path: Path, extra: dict[str, Any], reject: str) -> None:
    turns = said(("human", "Q"), ("gpt", "A"))
    item = read(tmp_path, "json", entry(conversations=[turns[0] | extra, turns[1]]))
    assert isinstance(item, DataError)
    assert item.kind == reject
    empty = dict.fromkeys(extra)
    assert isinstance(read(tmp_path, "json", entry(conversations=[turns[0] | empty, turns[1]])), Record)


@pytest.mark.parametrize("key", ["weight", "loss", "train", "training"])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_answers_that_are_not_to_be_learnt_are_a_reject(tmp_path: Path, kind: str, key: str) -> None:
    turns: list[dict[str, Any]] = [*said(("human", "Q"), ("gpt", "A"), ("human", "Q"), ("gpt", "B"))]
    trained: Any = 1 if key == "weight" else True
    values = [trained - 1 if key == "weight" else False, None if kind == "json" else trained, trained]
    for value, is_kept in zip(values, (False, True, True), strict=True):
        weights = [{key: type(trained)(0)}, {key: value}, {key: type(trained)(0)}, {key: trained}]
        item = read(
            tmp_path, kind, entry(conversations=[turn | more for turn, more in zip(turns, weights, strict=True)])
        )
        assert isinstance(item, Record) == is_kept
        assert is_kept or (isinstance(item, DataError) and item.kind == "unsupervised")


def test_html_in_an_answer_is_text(tmp_path: Path) -> None:
    item = read(tmp_path, "json", entry(conversations=said(("human", "Q"), ("gpt", "Use <video> or <audio>."))))
    assert isinstance(item, Record)


def test_empty_structs_of_parquet_are_no_image(tmp_path: Path) -> None:
    image = pa.array([{"bytes": None, "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    turns = pa.array([entry()["conversations"]])
    pq.write_table(pa.table({"image": image, "video": image, "conversations": turns}), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").record(0).images == ()


@pytest.mark.parametrize(("suffix", "reject"), [("mp4", "video"), ("cam.webm", "video"), ("WAV", "audio")])
def test_videos_and_sounds_in_a_tar(tmp_path: Path, suffix: str, reject: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "r.json", json.dumps(entry()).encode())
        add(archive, f"r.{suffix}", b"x")
    (item,) = open_source(tmp_path / "a.tar").records(0, 1)
    assert isinstance(item, DataError)
    assert item.kind == reject


def test_sidecars_in_a_tar_and_a_folder_of_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("Thumbs.db", "a/desktop.ini", "a/.DS_Store", "__MACOSX/a/r.json", "a/._r.png"):
            add(archive, name, b"junk")
        add(archive, "a/r.png", png())
        add(archive, "a/._r.json", b"junk")
        add(archive, "a/r.json", json.dumps(entry(conversations=said(("human", "<image>"), ("gpt", "A")))).encode())
    (tmp_path / "._a.tar").write_bytes(b"junk")
    with caplog.at_level("INFO"):
        source = open_source(tmp_path)
    assert [len(record.images) for record in source.records(0, len(source)) if isinstance(record, Record)] == [1]
    assert len(source) == 1
    assert "6 files of macOS or Windows" in caplog.text
    assert "1 files of macOS or Windows" in caplog.text


LINES = [entry(id=n) for n in range(3)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LINES),
        json.dumps(LINES, indent=2),
        "\n".join(map(json.dumps, LINES)) + "\n",
        "\n\n" + "\n \n".join(map(json.dumps, LINES)),
    ],
)
def test_the_content_decides_between_a_list_and_lines(tmp_path: Path, name: str, bom: str, end: str, text: str) -> None:
    (tmp_path / name).write_bytes((bom + text.replace("\n", end)).encode())
    source = open_source(tmp_path / name)
    assert [record.id for record in source.records(0, len(source)) if isinstance(record, Record)] == ["0", "1", "2"]
    assert source.record(2).id == "2"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "\n".join(json.dumps(line, indent=2) for line in LINES), "several objects one after another"),
        ("a.jsonl", "\n".join(json.dumps(line, indent=2) for line in LINES), "an object over several lines: .*jq -c"),
        ("a.jsonl", json.dumps(LINES[0], indent=2), "an object over several lines"),
        ("a.json", json.dumps({"data": LINES}), "expected a list of records, got dict"),
        ("a.json", json.dumps(LINES).encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
)
def test_layouts_that_are_neither_say_so(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)
