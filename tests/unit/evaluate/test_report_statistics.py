"""Intervals, differences and caveats of a report, against closed forms and brute force."""

from __future__ import annotations

from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest
from report_files import mark, write_heldout, write_result

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.benchmarks.base import Mark
from anyres_vlm.evaluate.benchmarks.pope import yes_no_rates
from anyres_vlm.evaluate.report.published import caveats, run_differences
from anyres_vlm.evaluate.report.results import Result, read_runs
from anyres_vlm.evaluate.report.statistics import (
    DRAWS,
    compare,
    draw,
    interval,
    most_different,
    score_ratios,
    shares,
    worst,
)


def result(points: list[float], label: str = "a", benchmark: str = "gqa", **more) -> Result:
    answers = {str(n): Mark(p, f"q{n}", f"{n}.png", "said", "truth", ("k",)) for n, p in enumerate(points)}
    defaults = {"scores": {}, "protocol": {}, "answers": answers, "questions": len(points)} | more
    return Result(benchmark=benchmark, label=label, model="m", score=100 * float(np.mean(points)), **defaults)


def binomial_quantile(n: int, p: float, share: float) -> int:
    total = 0.0
    for hits in range(n + 1):
        total += comb(n, hits) * p**hits * (1 - p) ** (n - hits)
        if total >= share:
            return hits
    return n


def ratios(points: list[float]) -> np.ndarray:
    return np.array([[[p, 1.0]] for p in points])


@pytest.mark.parametrize(("n", "hits"), [(100, 30), (400, 380), (25, 10)])
def test_hits_and_misses_are_drawn_as_a_binomial(n: int, hits: int) -> None:
    """With replacement, the number of hits among n draws is binomial exactly."""
    drawn = shares(draw(ratios([1.0] * hits + [0.0] * (n - hits)), [str(number) for number in range(n)]))[:, 0]
    found = interval(drawn)
    assert found is not None
    # A quantile of 2,000 draws lies within 4 standard errors of its rank.
    for value, share in ((found.low, 0.025), (found.high, 0.975)):
        off = 4 * (0.025 * 0.975 / DRAWS) ** 0.5
        ends = [100 * binomial_quantile(n, hits / n, s) / n for s in (max(share - off, 1e-9), min(share + off, 1))]
        assert ends[0] <= value <= ends[1]


def test_a_picture_is_drawn_with_all_its_questions() -> None:
    """Four questions a picture, alike in points: as uncertain as one a picture, twice as wide as if apart."""
    points = [float(n % 3 == 0) for n in range(60)]
    alone = interval(shares(draw(ratios(points), [str(n) for n in range(60)]))[:, 0])
    four_each = [p for p in points for _ in range(4)]
    clustered = interval(shares(draw(ratios(four_each), [str(n // 4) for n in range(240)]))[:, 0])
    apart = interval(shares(draw(ratios(four_each), [str(n) for n in range(240)]))[:, 0])
    assert clustered == alone
    assert clustered.margin / apart.margin == pytest.approx(2, rel=0.1)


def test_pictures_with_more_questions_weigh_more() -> None:
    """Two pictures, of one and of three questions: the four equally likely draws give 0, 3/4, 3/4 and 1."""
    values = shares(draw(ratios([0.0, 1.0, 1.0, 1.0]), ["a", "b", "b", "b"]))[:, 0]
    assert sorted(set(values)) == [0, 75, 100]
    assert np.mean(values == 75) == pytest.approx(0.5, abs=0.05)


def test_answers_that_are_all_alike_have_no_interval() -> None:
    assert interval(shares(draw(ratios([0.1] * 50), [str(n) for n in range(50)]))[:, 0]) is None


def test_pope_is_measured_by_the_mean_f1_of_its_splits() -> None:
    rng = np.random.default_rng(3)
    answers = [
        Mark(float(said == true), "", "", said, true, (split,))
        for split, said, true in zip(
            rng.choice(["random", "popular"], 200), rng.choice(["yes", "no"], 200), rng.choice(["yes", "no"], 200),
            strict=True,
        )
    ]  # fmt: skip
    rates = [
        yes_no_rates([(a.text == "yes", a.reference == "yes") for a in answers if a.kinds == (split,)])["f1"]
        for split in ("random", "popular")
    ]
    value = shares(score_ratios("pope", answers).sum(axis=0)).mean()
    assert value == pytest.approx(100 * np.mean(rates))


def test_a_paired_difference_is_that_of_each_question() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 400).astype(float)
    second = np.where(rng.random(400) < 0.1, 1 - first, first)
    found = compare(result(list(first)), result(list(second), "b"))
    change = second - first
    assert found.difference == pytest.approx(100 * change.mean())
    assert (found.better, found.worse, found.equal) == ((change > 0).sum(), (change < 0).sum(), (change == 0).sum())
    closed = 1.96 * 100 * change.std() / 20  # the normal approximation
    assert found.interval.margin == pytest.approx(closed, rel=0.08)
    assert found.interval.low < found.difference < found.interval.high


def test_what_differs_is_found_by_kind_and_by_question() -> None:
    marks = list(product("xyz", range(20)))
    first = {f"{kind}{n}": Mark(float(n % 2), "q", "", "", "t", (kind,)) for kind, n in marks}
    second = {
        name: Mark(1.0 if a.kinds == ("y",) else a.points, "q", "", "", "t", a.kinds) for name, a in first.items()
    }
    second["z1"] = Mark(0.0, "q", "", "", "t", ("z",))
    found = compare(result([0.0], answers=first), result([0.0], "b", answers=second))
    assert [(kind.kind, kind.first, kind.second) for kind in found.kinds][:2] == [("y", 50, 100), ("z", 50, 45)]
    names = [name for name, *_ in most_different(found, 6)]
    assert len(names) == 6
    assert "z1" in names
    assert all(name[0] == "y" for name in names if name != "z1")
    assert most_different(found, 0) == []


def test_runs_without_common_questions_are_not_compared() -> None:
    assert compare(result([1.0, 0.0]), result([1.0], "b")) is None
    other = {str(n): Mark(1.0, reference="another truth") for n in range(2)}
    assert compare(result([1.0, 0.0]), result([1.0, 1.0], "b", answers=other)) is None


def test_the_worst_are_of_many_kinds_and_have_fewest_points() -> None:
    answers = [Mark(0.0, f"a{n}", kinds=("a",)) for n in range(50)]
    answers += [Mark(0.0, "b", kinds=("b",)), Mark(0.5, "half", kinds=("c",)), Mark(1.0, "right", kinds=("d",))]
    assert {answer.kinds for answer in worst(answers, 2)} == {("a",), ("b",)}
    assert [answer.question for answer in worst(answers, 100)][-1] == "half"


def test_what_is_not_like_with_like_is_said() -> None:
    with_words = {"ocr_tokens": "in the prompt (Rosetta)"}
    plain = result([1.0, 0.0], benchmark="textvqa", questions=5000, protocol=with_words)
    assert caveats(plain) == []
    without = result([1.0, 0.0], "b", "textvqa", limit=2, protocol={"ocr_tokens": "not in the prompt"})
    first, second = caveats(without)
    assert first.startswith("only the first 2 questions (--limit)")
    assert second.startswith("OCR tokens: not in the prompt; published scores have them")
    assert "different ocr tokens: a: in the prompt (Rosetta); b: not in the prompt" in run_differences([plain, without])
    assert run_differences([plain, plain]) == []
    coco, gqa = (
        result([1.0, 0.0], name, "pope", annotations=(f"{name}_pope_random.json",)) for name in ("coco", "gqa")
    )
    assert run_differences([coco, gqa]) == ["different files: coco: coco_pope_random.json; gqa: gqa_pope_random.json"]
    assert run_differences([coco, result([1.0, 0.0], benchmark="pope")]) == []
    official = {"judge": "gpt-4-0613", "judge_prompt": "MM-Vet's own, sha256 d1"}
    same = result([1.0, 0.0], benchmark="mmvet", questions=218, protocol=official, scores={"judged_by": ["gpt-4-0613"]})
    assert caveats(same) == []
    other = result([1.0, 0.0], benchmark="mmvet", questions=218, protocol=official, scores={"judged_by": ["x-1"]})
    assert caveats(other) == ["judge x-1; published scores use gpt-4-0613"]


def test_files_are_read_back(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_result(tmp_path / name / "eval", "gqa", [mark(n, n % 2) for n in range(4)])
    write_heldout(tmp_path / "blind.json", [True, False, True], blind=True)
    (tmp_path / "one" / "eval" / "gqa.submission.json").write_text("[]")
    results, probes = read_runs([tmp_path / "one", tmp_path / "two" / "eval", tmp_path / "blind.json"])
    assert [found.benchmark for found in results] == ["gqa", "gqa", "heldout"]
    assert len({found.label for found in results}) == 3
    assert results[0].answers["3"] == Mark(1.0, "What is 3?", "1.png", "red", "red", ("what",))
    assert results[0].tiling.tile == 28
    assert results[2].blind
    assert results[2].score == 66.67
    assert probes == []
    write_result(tmp_path / "one" / "stage1" / "eval", "gqa", [mark(n, 0.0) for n in range(4)])
    both = read_runs([tmp_path / "one"])[0]
    assert [(found.label, found.score) for found in both] == [("eval", 50.0), ("stage1/eval", 0.0)]
    assert [found.label for found in read_runs([tmp_path / "one", tmp_path / "two"])[0]][2:] == ["two"]
    (tmp_path / "one" / "eval" / "gqa.marks.jsonl").unlink()
    assert read_runs([tmp_path / "one"])[0][0].answers["3"] == Mark(1.0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"benchmark": "gqa", "scores": {}}', "Field required"),
        ('{"benchmark": "gqa", "scores": {}, "score": "x", "questions": 1, "protocol": {}, "points": {}}', "score: "),
        ('{"accuracy": {}, "answers": []}', "0 answers to 0 questions"),
        ('{"accuracy": {}, "answers": [{"id": "1"}]}', "answers: KeyError 'correct'"),
        ('{"accuracy": {}, "answers": 3}', "answers: TypeError"),
        (
            '{"benchmark": "../x", "scores": {}, "score": 1, "questions": 1, "protocol": {}, "points": {}, '
            '"tiling": {"tile": 336, "patch": 0}}',
            "tile side 336 must be a positive multiple",
        ),
        ('{"tiling": 1}', "not a result; expected a file written by anyres eval"),
        ("[1, 2]", "not a result; expected a file written by anyres eval"),
        ("{", "not JSON"),
    ],
)
def test_other_files_are_one_line(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=said) as raised:
        read_runs([path])
    assert "\n" not in str(raised.value)


def test_marks_of_another_result_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no result in it"):
        read_runs([tmp_path])
    with pytest.raises(DataError, match="no such file or folder"):
        read_runs([tmp_path / "none"])
    path = write_result(tmp_path, "gqa", [mark(1, 1.0)], points={"1": 0.5})
    with pytest.raises(DataError, match=r"gqa\.marks\.jsonl: belongs to another result"):
        read_runs([path])
