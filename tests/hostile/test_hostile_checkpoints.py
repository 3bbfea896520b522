"""Hostile checkpoints end in one line; nothing of theirs is run."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import JSON_FILES, TARGETS, Trap, check_index, folder_like, good_folder, loads, weights, with_header
from configurations import replaced
from target import explore
from watch import watched

from anyres_vlm.checkpoints.describe import describe_bases
from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.checkpoints.tokenizer import load_tokenizer
from anyres_vlm.cli.main import main
from anyres_vlm.config import CheckpointConfig
from anyres_vlm.data import chat_template
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import Turn
from anyres_vlm.train.checkpoint import tensors


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What is imported late is no memory of an input's."""
    assert loads(good_folder())
    loads(good_folder(False))


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_loaded_or_refused(name: str) -> None:
    tally = explore(TARGETS[name], examples=25, fixed=True)
    assert tally.rejected > 2
    assert not tally.faults, tally.faults


@pytest.mark.parametrize(
    ("length", "header"),
    [(0, b""), (1 << 63, b"{}"), (10**6, b"{}"), (None, b"\xff\xfe"), (None, b"[" * 90_000), (None, b'{"a": 1}')],
)
def test_headers_that_lie(length: int | None, header: bytes, tmp_path: Path) -> None:
    with watched(tmp_path):
        made = folder_like(good_folder(), tmp_path, {"model.safetensors": with_header(header, length)})
        assert not loads(made)


def test_a_trainer_s_state_that_lacks_a_tensor() -> None:
    with tensors(good_folder()) as read:
        assert read("image_newline.exp_avg").shape == (16,)
        with pytest.raises(DataError, match=r"lora_A is missing; delete it to resume from the checkpoint before it"):
            read("x.lora_A")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    from safetensors.torch import load, save

    tensors = load(weights()) | {"image_newline": torch.zeros(16, dtype=torch.int64)}
    made = folder_like(good_folder(), tmp_path, {"model.safetensors": save(tensors)})
    with pytest.raises(DataError, match="image_newline holds torch"):
        load_pretrained(made)


@pytest.mark.parametrize("name", ["../hostile/model.safetensors", "/etc/x.safetensors", "", 3, None])
def test_an_index_that_leads_out(name: Any, tmp_path: Path) -> None:
    with watched(tmp_path):
        assert not check_index({"image_newline": name}, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pickle_is_never_loaded(name: str, tmp_path: Path) -> None:
    content = pickle.dumps(Trap(tmp_path / "trapped"))
    made = folder_like(good_folder(), tmp_path, {"model.safetensors": None, name: content})
    with watched(tmp_path):
        assert not loads(made)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", JSON_FILES)
def test_remote_code_is_never_run_nor_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked whether to run remote code")

    monkeypatch.setattr("builtins.input", asked)
    good = good_folder(ours=False)
    if not (good / name).exists():
        return
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoImageProcessor"), "evil.Evil")
    classes["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]  # type: ignore[assignment]
    content = json.loads((good / name).read_text("utf-8")) | {"auto_map": classes, "tokenizer_class": "Evil"}
    trap = f"import os; os.mkdir({str(tmp_path / 'trapped')!r})\nclass Evil: pass\n".encode()
    made = folder_like(good, tmp_path, {name: json.dumps(content).encode(), "evil.py": trap})
    with watched(tmp_path):
        loads(made)
        for read in (lambda: load_tokenizer(str(made)), lambda: describe_bases(CheckpointConfig(checkpoint=str(made)))):
            with suppress(DataError):
                read()
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (part, key)
        for part in ("text_config", "vision_config")
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ],
)
@pytest.mark.parametrize("value", [10**9, -1, "x"])
def test_absurd_sizes_are_refused_before_they_are_made(part: str, key: str, value: Any, tmp_path: Path) -> None:
    content = json.loads((good_folder() / "config.json").read_text("utf-8"))
    changed = json.dumps(replaced(content, (part, key), value)).encode()
    with watched(tmp_path):
        assert not loads(folder_like(good_folder(), tmp_path, {"config.json": changed}))


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{% if",
    ],
)
def test_a_template_stays_in_its_box(jinja: str) -> None:
    tokenizer = load_tokenizer("embedded:tiny-lm")
    tokenizer.chat_template = jinja
    with pytest.raises(DataError, match="chat template"):
        chat_template.apply_own(tokenizer, [Turn("user", "a")])


def test_a_template_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "PATIENCE_S", 0.2)
    tokenizer = load_tokenizer("embedded:tiny-lm")
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(300) %}{% endfor %}{% endfor %}"
    with pytest.raises(UsageError, match=r"not done after 0\.2 s: name another template"):
        chat_template.read_own(tokenizer)


def test_an_unknown_token_that_is_unknown_itself_is_refused(tmp_path: Path) -> None:
    content = json.loads((good_folder() / "tokenizer_config.json").read_text("utf-8"))
    changed = json.dumps(content | {"unk_token": ""}).encode()
    with pytest.raises(DataError, match="unk_token '' of its tokenizer is none of its tokens"):
        load_pretrained(folder_like(good_folder(), tmp_path, {"tokenizer_config.json": changed}))


def test_the_command_ends_with_1_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder_like(good_folder(), tmp_path, {"config.json": b"[" * 99_999})
    assert main(["chat", str(made)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
