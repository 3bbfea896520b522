"""Official archives as unpacked: which files `anyres eval` asks, and what it refuses before the first question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_files
import pytest

from anyres_vlm.cli.main import main
from anyres_vlm.inference.assistant import Assistant

SPLITS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}  # LLaVA's offsets


def evaluate(checkpoint: Path, names: str, data: Path, out: Path, *more: str) -> int:
    return main(
        ["eval", *names.split(), "--model", str(checkpoint), "--data", str(data), "--out", str(out), "--json", *more]
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pope_repository(root: Path, seem: str = "_seem") -> Path:
    """POPE's repository: COCO as JSON lines, the others as JSON arrays; ids start at 1 in every file."""
    for dataset, folder, image in (
        ("coco", "output/coco", "COCO_val2014_{:012d}.jpg"),
        ("aokvqa", "output/seem/aokvqa", "COCO_val2014_{:012d}.jpg"),
        ("gqa", "output/seem/gqa", "n{}.jpg"),
    ):
        for number, split in enumerate(SPLITS):
            entries = [
                {
                    "question_id": n,
                    "image": image.format(n % 3),
                    "text": f"Is there a {dataset} {split} {n} in the image?",
                    "label": "yes" if n <= number + 1 else "no",  # another share of yes in each split
                }
                for n in range(1, 5)
            ]
            is_coco = dataset == "coco"
            text = "".join(json.dumps(e) + "\n" for e in entries) if is_coco else json.dumps(entries)
            path = root / folder / f"{dataset}_pope{'' if is_coco else seem}_{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    (root / "output/coco/coco_ground_truth_objects.json").write_text('{"image": "x", "objects": []}\n')
    benchmark_files.draw(root / "images", [f"n{n}.jpg" for n in range(3)])
    benchmark_files.draw(root / "images" / "val2014", [f"COCO_val2014_{n:012d}.jpg" for n in range(3)])
    return root


@pytest.mark.parametrize("seem", ["_seem", ""])
@pytest.mark.parametrize("dataset", ["gqa", "aokvqa"])
def test_pope_files_whose_ids_repeat_in_every_split(checkpoint, tmp_path, capsys, dataset, seem) -> None:
    root = pope_repository(tmp_path / "POPE", seem)
    images = root / "images" / ("val2014" if dataset == "aokvqa" else "")
    folder, out = root / "output/seem" / dataset, tmp_path / "out"
    assert evaluate(checkpoint, "pope", folder, out, "--images", str(images)) == 0
    scores = json.loads(capsys.readouterr().out)["pope"]["scores"]
    answers, submitted = lines(out / "pope.answers.jsonl"), lines(out / "pope.submission.jsonl")
    expected_ids = {offset + n for offset in SPLITS.values() for n in range(1, 5)}
    assert {line["question_id"] for line in answers} == {line["question_id"] for line in submitted} == expected_ids
    for number, (split, offset) in enumerate(SPLITS.items()):
        own = {line["question_id"] - offset: line for line in submitted if 0 < line["question_id"] - offset < 5}
        assert all(line["question"] == f"Is there a {dataset} {split} {n} in the image?" for n, line in own.items())
        right = sum((line["answer"] == "yes") == (n <= number + 1) for n, line in own.items())
        assert scores[split]["accuracy"] == right / 4
    marks = {line["question_id"]: line for line in lines(out / "pope.marks.jsonl")}
    assert sum(mark["reference"] == "yes" for mark in marks.values()) == 1 + 2 + 3
    # Scored again from the answers, and from official ids with the split as category.
    official = [
        {"question_id": line["question_id"] % 10_000_000, "text": line["text"], "category": split}
        for line in answers
        for split, offset in SPLITS.items()
        if 0 < line["question_id"] - offset < 5
    ]
    (tmp_path / "official.json").write_text(json.dumps(official))
    for given in (out / "pope.answers.jsonl", out / "pope.submission.jsonl", tmp_path / "official.json"):
        assert main(["score", "pope", "--answers", str(given), "--annotations", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["scores"] == scores
    assert main(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    assert f"questions of {dataset}; published scores are on COCO" in (tmp_path / "r.html").read_text()


def test_pope_repository_as_cloned(checkpoint, tmp_path, capsys) -> None:
    """The published scores are on COCO; of the other datasets one has to be named."""
    root = pope_repository(tmp_path / "POPE")
    assert evaluate(checkpoint, "pope", root, tmp_path / "out", "--images", str(root / "images")) == 0
    result = json.loads(capsys.readouterr().out)["pope"]
    assert result["questions"] == 12
    assert result["annotations"] == [f"coco_pope_{split}.json" for split in ("adversarial", "popular", "random")]
    assert evaluate(checkpoint, "pope", root / "output" / "seem", tmp_path / "out") == 2
    assert "POPE files of several datasets (aokvqa, gqa)" in capsys.readouterr().err


def vqav2_test_archive(root: Path) -> Path:
    meta = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    questions = [{"image_id": n % 3, "question": f"What is {n}?", "question_id": 10 * n} for n in range(6)]
    for subset, part in (("test2015", questions), ("test-dev2015", questions[2:4])):
        content = meta | {"data_subtype": subset, "questions": part}
        benchmark_files.write(root / f"v2_OpenEnded_mscoco_{subset}_questions.json", content)
    benchmark_files.draw(root / "test2015", [f"COCO_test2015_{n:012d}.jpg" for n in range(3)])
    return root


def test_vqav2_test_archive(checkpoint, tmp_path, capsys) -> None:
    data = vqav2_test_archive(tmp_path / "data")
    assert evaluate(checkpoint, "vqav2", data, tmp_path / "out") == 0
    result = json.loads(capsys.readouterr().out)["vqav2"]
    assert (result["questions"], result["score"]) == (2, None)
    asked = lines(tmp_path / "out" / "vqav2.answers.jsonl")
    assert [line["question_id"] for line in asked] == [20, 30]
    sent = json.loads((tmp_path / "out" / "vqav2.submission.json").read_text())
    assert [line["question_id"] for line in sent] == [0, 10, 20, 30, 40, 50], "the server wants all of test2015"
    assert all(line["answer"] == "" for line in sent if line["question_id"] not in (20, 30))
    whole = data / "v2_OpenEnded_mscoco_test2015_questions.json"
    assert evaluate(checkpoint, "vqav2", whole, tmp_path / "whole") == 0
    assert len(lines(tmp_path / "whole" / "vqav2.answers.jsonl")) == 6


def test_questions_and_answers_of_vqav2_in_folders_of_their_own(checkpoint, tmp_path, capsys) -> None:
    benchmark_files.vqav2(tmp_path / "vqav2")
    for kind in ("questions", "annotations"):
        (tmp_path / "vqav2" / kind).mkdir()
        (file,) = (tmp_path / "vqav2").glob(f"*{kind}.json")
        file.rename(file.parent / kind / file.name)
    assert evaluate(checkpoint, "vqav2", tmp_path, tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out)["vqav2"]["score"] is not None


def test_all_of_gqa_textvqa_and_mmvet(checkpoint, tmp_path, capsys) -> None:
    """GQA's questions1.2, TextVQA's three splits, and MM-Vet's archive with what macOS leaves in it."""
    benchmark_files.gqa(tmp_path / "gqa" / "questions1.2")
    folder = tmp_path / "gqa" / "questions1.2"
    (folder / "images").rename(tmp_path / "gqa" / "images")
    for name in ("train_balanced", "val_balanced", "val_all", "testdev_all", "submission_all", "challenge_all"):
        benchmark_files.write(folder / f"{name}_questions.json", {"1": {"not": "read"}})
    benchmark_files.write(folder / "train_all_questions" / "train_all_questions_0.json", {"1": {"not": "read"}})
    benchmark_files.textvqa(tmp_path / "textvqa")
    for split in ("train", "test"):
        benchmark_files.write(tmp_path / "textvqa" / f"TextVQA_0.5.1_{split}.json", {"data": "not read"})
        benchmark_files.write(tmp_path / "textvqa" / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": "not read"})
    benchmark_files.mmvet(tmp_path / "mmvet" / "mm-vet")
    hidden = tmp_path / "mmvet" / "__MACOSX" / "mm-vet" / "._mm-vet.json"
    hidden.parent.mkdir(parents=True)
    hidden.write_bytes(b"\0\5\26\7")
    assert evaluate(checkpoint, "gqa textvqa mmvet", tmp_path, tmp_path / "out", "--ocr-tokens") == 0
    results = json.loads(capsys.readouterr().out)
    assert {name: result["questions"] for name, result in results.items()} == {"gqa": 5, "textvqa": 4, "mmvet": 3}


def change(file: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A fault: what a file contains after an edit."""

    def apply(data: Path) -> None:
        path = data / file
        content = path.read_text()
        is_json = content.count("\n") < 2
        parsed = json.loads(content) if is_json else [json.loads(line) for line in content.splitlines()]
        path.write_text(json.dumps(edit(parsed)))

    return apply


def remove(file: str) -> Callable[[Path], None]:
    return lambda data: (data / file).unlink()


POPE_FILE = "pope/coco/coco_pope_random.json"
VQA_FILE, VQA_ANSWERS = (
    f"vqav2/v2_{name}.json" for name in ("OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations")
)
TEXTVQA_FILE, TEXTVQA_OCR = "textvqa/TextVQA_0.5.1_val.json", "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json"
GQA_FILE, MMVET_FILE = "gqa/testdev_balanced_questions.json", "mmvet/mm-vet.json"


def repeat_first(entries: list[Any]) -> list[Any]:
    return [*entries, entries[0]]


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda entry: {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("pope", remove("pope/val2014/COCO_val2014_000000000001.jpg"), "images of 6 of 12 questions are missing"),
        ("gqa", lambda data: (data / "gqa/images/n1.jpg").write_bytes(b"no image"), "images of 2 of 5 questions"),
        ("pope", change(POPE_FILE, repeat_first), "question 5 repeats the question_id 1"),
        (
            "vqav2",
            change(VQA_FILE, lambda c: c | {"questions": repeat_first(c["questions"])}),
            "1 vqav2 ids occur twice",
        ),
        ("vqav2", change(VQA_ANSWERS, lambda c: c | {"annotations": repeat_first(c["annotations"])}), "repeats the"),
        ("textvqa", change(TEXTVQA_FILE, lambda c: c | {"data": repeat_first(c["data"])}), "repeats the question_id"),
        ("vqav2", remove(VQA_ANSWERS), "no answers to val2014, which are public, in it"),
        (
            "vqav2",
            change(VQA_ANSWERS, lambda c: c | {"annotations": c["annotations"][1:]}),
            "not among the annotations",
        ),
        (
            "vqav2",
            change(VQA_FILE, lambda c: c | {"data_subtype": "val2017"}),
            "data_subtype 'val2017': expected train2014",
        ),
        (
            "gqa",
            change(GQA_FILE, lambda c: {n: without("types")(e) for n, e in c.items()}),
            "expected dict under 'types'",
        ),
        ("textvqa", change(TEXTVQA_FILE, lambda c: c | {"data": [e | {"answers": []} for e in c["data"]]}), "got 0"),
        ("textvqa", remove(TEXTVQA_OCR), "no TextVQA_Rosetta_OCR_v0.2_val.json in its folder"),
        ("pope", change(POPE_FILE, lambda c: [e | {"label": "maybe"} for e in c]), "expected the label yes or no"),
        ("mmvet", change(MMVET_FILE, lambda c: {n: without("capability")(e) for n, e in c.items()}), "capability"),
    ],
)
def test_faults_of_any_benchmark_are_refused_before_the_model_is_loaded(
    checkpoint, tmp_path, capsys, monkeypatch, name, fault, said
) -> None:
    monkeypatch.setattr(Assistant, "load", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    data = benchmark_files.write_all(tmp_path / "data")
    fault(data)
    names = [other for other in ("vqav2", "gqa", "textvqa", "pope", "mmvet") if other != name]
    judge = ("--judge", "gpt-x", "--judge-url", "http://127.0.0.1:9/v1")
    assert evaluate(checkpoint, " ".join([*names, name]), data, tmp_path / "out", "--ocr-tokens", *judge) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--out", "file"], 2, "--out file: cannot write there (File exists)"),
        (["--judge", "gpt-x"], 2, "OPENAI_API_KEY is not set"),
        (["--judge", "gpt-x", "--judge-prompt", "none.py"], 1, "none.py: cannot read the judge's instructions"),
    ],
)
def test_flags_are_checked_before_the_model_is_loaded(
    checkpoint, tmp_path, capsys, monkeypatch, more, status, said
) -> None:
    monkeypatch.setattr(Assistant, "load", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    benchmark_files.gqa(tmp_path / "data" / "gqa")
    benchmark_files.mmvet(tmp_path / "data" / "mmvet")
    command = ["eval", "gqa", "mmvet", "--model", str(checkpoint), "--data", "data"]
    if "--out" not in more:
        command += ["--out", "out"]
    assert main([*command, *more]) == status
    assert said in capsys.readouterr().err


def test_prompts_that_do_not_fit_are_refused_before_the_first_question(checkpoint, tmp_path, capsys) -> None:
    """Of the last benchmark, too."""
    benchmark_files.gqa(tmp_path / "gqa")
    benchmark_files.pope(tmp_path / "pope")
    path = tmp_path / "pope" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().replace("in the image?", "in the image? " + "please " * 3000))
    assert evaluate(checkpoint, "gqa pope", tmp_path, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "pope: 4 of 12 questions cannot be asked (10000001, 10000002, 10000003, ...; see" in said
    assert "use a checkpoint of a smaller grid\n" in said, "only TextVQA has OCR tokens"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_template_that_the_checkpoint_cannot_write_is_not_blamed_on_the_grid(checkpoint, tmp_path, capsys) -> None:
    benchmark_files.gqa(tmp_path / "gqa")
    assert evaluate(checkpoint, "gqa", tmp_path / "gqa", tmp_path / "out", "--template", "llama_3") == 1
    said = capsys.readouterr().err
    assert "which is not a token of this llm" in said
    assert "grid" not in said
