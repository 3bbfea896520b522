"""Weights of a checkpoint folder: read its tensors, rename them and load them into a model.

Tensors are read from safetensors, or, if a folder has none, from torch's own files, `pytorch_model*.bin`. Those are
pickles: torch's weights-only loader reads tensors from them and refuses any other object.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig

from anyres_vlm.checkpoints.folders import PICKLED, load_fault, parsing, read_json
from anyres_vlm.errors import DataError
from anyres_vlm.model.vlm import VisionLanguageModel

Renamings = Sequence[tuple[str, str]]
"""Pairs of a regular expression for the start of a name and its replacement; the first match applies."""

SHARD = re.compile(r"[^/\\\0]+\.(safetensors|bin)")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
HEAD = "language_model.lm_head.weight"
# Buffers that older releases saved and newer ones compute.
COMPUTED = re.compile(r"\.embeddings\.position_ids$|\.rotary_emb\.inv_freq$")
LAYER_BYTES = 1000  # lower bound: the names and offsets of a layer's weights take as much in a file's header


def read_tensors(folder: Path, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a folder, or those with the given names; an index file, if any, lists the shards.

    Raises `DataError` for a shard that is missing or broken, or holds anything but tensors.
    """
    for path in weight_files(folder):
        try:
            if path.suffix == ".bin":
                for name, tensor in read_pickled(path).items():
                    if names is None or name in names:
                        yield name, tensor
                continue
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if names is None or name in names:
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: its weights cannot be read ({error}); use a complete checkpoint folder") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one of torch's own files, mapped from disk. Raises `DataError` for any other content."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; use a complete checkpoint folder")
    if not zipfile.is_zipfile(path):  # the reader for files from before torch 1.6 allocates whatever the file demands
        raise DataError(
            f"{path}: not a file of torch.save, or one from before torch 1.6: only pickle of tensors in a zip archive "
            "is read; use a complete checkpoint folder, with safetensors if there are any"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle can raise any exception
        reason = load_fault(error)
        raise DataError(f"{path}: pickle can run any code, only tensors are read from it ({reason})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected tensors by name, got {type(content).__name__}")
    for name, tensor in content.items():
        is_plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not is_plain or tensor.nbytes > path.stat().st_size:
            raise DataError(f"{path}: {str(name)[:80]!r} is not a plain tensor with a name")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder: safetensors, or torch's own if there are none. Raises `DataError`."""
    for whole in WHOLE_FILES:
        index = folder / f"{whole}.index.json"
        if index.exists():
            return _indexed(index, Path(whole).suffix)
        if (folder / whole).exists():  # other files in the folder, such as an adapter, are not part of the model
            return [folder / whole]
        pattern = PICKLED if whole.endswith(".bin") else "*.safetensors"
        if shards := sorted(folder.glob(pattern)):
            return shards
    raise DataError(f"{folder}: no *.safetensors and no {PICKLED} in it; use a complete checkpoint folder")


def _indexed(index: Path, suffix: str) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise DataError(f"{index}: no weight_map in it; use a complete checkpoint folder")
    for name in places.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name) or not name.endswith(suffix):
            raise DataError(f"{index}: {name!r}: expected a *{suffix} file of this folder")
    return [index.parent / name for name in sorted(set(places.values()))]


def renamed(name: str, renamings: Renamings) -> str:
    """Return the name that a weight has in this package's model."""
    for pattern, replacement in renamings:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def dtype_of(name: str, dtype: torch.dtype | None, llm_dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype for a weight: `llm_dtype`, if given, for the language model's, else `dtype`."""
    return llm_dtype if llm_dtype is not None and name.startswith("language_model.") else dtype


def cast_parameters(model: VisionLanguageModel, dtype: torch.dtype | None, llm_dtype: torch.dtype | None) -> None:
    """Cast all parameters as `dtype_of` says; buffers keep their dtype."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype_of(name, dtype, llm_dtype))


def load_weights(
    model: VisionLanguageModel,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype | None,
    llm_dtype: torch.dtype | None = None,
) -> None:
    """Replace the model's parameters with tensors under this package's names, cast as `dtype_of` says.

    Word embeddings are tied if the configuration says so and the folder holds no other head. Raises `DataError` for an
    unknown name, a wrong shape or a missing weight.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if COMPUTED.search(name):
            continue
        if name not in expected or tensor.shape != expected[name]:
            wanted = f"expected {tuple(expected[name])}" if name in expected else "no such weight was expected"
            raise DataError(f"{folder}: {name} of shape {tuple(tensor.shape)}: {wanted}, as its config.json says")
        if not tensor.is_floating_point():
            raise DataError(f"{folder}: {name} holds {tensor.dtype}, expected floating-point numbers")
        wanted_dtype = dtype_of(name, dtype, llm_dtype) or tensor.dtype
        found[name] = tensor.to(wanted_dtype, copy=True)  # a view would keep the whole file in memory
    config, embeddings = model.language_model.config, model.language_model.get_input_embeddings().weight
    if config.tie_word_embeddings and HEAD in found:
        name = next(name for name, parameter in model.named_parameters() if parameter is embeddings)
        config.tie_word_embeddings = name not in found or torch.equal(found[HEAD], found[name])
    missing = expected.keys() - found.keys() - ({HEAD} if config.tie_word_embeddings else set())
    if missing:
        raise DataError(
            f"{folder}: weights missing: {', '.join(sorted(missing)[:3])}; use a complete checkpoint folder"
        )
    model.load_state_dict(found, strict=False, assign=True)
    model.language_model.tie_weights()


def load_parts(model: VisionLanguageModel, folder: Path, parts: tuple[str, ...]) -> None:
    """Copy the weights of some parts of the model, such as `multi_modal_projector`, from a folder of this package."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] in parts}
    found = dict(read_tensors(folder, wanted))
    if model.language_model.config.tie_word_embeddings:
        wanted.pop(HEAD, None)
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            got = "nothing" if name not in found else f"shape {tuple(found[name].shape)}"
            raise DataError(
                f"{folder}: expected {name} of shape {tuple(tensor.shape)}, got {got}; use the same base models"
            )
    model.load_state_dict(found, strict=False)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules that are built in the block on the meta device; buffers are computed as usual."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # those that are tied later stay the same object
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def has_tied_head(model: VisionLanguageModel) -> bool:
    """Return whether the head shares its weight with the word embeddings."""
    language_model = model.language_model
    head = language_model.get_output_embeddings()
    return head is not None and head.weight is language_model.get_input_embeddings().weight


def allocate(model: VisionLanguageModel, *, is_tied: bool) -> None:
    """Give parameters on the meta device uninitialised memory on the CPU, which takes no RAM until it is written.

    Weights that are tied stay tied, but the head's gets memory of its own unless `is_tied`.
    """
    if has_tied_head(model) and not is_tied:
        head = model.language_model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=head.weight.requires_grad)
        model.language_model.config.tie_word_embeddings = False
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                empty = torch.empty_like(old, device="cpu")
                module._parameters[name] = made.setdefault(old, nn.Parameter(empty, old.requires_grad))


def require_weights(parts: Sequence[PreTrainedConfig], build: Callable[[], nn.Module], folder: Path) -> None:
    """Raise `DataError` for a model larger than its folder's weights, before anything of that size is allocated.

    `build` makes, from these configurations, the model or those of its parts that the folder must hold.
    """
    with parsing(folder, "its weights"):
        size = sum(path.stat().st_size for path in weight_files(folder))
    layers = sum(part.num_hidden_layers for part in parts)
    if min(part.num_attention_heads for part in parts) < 1:
        raise DataError(f"{folder}: config.json says a model without attention heads")
    held = f"its weights have {size:,} bytes: fetch it again"
    if layers * LAYER_BYTES > size:
        raise DataError(f"{folder}: config.json says {layers} layers, {held}")
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in build().parameters())
    if numbers > size:
        raise DataError(f"{folder}: config.json says {numbers:,} numbers, {held}")
