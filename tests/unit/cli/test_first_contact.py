"""What a newcomer meets first: help with examples, completion and suggestions."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from anyres_vlm.cli.main import app, main

ROOT = Path(__file__).parents[3]


def all_commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command with its whole name; groups too."""
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        yield from all_commands(inner, f"{name} {part}")


COMMANDS = dict(all_commands(typer.main.get_command(app), "anyres"))


def examples(command: Any) -> list[list[str]]:
    """The words of the examples in a command's help: one a paragraph that begins with `Example:`."""
    paragraphs = (command.help or "").split("\n\n")
    return [shlex.split(text.removeprefix("Example:")) for text in paragraphs if text.startswith("Example:")]


def parse(words: list[str]) -> Any:
    """Parse a command line as running it would, flags, choices and required options included; nothing is run."""
    command = COMMANDS["anyres"]
    depth = 1
    while getattr(command, "commands", None):
        assert words[depth] in command.commands, f"{words[depth]} is no command of {words[:depth]}"
        command = command.commands[words[depth]]
        depth += 1
    return command.make_context(" ".join(words[:depth]), words[depth:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses(name: str) -> None:
    found = examples(COMMANDS[name])
    assert found, f"{name}: no paragraph `Example: ...` in its help"
    for words in found:
        assert words[: len(name.split())] == name.split()
        parse(words)


@pytest.mark.parametrize(
    "line", ["anyres train --gird 2x2", "anyres train --stage 3", "anyres index data.json", "anyres trian"]
)
def test_an_example_with_a_mistake_would_be_found(line: str) -> None:
    with pytest.raises(Exception, match=r"gird|'3' is not one of|Missing (option|parameter)|trian"):
        parse(line.split())


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("trian", "train"),
        ("instruct genrate", "generate"),
        ("train --gird 2x2", "--grid"),
        ("tokens image.png --layuot flat", "--layout"),
        ("instruct mix mix.yaml --presett 80k", "--preset"),
        ("train --set modle.grid=1x1", "did you mean model?"),
        ("train --set stage2.lora.rnk=8", "did you mean rank?"),
        ("train --set model.layout=spatial_unpadd", "did you mean spatial_unpad?"),
        ("train --set stage1.template=vicuna", "did you mean vicuna_v1?"),
        ("train --set stage1.data.rendered=caption", "did you mean captions?"),
        ("train --set trackers=[wanbd]", "did you mean wandb?"),
        ("train --deepspeed zero2_offlod --stage 1 --output none", "did you mean zero2_offload?"),
        ("import folder out --template lama_3", "did you mean llama_3?"),
    ],
)
def test_what_is_unknown_suggests_the_nearest(
    line: str, nearest: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert nearest in capsys.readouterr().err


def test_what_is_near_nothing_is_answered_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "precision=0"]) == 2
    said = capsys.readouterr().err
    assert "'fp32' or 'bf16'" in said
    assert "did you mean" not in said


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A home folder with the command on its PATH, in `bin`."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "anyres"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m anyres_vlm "$@"\n')
    script.chmod(0o755)
    return tmp_path


def bash(home: Path, script: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": path}
    # The last line keeps bash from giving its process to the command, which looks for the shell that it is called from.
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\nexit $?"], capture_output=True, text=True, env={**os.environ, **own}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("anyres tr", {"train"}),
        ("anyres instruct ", {"generate", "replay", "mix"}),
        ("anyres train --di", {"--dialect"}),
        ("anyres train --dialect ", {"hf", "llava"}),
        ("anyres index data.json --layout sp", {"spatial_unpad"}),
        ("anyres eval gqa mm", {"mmvet"}),
        ("anyres export model out --dtype f", {"fp16", "fp32"}),
    ],
)
def test_bash_completes_commands_flags_and_choices(shell: Path, line: str, completions: set[str]) -> None:
    words = line.split(" ")
    said = bash(
        shell,
        'eval "$(anyres --show-completion bash)"\n'
        "complete -p anyres > /dev/null || exit 1\n"
        f"COMP_WORDS=({' '.join(words)} {repr('') if not words[-1] else ''}); COMP_CWORD={len(words) - 1}\n"
        '_anyres_completion anyres; printf "%s\\n" "${COMPREPLY[@]}"',
    )
    assert set(said.split()) == completions


def test_completion_is_installed_for_bash(shell: Path) -> None:
    bash(shell, "anyres --install-completion")
    assert "complete" in bash(shell, f"source {shell / '.bashrc'}; complete -p anyres")
