"""Checks of what one run needs: models, data, memory and disk.

As in `machine`, libraries are imported inside the checks.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from anyres_vlm.config import STAGES, CheckpointConfig, ModelConfig, RunConfig, StageName
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.preflight.machine import PER_DOCUMENT, VARLEN, Finding, Level, gigabytes, judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from anyres_vlm.geometry import Tiling
    from anyres_vlm.train.engine.deepspeed_settings import DeepSpeedSettings

SHM = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")
PREFETCHED = 2  # batches that torch's loader prefetches for each worker
FAILING_SHARE = 0.1  # bad records among those inspected; a larger share is no accident
HUB_TIMEOUT_S = 5


@dataclass(frozen=True)
class Case:
    """A configuration and the output folder of its run."""

    config: RunConfig
    output: Path
    faults: list[str] = field(default_factory=list)  # why the model cannot be described

    @cached_property
    def described(self) -> tuple[ModelConfig, Tiling, PreTrainedTokenizerFast] | None:
        """The model's configuration, tiling and tokenizer, or None if they are unavailable; see `faults`."""
        from anyres_vlm.checkpoints.describe import describe_model
        from anyres_vlm.checkpoints.folders import parsing

        name = next(iter(base_names(self.config.model).values()))
        try:
            require_reachable(self.config.model)
            with parsing(Path(name), "its tokenizer or configuration"):
                return describe_model(self.config.model)
        except (DataError, UsageError) as error:
            self.faults.append(str(error))
            return None


def base_names(model: ModelConfig | CheckpointConfig) -> dict[str, str]:
    """Return the folders or hub ids of a model's weights by part; timm's encoders have neither."""
    if isinstance(model, CheckpointConfig):
        return {"checkpoint": model.checkpoint}
    return {"llm": model.llm} | ({"encoder": model.encoder.name} if model.encoder.kind == "clip" else {})


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Check that DeepSpeed is installed, agrees with the run and takes a step under each preset of the config."""
    presets = sorted({preset for name in STAGES if (preset := case.config.stage(name).deepspeed)})
    if not presets:
        found = f"{version('deepspeed')}" if find_spec("deepspeed") else "not installed"
        yield Finding("deepspeed", "ok", f"{found}, not used by this config")
        return
    findings = [finding for name in STAGES for finding in check_preset(case, name)]
    yield from dict.fromkeys(findings)
    if any(finding.level == "fail" for finding in findings):
        return
    from anyres_vlm.train.engine.ranks import try_presets

    resolved = [_resolve(case, name, preset) for name in STAGES if (preset := case.config.stage(name).deepspeed)]
    split = {settings.path: settings for settings in resolved if settings.zero_stage}
    device = try_presets(list(split.values()), bf16=case.config.precision == "bf16")
    words = f"{version('deepspeed')} on {device} took a step under {', '.join(presets)}"
    yield Finding("deepspeed", "ok", f"{words}; AdamW is torch's, so no op has to be compiled")


def check_preset(case: Case, stage: StageName) -> Iterator[Finding]:
    """Check that DeepSpeed is installed and that a stage's preset agrees with the run; no finding without a preset."""
    preset = case.config.stage(stage).deepspeed
    if not preset:
        return
    if find_spec("deepspeed") is None:
        words = f"{stage}: not installed, but the config sets preset {preset}"
        yield Finding("deepspeed", "fail", words, "pip install 'anyres-vlm[deepspeed]'")
        return
    try:
        settings = _resolve(case, stage, preset)
    except UsageError as error:
        yield Finding("deepspeed", "fail", f"{stage}: {error}")
        return
    for warning in settings.warnings:
        yield Finding("deepspeed", "warn", f"{stage}: {warning}")
    yield Finding("deepspeed", "ok", f"{stage}: {preset} agrees with the run")


def _resolve(case: Case, stage: StageName, preset: str) -> DeepSpeedSettings:
    import torch

    from anyres_vlm.train.engine.deepspeed_settings import find_preset, resolve_deepspeed

    has_cuda = torch.cuda.is_available()
    return resolve_deepspeed(find_preset(preset), case.config, stage, ranks=0, has_cuda=has_cuda)


def check_trackers(case: Case) -> Iterator[Finding]:
    """Check that the run's trackers are installed, and matplotlib for its pictures."""
    from anyres_vlm.train.engine.engine import require_trackers

    require_trackers(case.config.trackers)
    yield Finding("trackers", "ok", ", ".join(("tensorboard", *case.config.trackers)))
    if find_spec("matplotlib") is None:
        is_needed = any(case.config.stage(name).data.rendered for name in STAGES)
        words = "matplotlib is not installed: " + ("rendered data needs its fonts" if is_needed else "no loss curves")
        yield Finding("matplotlib", "fail" if is_needed else "warn", words, "pip install 'anyres-vlm[demo]'")


def check_recipe(case: Case) -> Iterator[Finding]:
    """Warn about settings that are known to harm the recipe."""
    from anyres_vlm.train.recipe import recipe_warnings

    warnings = dict.fromkeys(line for name in STAGES for line in recipe_warnings(case.config, name))
    for warning in warnings:
        yield Finding("recipe", "warn", warning)
    if not warnings:
        yield Finding("recipe", "ok", "no setting that is known to harm it")


def check_models(case: Case) -> Iterator[Finding]:
    """Check that tokenizer, encoder and weights are available and that the ranks of this node fit into memory."""
    if case.described is None:
        yield Finding("model", "fail", case.faults[0])
        return
    model, tiling, tokenizer = case.described
    yield Finding("model", "ok", f"{len(tokenizer):,} tokens, tiles of {tiling.tile} px, template {model.template}")
    sizes = {name: _count_parameters(name) for name in base_names(case.config.model).values()}
    for name, size in sizes.items():
        if size is None:
            remedy = f"the run downloads what is missing; to do it beforehand: hf download {name}"
            yield Finding("weights", "warn", f"{name}: no weights on this machine", remedy)
        else:
            is_pickle = any(path.suffix == ".bin" for path in _weight_files(name))
            kind = ", in .bin files (pickle; only tensors are read)" if is_pickle else ""
            yield Finding("weights", "ok", f"{name}: {size / 1e6:,.1f} M parameters{kind}")
    ranks, free = _local_ranks(), free_memory()
    need = 4 * sum(size or 0 for size in sizes.values()) * ranks
    words = f"{gigabytes(free)} free; fp32 weights, complete on each of {ranks} local ranks, take {gigabytes(need)}"
    remedy = "use fewer ranks per node or a smaller model; for device memory see anyres estimate"
    yield judge("memory", need < free, words, remedy)


def check_attention(case: Case) -> Iterator[Finding]:
    """Report which attention kernel each stage will use on this machine, by the function that the model uses."""
    if case.described is None:
        yield Finding("attention", "warn", "not checked: depends on the model")
        return
    import torch

    from anyres_vlm.checkpoints.describe import describe_bases
    from anyres_vlm.model.attention import varlen_obstacle
    from anyres_vlm.train.recipe import trained_rates

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if case.config.precision == "bf16" else torch.float32
    text = describe_bases(case.config.model).text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in STAGES:
        is_trained = "language_model" in trained_rates(case.config, name)  # a frozen one runs without dropout
        dropout = getattr(text, "attention_dropout", 0.0) if is_trained else 0.0
        obstacle = varlen_obstacle(device, dtype, {head_dim}, dropout)
        words = f"{VARLEN}, one call per layer" if obstacle is None else f"{PER_DOCUMENT}: {obstacle}"
        level: Level = "ok" if obstacle is None or device.type == "cpu" else "warn"
        yield Finding(f"{name} attention", level, words)


def check_kernels(case: Case) -> Iterator[Finding]:
    """Check that the kernels of the config are installed and can run here."""
    from anyres_vlm.model.kernels import require_kernels

    require_kernels(case.config.kernels)
    names = {"none": "those of transformers", "liger": "Liger's", "compile": "compiled by torch at the first step"}
    yield Finding("kernels", "ok", names[case.config.kernels])


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Check the size of /dev/shm, through which loader workers pass tiles; containers default to 64 MB."""
    if case.config.workers == 0 or not SHM.is_dir():
        yield Finding("shared memory", "ok", "not used: no loader workers" if SHM.is_dir() else "no /dev/shm here")
        return
    if case.described is None:
        yield Finding("shared memory", "warn", "not checked: depends on the model")
        return
    _, tiling, _ = case.described
    capacity = max(case.config.stage(name).capacity for name in STAGES)
    pack_bytes = capacity / tiling.patches * 3 * tiling.tile**2  # if every tile keeps all of its tokens
    batches = case.config.workers * PREFETCHED * _local_ranks()
    size = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
    words = f"{gigabytes(size)} free; {batches} batches of loader workers take about {gigabytes(batches * pack_bytes)}"
    remedy = "use docker run --shm-size, a larger emptyDir at /dev/shm, or fewer workers"
    yield judge("shared memory", size > batches * pack_bytes, words, remedy)


def check_output(case: Case) -> Iterator[Finding]:
    """Write, sync and rename a file in the run's folder, or in the nearest parent that exists."""
    place = case.output.absolute()
    while not place.exists():  # a file in place of the folder fails below
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".anyres-doctor-") as folder:
            file = Path(folder) / "new"
            with file.open("wb") as stream:
                stream.write(os.urandom(1 << 20))
                stream.flush()
                os.fsync(stream.fileno())
            file.replace(Path(folder) / "written")
    except OSError as error:
        remedy = "choose another --output, make it writable, or free disk space"
        yield Finding("output", "fail", f"{case.output}: {place}: {error.strerror}", remedy)
        return
    yield Finding("output", "ok", f"{place} is writable")


def check_disk(case: Case) -> Iterator[Finding]:
    """Check that the checkpoints and models of both stages fit on the disk, from the model's number of parameters."""
    if case.described is None:
        yield Finding("disk", "warn", "not checked: depends on the model")
        return
    import torch

    from anyres_vlm.checkpoints.bases import skeleton

    with torch.device("meta"):
        model = skeleton(case.config.model)
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
    kept = case.config.keep_checkpoints
    one, two = (checkpoint_bytes(case.config, name, sizes) for name in STAGES)
    model_bytes = 4 * sum(sizes.values())
    # A new checkpoint is written before the oldest is deleted, and the model after the last checkpoint.
    need = kept * one + model_bytes + max((kept + 1) * two, kept * two + model_bytes)
    output = case.output.absolute()
    place = next(path for path in (output, *output.parents) if path.is_dir())
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free + written
    words = f"{sum(sizes.values()) / 1e9:.2f} B parameters: {kept} checkpoints per stage and two models take about "
    words += f"{gigabytes(need)}; {gigabytes(free)} free at {place}"
    yield judge("disk", need <= free, words, "free disk space, lower keep_checkpoints, or choose another --output")


def checkpoint_bytes(config: RunConfig, stage: StageName, sizes: dict[str, int]) -> int:
    """Return the bytes of a checkpoint: trained weights and their two moments in fp32."""
    from anyres_vlm.train.recipe import trained_rates

    trained = trained_rates(config, stage)
    return sum(12 * size for part, size in sizes.items() if part in trained)


def check_data(case: Case) -> Iterator[Finding]:
    """Open each stage's data and read some records with their images, spread over the whole source."""
    from anyres_vlm.data.sources import open_source
    from anyres_vlm.data.sources.open import peek

    for name in STAGES:
        data, check = case.config.stage(name).data, f"{name} data"
        if data.path is None:
            yield Finding(check, "ok", f"{data.samples:,} rendered {data.rendered}")
            continue
        try:
            source = open_source(data.path, data.images)
        except (DataError, OSError, ValueError) as error:
            yield Finding(check, "fail", str(error), f"set {name}.data.path and {name}.data.images")
            continue
        looked = peek(source)
        good = looked.looked - len(looked.bad)
        words = f"{data.path}: {len(source):,} records, {good} of {looked.looked} inspected ones are usable"
        if looked.looked and not looked.bad:
            yield Finding(check, "ok", words)
            continue
        is_fatal = len(looked.bad) >= max(data.max_bad_fraction, FAILING_SHARE) * looked.looked
        first = f"; first error: {looked.bad[0]}" if looked.bad else ""
        remedy = f"anyres index {data.path} lists all errors" if looked.bad else "add records: the source is empty"
        yield Finding(check, "fail" if is_fatal else "warn", words + first, remedy)


def check_index(case: Case) -> Iterator[Finding]:
    """Check whether each stage has an index and whether it was built with the current settings."""
    from anyres_vlm.data.conversation import ConversationTokenizer
    from anyres_vlm.data.index.rows import IndexSettings
    from anyres_vlm.data.index.table import read_index
    from anyres_vlm.train.steps import INDEX_FILE

    if case.described is None:
        yield Finding("index", "warn", "not checked: depends on the model")
        return
    model, tiling, tokenizer = case.described
    for name in STAGES:
        stage = case.config.stage(name)
        path, check = stage.data.index or case.output / name / INDEX_FILE, f"{name} index"
        if not path.exists():
            yield Finding(check, "ok", f"none at {path} yet: the run builds it, or anyres index beforehand")
            continue
        try:
            index = read_index(path)
        except DataError as error:
            yield Finding(check, "warn", str(error), "the run rebuilds it")
            continue
        conversation = ConversationTokenizer(stage.template or model.template, tokenizer, stage.data.image_position)
        current = IndexSettings(conversation, tiling, stage.max_length).words
        stored = {"image_position": "as_is", **index.settings}  # missing in older indices
        changed = [key for key in current if _tupled(current[key]) != _tupled(stored.get(key))]
        if changed:
            yield Finding(check, "warn", f"{path} was built with another {', '.join(changed)}", "the run rebuilds it")
        else:
            yield Finding(check, "ok", f"{path}: {int(index.ok.sum()):,} of {len(index):,} records are usable")


def _tupled(value: object) -> object:
    """Return a value with lists as tuples, so that it compares equal after a round trip through JSON."""
    return tuple(map(_tupled, value)) if isinstance(value, (list, tuple)) else value


def require_reachable(model: ModelConfig | CheckpointConfig) -> None:
    """Raise `DataError` for base models that are neither local nor downloadable; the hub client retries for minutes."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants, try_to_load_from_cache

    from anyres_vlm.checkpoints.folders import HUB_ID, resolve

    names = [model.checkpoint] if isinstance(model, CheckpointConfig) else [model.llm, model.encoder.name]
    missing = [
        name
        for name in names
        if HUB_ID.fullmatch(name)
        and not Path(resolve(name)).exists()
        and not try_to_load_from_cache(name, "config.json")
    ]
    if not missing or getproxies():
        return
    host = urlsplit(constants.ENDPOINT)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((host.hostname or "", host.port or 443), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        raise DataError(
            f"{' and '.join(missing)} not in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be "
            f"reached ({error}): use local folders, or run hf download on another machine and set HF_HOME"
        ) from None


def free_memory() -> int:
    """Return the bytes of free host memory: the machine's, or what the container's limit leaves."""
    if MEMORY.exists():
        free = _read_numbers(MEMORY)["MemAvailable"] * 1024
    else:  # not Linux: count all memory as free
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        cached = _read_numbers(CGROUP / "memory.stat").get("inactive_file", 0)  # file cache, evicted when needed
        free = min(free, int(most) - int((CGROUP / "memory.current").read_text()) + cached)
    return free


def _read_numbers(path: Path) -> dict[str, int]:
    """Read a file of the kernel with one name and number per line."""
    lines = (line.replace(":", " ").split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in lines}


def _local_ranks() -> int:
    import torch

    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (torch.accelerator.device_count() or 1)


def _weight_files(name: str) -> list[Path]:
    """Return the weight files of a folder or of a cached hub id; empty if there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from anyres_vlm.checkpoints.folders import PICKLED, resolve
    from anyres_vlm.checkpoints.weights import weight_files

    folder = Path(resolve(name))
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors*", PICKLED], local_files_only=True))
        return weight_files(folder)
    except (DataError, LocalEntryNotFoundError, HFValidationError):
        return []


def _count_parameters(name: str) -> int | None:
    """Return the number of parameters in the weight files of a folder or hub id; None if there are no files."""
    from safetensors import SafetensorError, safe_open

    from anyres_vlm.checkpoints.weights import read_pickled

    total = 0
    for path in _weight_files(name):
        if path.suffix == ".bin":
            total += sum(tensor.numel() for tensor in read_pickled(path).values())
            continue
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: its weights cannot be read ({error}): download it again") from None
    return total or None


CHECKS: dict[str, Callable[[Case], Iterable[Finding]]] = {
    "deepspeed": check_deepspeed,
    "trackers": check_trackers,
    "recipe": check_recipe,
    "model": check_models,
    "attention": check_attention,
    "kernels": check_kernels,
    "shared memory": check_shared_memory,
    "output": check_output,
    "disk": check_disk,
    "data": check_data,
    "index": check_index,
}
