"""`anyres chat` and `anyres eval` on a checkpoint folder: counts, conversations, scores and refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from anyres_vlm.cli.main import main
from anyres_vlm.geometry import Size, count_tokens
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import Turn


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.linear_gradient("L").resize((50, 90)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_chat_counts_what_the_geometry_counts(checkpoint, picture, capsys) -> None:
    arguments = ["chat", str(checkpoint), "--image", str(picture), "--max-new-tokens", "5", "--json"]
    assert main([*arguments, "--prompt", "what?"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assistant = Assistant.load(checkpoint)
    assert reply["image_tokens"] == count_tokens(Size(height=90, width=50), assistant.model.tiling)
    words = assistant.tokenizer("User: <image>\nwhat? Assistant:")["input_ids"]
    assert reply["prompt_tokens"] == len(words) - 1 + reply["image_tokens"]
    assert 0 < reply["new_tokens"] <= 5


def test_questions_of_a_pipe_make_one_conversation(checkpoint, picture, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n\nwhere?\n"))
    assert main(["chat", str(checkpoint), "--image", str(picture), "--max-new-tokens", "4", "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("what?", "where?")
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"]
    assert second["image_tokens"] == first["image_tokens"]


def test_sampling_varies_and_greedy_does_not(checkpoint, picture) -> None:
    assistant = Assistant.load(checkpoint)
    image = Image.open(picture).convert("RGB")
    turns = [Turn("user", "<image>\nwhat?")]

    def texts(temperature: float, top_p: float) -> list[str]:
        decodings = [Decoding(6, temperature, top_p, seed) for seed in range(6)]
        return [assistant.answer(turns, [image], decoding).text for decoding in decodings]

    greedy, sampled = set(texts(0.0, 1.0)), set(texts(1.5, 0.95))
    assert texts(1.5, 0.95) == texts(1.5, 0.95)
    assert len(greedy) == 1
    assert len(sampled) > 1


class Pieces(io.StringIO):
    """Keeps what was written piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_an_answer_is_shown_as_it_is_said(checkpoint, picture, capsys, monkeypatch) -> None:
    flags = "--temperature 1.2 --top-p 0.9 --seed 5 --max-new-tokens 12".split()
    arguments = ["chat", str(checkpoint), *(["--image", str(picture)] * 2), *flags]
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nwhere?\n"))
    assert main([*arguments, "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert second["prompt_tokens"] > first["prompt_tokens"] > first["image_tokens"] > 0
    screen = Pieces()
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nwhere?\n"))
    monkeypatch.setattr("sys.stdout", screen)
    assert main(arguments) == 0
    assert screen.getvalue() == f"{first['answer']}\n{second['answer']}\n"
    assert len(screen.pieces) > 6


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--prompt", "hi </s>"], 1, "control token '</s>'"),
        (["--prompt", " "], 2, "the prompt is empty"),
        (["--prompt", "hi", "--image", "none.png"], 1, "none.png: no such file"),
        (["--prompt", "what? " * 2000], 2, "the context limit is 2,048 tokens, answer included: use fewer"),
        (["--prompt", "<image>"], 2, "has 1 <image>, but 0 images"),
    ],
)
def test_mistakes_are_one_line(checkpoint, capsys, arguments, status, words) -> None:
    assert main(["chat", str(checkpoint), *arguments]) == status
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


def test_a_folder_that_is_no_checkpoint(checkpoint, tmp_path, capsys) -> None:
    assert main(["chat", str(tmp_path / "none"), "--prompt", "hi"]) == 1
    assert "config.json: no such file" in capsys.readouterr().err
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for size, words in (
        (len(whole) - 1, "weights cannot be read"),
        (5000, "its weights have 5,000 bytes: fetch it again"),
    ):
        weights.write_bytes(whole[:size])
        assert main(["chat", str(tmp_path), "--prompt", "hi"]) == 1
        assert words in capsys.readouterr().err


def test_eval_scores_every_question(checkpoint, tmp_path, capsys) -> None:
    assert main(["render", str(tmp_path / "heldout"), "--count", "22"]) == 0
    data = capsys.readouterr().out.strip()
    out = tmp_path / "result.json"
    arguments = ["eval", "heldout", "--model", str(checkpoint), "--data", data, "--out", str(out), "--json"]
    assert main(arguments) == 0
    accuracies = json.loads(capsys.readouterr().out)
    assert len(accuracies) == 12
    kept = json.loads(out.read_text())
    assert kept["scores"] == accuracies
    assert len(kept["points"]) == 22
    assert accuracies["all"] == sum(kept["points"].values()) / 22
    capsys.readouterr()
    blind = ["--swap-images", "--against", str(out), "--out", str(tmp_path / "blind.json")]
    assert main([*arguments[:-3], *blind]) == 0
    assert "difference from result: " in capsys.readouterr().out
    assert main(["report", str(out), str(tmp_path / "blind.json"), "--out", str(tmp_path / "r.html")]) == 0
    assert "blind minus result: " in (tmp_path / "r.html").read_text()
    others = json.loads(out.read_text())
    del others["points"][next(iter(others["points"]))]
    out.write_text(json.dumps(others))
    assert main([*arguments[:-3], *blind[:3], "--out", str(tmp_path / "refused.json")]) == 1
    assert "answered 21 questions, not the same 22" in capsys.readouterr().err
    assert not list(tmp_path.glob("refused*")), "refused before the first question"


def test_held_out_questions_are_answered_in_shards(checkpoint, tmp_path, capsys) -> None:
    assert main(["render", str(tmp_path / "heldout"), "--count", "22"]) == 0
    data, out = capsys.readouterr().out.strip(), tmp_path / "out"
    command = ["eval", "heldout", "--model", str(checkpoint), "--data", data]
    assert main([*command, "--out", str(tmp_path / "whole.json")]) == 0
    for shard in ("2/2", "1/2"):
        assert not (out / "heldout.json").exists()
        assert main([*command, "--out", str(out), "--shard", shard]) == 0
    whole, sharded = (json.loads(path.read_text()) for path in (tmp_path / "whole.json", out / "heldout.json"))
    assert whole == sharded
    assert (tmp_path / "whole.answers.jsonl").read_bytes() == (out / "heldout.answers.jsonl").read_bytes()
