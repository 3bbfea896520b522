"""A conversation in the terminal: images in any turn, commands, mistakes that do not end it, alternatives of tokens."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from anyres_vlm.cli.main import main
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Grid, Size, Tiling, count_tokens
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import Turn
from anyres_vlm.serve.chat import ChatSession, run_command

TILING = Tiling.from_grid(Grid(2, 2), tile=28, patch=14)


@pytest.fixture(scope="module")
def assistant(checkpoint: Path) -> Assistant:
    return Assistant.load(checkpoint)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    names = ["wide.png", "my photo.png"]
    for name, size in zip(names, [(90, 20), (40, 70)], strict=True):
        Image.linear_gradient("L").resize(size).save(name)
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n oh")
    return names


def chat(checkpoint: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", str(checkpoint), "--max-new-tokens", "4", *flags])


def test_images_come_in_any_turn_and_reset_forgets_them(checkpoint, pictures, monkeypatch, capsys) -> None:
    tokens = [count_tokens(Size(height=h, width=w), TILING) for w, h in [(90, 20), (40, 70)]]
    lines = ["hello", "/image wide.png", "what?", "/image 'my photo.png'", r"/image my\ photo.png", "and these?"]
    assert chat(checkpoint, [*lines, "/reset", "again"], monkeypatch, "--json") == 0
    said = capsys.readouterr()
    counts = [json.loads(line)["image_tokens"] for line in said.out.splitlines()]
    assert counts == [0, tokens[0], tokens[0] + 2 * tokens[1], 0]
    assert "wide.png: 90x20 -> 1x3 grid, 4 tiles, 16 visual + 2 newline = 18 tokens" in said.err
    first, *_, last = (json.loads(line) for line in said.out.splitlines())
    assert last["prompt_tokens"] < first["prompt_tokens"] + 5, "nothing before the reset is read again"


def test_mistakes_are_a_line_each_and_the_chat_goes_on(checkpoint, pictures, monkeypatch, capsys) -> None:
    mistakes = [
        ("/image broken.png", "broken.png: broken image"),
        ("/image none.png", "none.png: no such file"),
        ("/image", "/image: expected /image FILE"),
        ("/imge wide.png", "unknown command /imge: /help lists them; did you mean /image?"),
        ("/xyz", "unknown command /xyz: /help lists them"),
        ("/image 'wide.png", "No closing quotation"),
        ("/save here.json", "the conversation is empty"),
        ("/save", "/save: expected /save FILE.json"),
        ("bad </s> token", "control token '</s>'"),
        ("what? " * 2000, "the context limit is 2,048 tokens, answer included"),
        ("<image>", "has 1 <image>, but 0 images are given"),
    ]
    assert chat(checkpoint, [line for line, _ in mistakes] + ["hello"], monkeypatch, "--json") == 1
    said = capsys.readouterr()
    errors = said.err.splitlines()
    for error, (_, words) in zip(errors, mistakes, strict=True):
        assert error.startswith("error: ")
        assert words in error
    (answer,) = said.out.splitlines()
    assert json.loads(answer)["prompt"] == "hello"
    assert json.loads(answer)["image_tokens"] == 0
    assert chat(checkpoint, ["/help"], monkeypatch) == 0
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["/image", "/reset", "/save", "/help"]


def test_a_failed_question_leaves_its_image_for_the_next(assistant, pictures) -> None:
    session = ChatSession(assistant, Decoding(3))
    session.add_image(Path("wide.png"))
    with pytest.raises(UsageError, match="the context limit is"):
        session.ask("what? " * 2000)
    assert session.turns == []
    assert session.ask("what?").image_tokens == count_tokens(Size(height=20, width=90), TILING)


def test_a_saved_conversation_is_a_record_of_training_data(assistant, pictures, tmp_path) -> None:
    session = ChatSession(assistant, Decoding(3))
    run_command(session, "/image wide.png")
    answers = [session.ask("what?").text]
    run_command(session, "/image 'my photo.png'")
    answers.append(session.ask("and this?").text)
    run_command(session, "/image wide.png")  # waits for a question that does not come
    assert run_command(session, "/save talk.json") == "saved 2 questions and answers as talk.json"
    record = open_source(tmp_path / "talk.json", None).record(0)
    assert [turn.text for turn in record.turns] == ["<image>\nwhat?", answers[0], "<image>\nand this?", answers[1]]
    assert [image.path for image in record.images] == [tmp_path / name for name in pictures]
    with pytest.raises(UsageError, match=r"/save wide.png: expected a name ending in .json"):
        run_command(session, "/save wide.png")
    assert Image.open("wide.png").size == (90, 20)


def test_a_terminal_asks_for_lines_and_ends_with_the_input(checkpoint, pictures) -> None:
    """On a pseudo-terminal, where the prompt is shown and the line can be edited."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "anyres_vlm", "chat", str(checkpoint), "--max-new-tokens", "3"]
    done = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "dumb"})
    os.close(theirs)
    shown = b""
    for line in (b"hello\n", b"/oops\n", b"/help\n", b"\x04"):
        prompts = shown.count(b"you: ")
        while shown.count(b"you: ") == prompts:
            assert select.select([ours], [], [], 300)[0], shown
            shown += os.read(ours, 4096)
        os.write(ours, line)
    assert done.wait(300) == 0, shown
    os.close(ours)
    assert b"error: unknown command /oops" in shown
    assert b"/reset" in shown
    assert b"Traceback" not in shown


def test_watched_logits_are_a_forward_pass_of_the_answer(assistant, pictures) -> None:
    steps: list[tuple[int, torch.Tensor]] = []
    session = ChatSession(assistant, Decoding(6))
    text = "".join(session.stream("what?", lambda tokens, logits: steps.append((tokens[0], logits[0]))))
    prompt = assistant.conversation.prompt([Turn("user", "what?")])
    tokens = [token for token, _ in steps]
    ids = torch.tensor([*prompt.tolist(), *tokens[:-1]])[None]
    with torch.inference_mode():
        expected = assistant.model.language_model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    torch.testing.assert_close(torch.stack([logits for _, logits in steps]), expected, atol=1e-5, rtol=0)
    assert tokens == expected.argmax(-1).tolist()
    assert assistant.tokenizer.decode(tokens, skip_special_tokens=True).strip() == text


def test_another_grid_changes_the_bill_and_not_the_assistant(assistant, pictures) -> None:
    size = Size(height=70, width=40)
    for grid, other in [(Grid(1, 1), assistant.with_grid(Grid(1, 1))), (Grid(3, 3), assistant.with_grid(Grid(3, 3)))]:
        expected = count_tokens(size, Tiling.from_grid(grid, tile=28, patch=14))
        session = ChatSession(other, Decoding(2))
        assert session.add_image(Path("my photo.png")).total_tokens == expected
        assert session.ask("what?").image_tokens == expected
    assert assistant.tiling == TILING
