"""`anyres index` as a person and a script use it, and the page it draws."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import CLIPVisionModel

from anyres_vlm.checkpoints.bases import load_encoder
from anyres_vlm.checkpoints.describe import encoder_geometry
from anyres_vlm.cli.main import main
from anyres_vlm.config import EncoderConfig
from anyres_vlm.errors import DataError, UsageError

FORGED = "<script>alert('id')</script>"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    entries: list[Any] = []
    for number in range(40):
        Image.new("RGB", (20 + 9 * number, 90)).save(tmp_path / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a star " * (number + 1)}]
        entries.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    entries.append({"id": FORGED, "image": "gone.png", "conversations": turns})
    entries.append(
        {"id": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "star"}]}
    )
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json"


def anyres(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def index(data: Path, *more: object) -> int:
    common = ("index", data, "--images", data.parent / "images", "--out", data.parent / "i.parquet", "--workers", 1)
    return anyres(*common, "--max-bad-fraction", "0.1", *more)


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    printed = json.loads(capsys.readouterr().out)
    assert isinstance(printed, dict)
    return printed


def test_summary_adds_up_and_follows_the_options(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(data, "--json") == 0
    first = summary(capsys)
    rows = [row for row in pq.read_table(data.parent / "i.parquet").to_pylist() if row["status"] == "ok"]
    assert (first["samples"], first["ok"], first["rejects"], first["images"]) == (42, 41, {"missing_file": 1}, 40)
    assert first["tokens"]["total"] == sum(row["tokens"] for row in rows)
    assert first["tokens"]["max"] == max(row["tokens"] for row in rows)
    assert first["tokens"]["total"] == sum(first[f"{part}_tokens"] for part in ("visual", "newline", "text"))
    assert first["images_per_second"] > 0
    assert index(data, "--json") == 0
    again = summary(capsys)
    assert (again["rows_read"], again["images_per_second"], again["key"]) == (0, None, first["key"])
    assert index(data, "--json", "--grid", "1x1") == 0
    thumbnails = summary(capsys)
    assert (thumbnails["tiles"], thumbnails["newline_tokens"]) == (40, 0)
    assert index(data, "--json", "--layout", "flat", "--stage", "1") == 0
    assert summary(capsys)["key"] not in (first["key"], thumbnails["key"])
    assert index(data) == 0
    printed = capsys.readouterr()
    assert "samples:  41 of 42, 40 images" in printed.out
    assert "rejects:  1 (missing_file 1)" in printed.out
    assert printed.err == ""


def test_shards_say_what_they_wait_for(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(data, "--shard", "1/2", "--json") == 0
    assert summary(capsys)["missing_shards"] == ["2/2"]
    assert index(data, "--shard", "2/2", "--json") == 0
    whole = summary(capsys)
    assert (whole["missing_shards"], whole["samples"]) == ([], 42)
    assert whole["index"] == str(data.parent / "i.parquet")


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (
            ["--max-bad-fraction", "0.01"],
            1,
            "1 of 42 records are bad (missing_file 1), more than max_bad_fraction=0.01",
        ),
        (["--shard", "0/2"], 2, "shard '0/2': expected i/n with i from 1 to n"),
        (["--grid", "2"], 2, "grid '2': expected ROWSxCOLUMNS"),
        (["--config", "no.yaml"], 2, "config no.yaml: no such file"),
        (["--workers", "0"], 2, "--workers"),
    ],
)
def test_what_is_wrong_is_one_line(
    data: Path, capsys: pytest.CaptureFixture[str], more: list[str], status: int, message: str
) -> None:
    assert index(data, *more) == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (data.parent / "i.parquet").exists()
    assert (data.parent / "i.parquet.rejects.jsonl").exists() == (status == 1)


class Page(HTMLParser):
    """Tags, sources and text of a page; fails on tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, words: str) -> None:
        self.words += words


def test_report_is_one_page_that_needs_nothing_else(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index(data, "--report") == 0
    page = Page((data.parent / "i.parquet.report.html").read_text(encoding="utf-8"))
    pictures = {path.name: path.read_bytes() for path in data.parent.glob("i.parquet.report-*.png")}
    names = {re.sub(r".*report-|\.png", "", name) for name in pictures}
    assert names == {"tokens", "parts", "tiles", "aspects", "supervised", "rejects"}
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    assert sorted(embedded) == sorted(pictures.values())
    for content in embedded:
        with Image.open(BytesIO(content)) as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10, "not a blank sheet"
    assert FORGED in page.words, "an id is text, never markup"
    for words in ("41", "missing file", "gone.png: no such file", "r39", "371x90"):
        assert words in page.words
    before = (data.parent / "i.parquet").stat().st_mtime_ns
    (data.parent / "i.parquet.report.html").unlink()
    assert index(data, "--report") == 0
    assert (data.parent / "i.parquet.report.html").exists()
    assert (data.parent / "i.parquet").stat().st_mtime_ns == before, "drawn from the index that is there"


def test_report_without_matplotlib_names_the_extra(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyres_vlm.data.index.report.find_spec", lambda name: None)
    assert index(data, "--report") == 2
    assert "pip install 'anyres-vlm[demo]'" in capsys.readouterr().err
    assert not (data.parent / "i.parquet").exists()


def test_report_of_text_alone(data: Path) -> None:
    data.write_text(json.dumps(json.loads(data.read_text())[-1:]))
    assert index(data, "--report") == 0
    page = Page((data.parent / "i.parquet.report.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 4
    assert "text only" in page.words


def test_encoder_geometry_without_weights(tiny_bases: Path, tmp_path: Path) -> None:
    clip = EncoderConfig(name=str(tiny_bases / "vit"))
    encoder = load_encoder(clip)
    assert encoder_geometry(clip) == (encoder.tile, encoder.patch) == (28, 14)
    CLIPVisionModel.from_pretrained(tiny_bases / "vit").config.save_pretrained(tmp_path)
    assert encoder_geometry(EncoderConfig(name=str(tmp_path))) == (28, 14), "the folder has no weights"
    timm = EncoderConfig(kind="timm", name="vit_tiny_patch16_224")
    assert encoder_geometry(timm) == (224, 16)
    assert encoder_geometry(timm.model_copy(update={"tile": 112})) == (112, 16)
    with pytest.raises((DataError, UsageError), match="nowhere"):
        encoder_geometry(EncoderConfig(name=str(tmp_path / "nowhere")))
