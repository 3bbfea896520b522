"""The page of `anyres report`: its content, the escaping of texts, and missing data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_files import mark, write_heldout, write_result

from anyres_vlm.cli.main import main
from anyres_vlm.evaluate.probes.cases import Reply
from anyres_vlm.evaluate.probes.suite import PROBES, THUMBNAIL

HOSTILE = "<script>alert(1)</script> \"><img src=x onerror=alert(2)> ' {{ 7 * 7 }} | **b** [l](javascript:x) `c`"
HOSTILE += "\n# h\x00\u202e"


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def report(out: Path, *runs: Path, more: tuple[str, ...] = ()) -> Page:
    assert main(["report", *map(str, runs), "--out", str(out), *more]) == 0
    return Page(out)


def test_a_page_of_two_runs(tmp_path: Path) -> None:
    for seed in range(10):
        Image.new("RGB", (40, 90), (seed * 20, 80, 90)).save(tmp_path / f"{seed}.png")
    for name, every in (("first", 2), ("second", 3)):
        marks = [
            mark(n, float(n % every == 0), image=str(tmp_path / f"{n // 2}.png"), kinds=[["attr", "rel"][n // 10]])
            for n in range(20)
        ]
        write_result(tmp_path / name, "gqa", marks)
    page = report(tmp_path / "report.html", tmp_path / "first", tmp_path / "second")
    assert "LLaVA-1.6-Vicuna-7B 64.2" in page.text
    assert "20 questions; the whole benchmark has 12,578" in page.text
    assert "second minus first: -15.0 points" in page.text
    # Of 20: both right 4 (multiples of 6), the second alone 3 (3, 9, 15), the first alone 6.
    assert "Of 20 common questions 3 improved, 6 got worse, 11 did not change." in page.text
    assert "attr 10 50.0 40.0 -10.0" in page.text
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 6 + 6 + 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    assert not [attrs for tag, attrs in page.tags if tag in ("script", "link") or "href" in attrs], "self-contained"
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| LLaVA-1.6-Vicuna-7B | 64.2 |" in markdown
    assert re.search(r"\| second \(models/second\) \| 35\.0 ± [\d.]+ \\\* \|", markdown)
    assert "### second minus first: -15.0 points" in markdown
    again = (tmp_path / "report.html").read_bytes()
    report(tmp_path / "report.html", tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "report.html").read_bytes() == again


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    marks = [
        mark(n, 0.0, question=HOSTILE, text=HOSTILE + "x" * 2000, reference=HOSTILE, image=HOSTILE, kinds=[HOSTILE])
        for n in range(3)
    ]
    protocol = {HOSTILE: HOSTILE, "ocr_tokens": HOSTILE}
    run = write_result(tmp_path / "a", "textvqa", marks, model=HOSTILE, protocol=protocol)
    other = write_result(tmp_path / "b", "textvqa", [mark(n, 1.0, reference=HOSTILE, kinds=[]) for n in range(3)])
    page = report(tmp_path / "page.html", run, other)
    assert {tag for tag, _ in page.tags} <= set(
        "html head meta title style main h1 h2 h3 p b u i strong section div dl dt dd table tr th td br span details "
        "summary bdi body".split()
    )
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "(2,1" in page.text, "a long answer says how long it is"
    raw = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not set("\x00\u202e") & set(raw)
    markdown = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert not set("\x00\u202e") & set(markdown)
    tables = [[line for line in block.splitlines() if line[0] == "|"] for block in markdown.split("\n\n")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) <= 1, "rows are as wide as their head"
    assert sum(map(len, tables)) > 20
    assert "\\*\\*b\\*\\*" in markdown


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("gone/1.png", "no image: gone/1.png"),
        ("", "the image was not recorded"),
        ("broken.png", "no image: "),
    ],
)
def test_pictures_that_cannot_be_shown(image: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    image = str(tmp_path / image) if image == "broken.png" else image
    run = write_result(tmp_path, "gqa", [mark(1, 0.0, image=image), mark(2, 1.0)])
    page = report(tmp_path / "r.html", run)
    assert said in page.text
    assert "What is 1?" in page.text
    assert "img" not in {tag for tag, _ in page.tags}


def test_pictures_are_found_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "moved" / "1.png")
    run = write_result(tmp_path, "gqa", [mark(1, 0.0, image="/elsewhere/1.png")], tiling=None)
    page = report(tmp_path / "r.html", run, more=("--images", str(tmp_path / "moved")))
    assert "img" in {tag for tag, _ in page.tags}
    assert "no tiles drawn" in page.text


def test_one_bare_result_and_mixed_runs(tmp_path: Path) -> None:
    bare = write_result(tmp_path / "bare", "pope", [mark(n, n % 2) for n in range(6)], score=None, scores={})
    (bare.parent / "pope.marks.jsonl").unlink()
    alike = write_result(tmp_path / "alike", "mmvet", [mark(n, 0.0, text="", question="") for n in range(9)])
    empty = write_result(tmp_path / "empty", "vqav2", [], score=None)
    (empty.parent / "vqav2.marks.jsonl").unlink()
    blind = write_heldout(tmp_path / "blind.json", [True, False, False, False] * 5, blind=True)
    seen = write_heldout(tmp_path / "seen.json", [True, True, True, False] * 5)
    page = report(tmp_path / "r.html", bare, alike, empty, blind, seen)
    assert "all images have equal points" in page.text
    assert "(rule of three)" in page.text
    assert "(empty)" in page.text
    assert "no score: no answers or no judge" in page.text
    assert "the result has no marks.jsonl" in page.text
    assert "seen minus blind: +50.0 points" in page.text
    assert "different image shown: blind: another question's (blind); seen: its own" in page.text


def test_pope_shows_its_share_of_yes(tmp_path: Path) -> None:
    marks = [mark(n, n % 2, text=["yes", "no"][n % 3 > 0], reference="yes", kinds=["random"]) for n in range(30)]
    rates = {"accuracy": 1 / 3, "precision": 1.0, "recall": 1 / 3, "f1": 0.5, "yes_ratio": 1 / 3}
    page = report(tmp_path / "r.html", write_result(tmp_path, "pope", marks, score=50.0, scores={"random": rates}))
    assert "random 33.3 100.0 33.3 50.0 33.3" in page.text
    assert "splits random; published scores are the mean of three" in page.text
    assert "below 66.7, the score without the image" in page.text


def test_one_picture_has_no_interval(tmp_path: Path) -> None:
    page = report(tmp_path / "r.html", write_result(tmp_path, "gqa", [mark(n, n % 2, image="a") for n in range(9)]))
    assert "no interval: it needs at least two images" in page.text


def probe_file(folder: Path) -> Path:
    """A model that says yes, counts one, and reads tall words with tiles."""
    cases = list(PROBES["reading"].cases(168, 1, 0))
    words = ["" if case.facts["height"] < 10 else case.answer for case in cases]
    answered = {
        "hallucination": (3, lambda case: "yes"),
        "spatial": (2, lambda case: case.answer),
        "counting": (2, lambda case: "1"),
    }
    replies = {
        name: [Reply(c.question, c.answer, c.facts, say(c)) for c in PROBES[name].cases(168, count, 0)]
        for name, (count, say) in answered.items()
    }
    replies["reading"] = [Reply(c.question, c.answer, c.facts, w) for c, w in zip(cases, words, strict=True)]
    replies[THUMBNAIL] = [Reply(c.question, c.answer, c.facts, "") for c in cases]
    scores = {name: PROBES[name.split(",")[0]].score(several) for name, several in replies.items()}
    content = {"model": "m", "count": 1, "seed": 0, "scores": scores}
    content["replies"] = {name: [vars(reply) for reply in several] for name, several in replies.items()}
    folder.mkdir()
    (folder / "probes.json").write_text(json.dumps(content))
    return folder


def test_probes_on_one_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = report(tmp_path / "r.html", probe_file(tmp_path / "probes"))
    assert "share of yes minus the true share of 50 6 50.0 all equal" in page.text
    assert "swap test: both orders correct 8 100.0 all equal" in page.text
    assert "objects counted correctly 24 8.3" in page.text
    cases = list(PROBES["reading"].cases(168, 1, 0))
    tall = 100 * sum(case.facts["height"] >= 10 for case in cases) / len(cases)
    assert f"words: tiles minus thumbnail only, same images {len(cases)} {tall:.1f}" in page.text
    assert [attrs["src"][:22] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,"]
    assert "| words read, thumbnail only |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["none"], 1, "none: no such file or folder"),
        (["x.json"], 1, "not a result; expected a file written by anyres eval"),
        (["x.json", "--out", "r.pdf"], 2, "expected a name ending in .html"),
        (["x.json", "--images", "none"], 2, "no such folder"),
        (["p.json"], 1, "not a file of this version's anyres probe"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, status, said, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("{}")
    Path("p.json").write_text('{"scores": {}, "replies": {"reading": [{"said": 1}]}}')
    assert main(["report", *arguments]) == status
    told = capsys.readouterr().err.strip()
    assert said in told
    assert "\n" not in told
