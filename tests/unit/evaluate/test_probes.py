"""Probes ask what their pictures show, measured from the pixels; pictures of training are never among them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from skimage.measure import label

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import save_pretrained
from anyres_vlm.cli.main import main
from anyres_vlm.config import ModelConfig
from anyres_vlm.evaluate.probes import cases as probe_cases
from anyres_vlm.evaluate.probes.cases import Case, Reply, yes_or_no
from anyres_vlm.evaluate.probes.suite import PROBES, THUMBNAIL, run_probes
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.synthetic.rendering import KINDS, render
from anyres_vlm.synthetic.words import RGB, WORDS

SIDE = 168


def mask(case: Case, colour: str) -> np.ndarray:
    """Where a picture has a colour, edges apart."""
    return (np.abs(np.asarray(case.image, int) - RGB[colour]).sum(-1) < 30) & True


def components(case: Case) -> np.ndarray:
    ink = (np.asarray(case.image, int).sum(-1) < 600).astype(int)
    return np.bincount(label(ink, connectivity=2).ravel())[1:]


def test_as_many_objects_are_drawn_as_are_to_be_counted() -> None:
    cases = list(probe_cases.counting_cases(SIDE, 4, seed=3))
    assert [int(case.answer) for case in cases] == [true for true in range(1, 13) for _ in range(4)]
    for case in cases:
        assert (components(case) > 20).sum() == int(case.answer)


def test_objects_are_there_or_not_by_their_colour() -> None:
    """A colour that no object has means that the object asked about is not there; yes means that it has pixels."""
    cases = list(probe_cases.hallucination_cases(SIDE, 30, seed=1))
    assert [case.answer for case in cases] == ["yes", "no"] * 60
    for case in cases:
        has_colour = mask(case, case.question.split()[-2]).sum() > 50
        if case.answer == "yes" or case.facts["split"] == "adversarial":
            assert has_colour
    random_absent = [case for case in cases if case.facts["split"] == "random" and case.answer == "no"]
    assert any(mask(case, case.question.split()[-2]).sum() == 0 for case in random_absent)


def test_relations_hold_as_answered_and_fail_when_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    sheets = []
    draw = probe_cases.scatter
    monkeypatch.setattr(probe_cases, "scatter", lambda *arguments: sheets.append(draw(*arguments)) or sheets[-1])
    answers = []
    cases = probe_cases.spatial_cases(SIDE, 15, seed=2)
    for first in cases:
        second = next(cases)
        centres = {mark.shape: mark.centre for mark in sheets[-1].objects}
        for case in (first, second):
            words = case.question.rstrip("?").split()
            (ay, ax), (by, bx) = centres[words[2]], centres[words[-1]]
            relation = case.facts["relation"]
            true = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation]
            assert case.answer == ("yes" if true else "no")
            assert max(abs(ay - by), abs(ax - bx)) >= 0.2 * SIDE
        assert {first.answer, second.answer} == {"yes", "no"}
        answers.append(first.answer)
    assert 15 < answers.count("yes") < 45


def lettering(case: Case) -> tuple[int, int, int]:
    """Height, width and number of the white pixels inside the board."""
    inner = np.asarray(case.image, int)[5:-5, 5:-5].min(-1) > 200
    rows, columns = np.flatnonzero(inner.any(1)), np.flatnonzero(inner.any(0))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1, int(inner.sum())


def test_words_are_as_high_as_the_case_says() -> None:
    for case in probe_cases.reading_cases(SIDE, 6, seed=0):
        if case.facts["factor"].endswith("height") and not set(case.answer) & set("JQ"):  # these reach below the line
            assert abs(lettering(case)[0] - case.facts["height"]) <= 2, case.facts


def test_a_turned_word_stands() -> None:
    turned = [case for case in probe_cases.reading_cases(SIDE, 6, seed=0) if case.facts["rotation"] == 90]
    assert len(turned) == 6
    for case in turned:
        height, width, _ = lettering(case)
        assert height > width


@pytest.mark.parametrize("share", probe_cases.FACTORS["covered"])
def test_a_covered_word_loses_its_share_of_ink(share: float) -> None:
    def ink(covered: float) -> int:
        facts = {"height": 14, "rotation": 0, "face": "DejaVuSans-Bold", "covered": covered}
        image = probe_cases.draw_sign(random.Random(5), SIDE, "PARKING", facts)
        return lettering(Case(image, "", "", {}))[2]

    assert 1 - ink(share) / ink(0) == pytest.approx(share, abs=0.12)


def test_no_picture_or_word_of_training_is_probed() -> None:
    asked = {case.image.tobytes() for probe in PROBES.values() for case in probe.cases(SIDE, 3, seed=0)}
    shown = {render(KINDS[number % 6], number, "train").image.tobytes() for number in range(900)}
    assert not asked & shown
    taught = {mark.char for mark in render("sign", 0, "train").glyphs}
    assert taught, "signs have marks, so the next line reads something"
    cases = list(probe_cases.reading_cases(SIDE, 10, seed=0))
    words = {case.answer for case in cases if case.facts["factor"] != "known height"}
    texts = [render(KINDS[1 + number % 5], number, "train") for number in range(600)]
    spoken = " ".join(text.caption + text.detail for text in texts).replace(".", " ").replace(",", " ").split()
    assert words <= {word for group in WORDS.values() for word in group}
    assert not words & set(spoken)
    known = {case.answer for case in cases if case.facts["factor"] == "known height"}
    assert len(known) > 20
    assert known <= set(spoken)


def test_pictures_follow_from_the_seed() -> None:
    for probe in PROBES.values():
        first, again, other = (
            [(case.image.tobytes(), case.question) for case in probe.cases(SIDE, 2, seed)] for seed in (0, 0, 1)
        )
        assert first == again
        assert first != other


def reply(said: str, answer: str, **facts: object) -> Reply:
    return Reply("?", answer, facts, said)


def test_hallucination_is_scored_as_pope_does() -> None:
    said = [("Yes.", "yes"), ("yes, there is", "yes"), ("No", "yes"), ("yes", "no"), ("no", "no"), ("a star", "no")]
    replies = [reply(text, answer, split="random") for text, answer in said]
    rates = probe_cases.score_hallucination([*replies, reply("yes", "yes", split="adversarial")])["random"]
    assert rates == pytest.approx(
        {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 6, "unclear": 1 / 6}
    )


def test_swaps_count_pictures_where_both_questions_are_right() -> None:
    pairs = [("yes", "no"), ("yes", "yes"), ("no", "no"), ("no", "yes")]
    replies = [
        reply(said, answer, relation="above")
        for pair in pairs
        for said, answer in zip(pair, ("yes", "no"), strict=True)
    ]
    replies += [reply("yes", "yes", relation=r) for r in ("left of", "right of", "below") for _ in range(2)]
    table = probe_cases.score_spatial(replies)
    assert table["above"] == {"accuracy": 0.5, "swap": 0.25, "yes_ratio": 0.5}
    assert table["all"]["accuracy"] == pytest.approx(10 / 14)


def test_counts_are_read_from_digits_and_words() -> None:
    assert [probe_cases.number_in(text) for text in ("12", "There are seven stars.", "many", "3 or 4")] == [
        12,
        7,
        None,
        3,
    ]
    said = {1: "1", 2: "four", 3: "no idea"}
    replies = [reply(said.get(true, str(true)), str(true), count=true) for true in range(1, 13)]
    table = probe_cases.score_counting(replies)
    assert table["2"] == {"accuracy": 0.0, "error": 2.0, "bias": 2.0, "unclear": 0.0}
    assert table["3"] == {"accuracy": 0.0, "error": None, "bias": None, "unclear": 1.0}
    assert table["all"]["error"] == pytest.approx(2 / 11)


@pytest.mark.parametrize(
    ("said", "share"),
    [("GRAPE", 1), ("It says grape.", 1), ("GRAPES", 0.8), ("It says CRAVE", 0.6), ("", 0), ("OXYGENATED", 0)],
)
def test_reading_is_the_nearest_word_s_share(said: str, share: float) -> None:
    assert probe_cases.read(said, "GRAPE") == pytest.approx(share)


@pytest.mark.parametrize(
    ("said", "meaning"),
    [("Yes", True), (" no.", False), ("No, there is none", False), ("nothing", None), ("", None), ("It does", None)],
)
def test_yes_and_no_are_first_words(said: str, meaning: bool | None) -> None:
    assert yes_or_no(said) is meaning


def test_the_thumbnail_is_asked_without_tiles_and_the_model_is_left_as_it_was(
    tiny_bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "tiny"}
    assistant = Assistant(*build_model(ModelConfig.model_validate(bases), seed=0))
    before, seen = assistant.model.tiling, []
    answer_many = Assistant.answer_many

    def watched(*arguments, **options):
        answers = answer_many(*arguments, **options)
        seen.append({answer.image_tokens for answer in answers})
        return answers

    monkeypatch.setattr(Assistant, "answer_many", watched)
    found = run_probes(assistant, ["reading"], 1, 0, 8192, lambda *_: None)
    assert list(found) == ["reading", THUMBNAIL]
    assert seen == [{4 + 16 + 4}, {4}]  # 2x2 patches a tile, four tiles with a newline a row; the thumbnail alone
    assert assistant.model.tiling == before


def test_the_command_writes_answers_scores_and_a_picture(tiny_bases: Path, tmp_path: Path, capsys) -> None:
    bases = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "tiny"}
    model, tokenizer = build_model(ModelConfig.model_validate(bases), seed=0)
    (tmp_path / "model").mkdir()
    save_pretrained(model, model.state_dict(), tokenizer, "", tmp_path / "model")
    folder = tmp_path / "out"
    command = ["probe", "counting", "--model", tmp_path / "model", "--count", 1, "--out", folder, "--json"]
    assert main([str(word) for word in command]) == 0
    scores = json.loads(capsys.readouterr().out)
    written = json.loads((folder / "probes.json").read_text())
    assert written["scores"] == scores
    assert len(written["replies"]["counting"]) == 12
    assert (folder / "probes.png").stat().st_size > 5000
