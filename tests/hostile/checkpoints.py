"""Hostile checkpoint folders, and what loading makes of one: a model, or a `DataError`."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from configurations import places, refused, replaced
from hypothesis import strategies as st
from target import Target
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import save_pretrained
from anyres_vlm.checkpoints.tokenizer import load_tokenizer
from anyres_vlm.config import ModelConfig
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.train.checkpoint import TrainerState, latest, read_state, save_trainer

VALUES: list[Any] = [None, True, -1, 0, 1, 10**9, 1 << 40, 1 << 70, 0.5, float("nan"), float("inf"), "", "x" * 999]
VALUES += ["../../x", "llama", [], {}, [None], [[1]], {"x": 1}, "gpt2", "__class__", "auto"]
JSON_FILES = ("config.json", "anyres.json", "generation_config.json", "processor_config.json", "tokenizer_config.json")


class Trap:
    """Touches a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def good_folder(ours: bool = True) -> Path:
    """A tiny random checkpoint with the state of a trainer; without `anyres.json` it counts as stock."""
    return _made(ours)


@cache
def _made(ours: bool) -> Path:
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    tokenizer = load_tokenizer("embedded:tiny-lm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14)).save_pretrained(root / "vit")
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**text, vocab_size=len(tokenizer))).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    bases = {"llm": str(root / "llm"), "encoder": {"name": str(root / "vit")}, "template": "tiny"}
    model, tokenizer = build_model(ModelConfig.model_validate(bases), seed=0)
    folder = root / "saved"
    folder.mkdir()
    save_pretrained(model, model.state_dict(), tokenizer, TEMPLATES["tiny"].jinja, folder)
    save_trainer(
        folder, TrainerState(3, 3, {}), {"image_newline": torch.zeros(16)}, {"image_newline.exp_avg": torch.zeros(16)}
    )
    if not ours:
        (folder / "anyres.json").unlink()
    return folder


def folder_like(good: Path, folder: Path, changes: dict[str, bytes | None]) -> Path:
    """The same files but for some of other content, or without some."""
    made = folder / "hostile"
    for path in good.rglob("*"):
        place = made / path.relative_to(good)
        if path.is_file() and path.relative_to(good).as_posix() not in changes:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    for name, content in changes.items():
        if content is not None:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(content)
    return made


def loads(folder: Path) -> bool:
    """True if it became an assistant, False for an error of ours in one line."""
    try:
        Assistant.load(folder, "tiny")
    except (DataError, UsageError) as error:
        return refused(error)
    return True


def with_header(header: bytes, length: int | None = None, body: bytes = bytes(64)) -> bytes:
    """A safetensors file of any header and length of it."""
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def check_weights(content: bytes, folder: Path) -> bool:
    return loads(folder_like(good_folder(), folder, {"model.safetensors": content}))


def check_json(case: tuple[bool, int, int, Any], folder: Path) -> bool:
    """One value of one JSON file replaced."""
    ours, which, at, value = case
    good = good_folder(ours)
    names = [name for name in JSON_FILES if (good / name).exists()]
    name = names[which % len(names)]
    content = json.loads((good / name).read_text("utf-8"))
    found = places(content)
    changed = json.dumps(replaced(content, found[at % len(found)], value))
    return loads(folder_like(good, folder, {name: changed.encode("utf-8", "surrogatepass")}))


def check_bytes(case: tuple[int, list[tuple[int, int]], int | None], folder: Path) -> bool:
    """Any file of the folder with other bytes."""
    which, edits, cut = case
    good = good_folder()
    names = sorted(path.name for path in good.iterdir() if path.is_file() and path.suffix == ".json")
    content = bytearray((good / names[which % len(names)]).read_bytes())
    for place, value in edits:
        content[place % len(content)] = value
    content = content if cut is None else content[: cut % len(content)]
    return loads(folder_like(good, folder, {names[which % len(names)]: bytes(content)}))


def check_index(places: Any, folder: Path) -> bool:
    """`model.safetensors.index.json` of any content."""
    content = json.dumps({"weight_map": places}).encode("utf-8", "surrogatepass")
    return loads(folder_like(good_folder(), folder, {"model.safetensors.index.json": content}))


def check_state(case: tuple[Any, bytes], folder: Path) -> bool:
    """A trainer's state of any content."""
    state, moments = case
    changes = {"trainer/state.json": json.dumps(state).encode("utf-8", "surrogatepass")}
    made = folder_like(good_folder(), folder, changes | ({"trainer/moments.safetensors": moments} if moments else {}))
    made.rename(folder / "step-0000003")
    (folder / "step-x").mkdir()
    try:
        read_state(folder / "step-0000003")
        return latest(folder) is not None
    except DataError as error:
        return refused(error)


def weights() -> bytes:
    return (good_folder() / "model.safetensors").read_bytes()


def edited(edits: list[tuple[int, int]], cut: int | None) -> bytes:
    content = bytearray(weights())
    for place, value in edits:
        content[place % 8000] = value  # the header alone: any number is a weight
    return bytes(content if cut is None else content[: cut % len(content)])


scalars = st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=6)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "F8_E4M3", "BOOL", "F4", "x", "C64", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 4, 16, -1, 1 << 40, 1 << 63, 1 << 64, 0.5]), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 4, 64, 32, 16, 1 << 63, -1]), min_size=1, max_size=3),
    }
)
headers = st.builds(
    lambda header, length: with_header(json.dumps(header).encode(), length),
    st.dictionaries(st.sampled_from(["a", "image_newline", "__metadata__"]), entries | scalars, max_size=3),
    st.none() | st.sampled_from([0, 1, 1 << 20, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
)


def prepared(inputs: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The good folders are made with the first input, not under the watch."""

    def made() -> st.SearchStrategy[Any]:
        loads(good_folder())
        loads(good_folder(ours=False))
        return inputs

    return st.deferred(made)


byte_edits = st.lists(st.tuples(st.integers(0, 1 << 18), st.integers(0, 255)), max_size=5)
cuts = st.none() | st.integers(0, 1 << 18)
TARGETS = {
    "checkpoints: weights": Target(
        prepared(headers | st.binary() | st.builds(edited, byte_edits, cuts)), check_weights
    ),
    "checkpoints: JSON values": Target(
        prepared(st.tuples(st.booleans(), st.sampled_from([0, 0, 0, 1, 2, 3, 4]), st.integers(0, 999), scalars)),
        check_json,
    ),
    "checkpoints: JSON bytes": Target(prepared(st.tuples(st.integers(0, 9), byte_edits, cuts)), check_bytes),
    "checkpoints: index": Target(
        prepared(scalars | st.dictionaries(st.text(max_size=5), scalars | st.just("model.safetensors"), max_size=3)),
        check_index,
    ),
    "checkpoints: trainer": Target(
        prepared(
            st.tuples(
                scalars
                | st.fixed_dictionaries({"step": scalars, "updates": scalars, "settings": scalars | st.just({})}),
                st.just(b"") | headers,
            )
        ),
        check_state,
    ),
}
