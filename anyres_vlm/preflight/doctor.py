"""What one run needs: its models, data, memory and disk. As in `machine`, libraries are imported inside the checks."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from anyres_vlm.config import CheckpointConfig, ModelConfig, RunConfig, StageName
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.preflight.machine import Finding, gigabytes, judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from anyres_vlm.geometry import Tiling

SHM = Path("/dev/shm")
PREFETCHED = 2  # batches that torch's loader keeps ready for each worker
SHARE_OF_BAD = 0.1  # of the records looked at; more than any sane cap, so that it is no accident
PATIENCE_S = 5  # for a connection to the hub
CGROUP = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")
CHECKPOINT_BYTES = 12  # of a trained weight: itself and AdamW's two moments in fp32
MODEL_BYTES = 4  # of a weight of a finished model, at most


@dataclass(frozen=True)
class Case:
    """A configuration and the folder of its run."""

    config: RunConfig
    output: Path
    faults: list[str] = field(default_factory=list)  # of describing the model

    @cached_property
    def described(self) -> tuple[ModelConfig, Tiling, PreTrainedTokenizerFast] | None:
        """The model's configuration, tiling and tokenizer; None where it is not at hand, which `check_models` tells."""
        from anyres_vlm.checkpoints.describe import describe_model

        try:
            require_reachable(self.config.model)
            return describe_model(self.config.model)
        except (DataError, UsageError) as error:
            self.faults.append(str(error))
            return None

    @property
    def stages(self) -> tuple[StageName, ...]:
        """Those that a run of this config has."""
        return get_args(StageName)


def check_deepspeed(case: Case) -> Iterator[Finding]:
    """Whether it is there, agrees with the machine and takes a step under each preset that the run names."""
    presets = sorted({preset for name in case.stages if (preset := case.config.stage(name).deepspeed)})
    if find_spec("deepspeed") is None:
        words = f"not installed, the config names {', '.join(presets) or 'no preset'}"
        yield judge("deepspeed", not presets, words, "pip install 'anyres-vlm[deepspeed]'")
        return
    if not presets:
        yield Finding("deepspeed", "ok", f"{version('deepspeed')}, not used by this config")
        return
    import torch  # start-up time

    from anyres_vlm.train.engine.deepspeed_settings import find_preset, resolve_deepspeed
    from anyres_vlm.train.engine.ranks import try_presets

    resolved = [
        resolve_deepspeed(find_preset(preset), case.config, name, ranks=0, has_cuda=torch.cuda.is_available())
        for name in case.stages
        if (preset := case.config.stage(name).deepspeed)
    ]
    for warning in dict.fromkeys(line for settings in resolved for line in settings.warnings):
        yield Finding("deepspeed", "warn", warning)
    split = {settings.path: settings for settings in resolved if settings.zero_stage}
    device = try_presets(list(split.values()), bf16=case.config.precision == "bf16")
    words = f"{version('deepspeed')} on {device} took a step under {', '.join(presets)}"
    yield Finding("deepspeed", "ok", f"{words}; AdamW is torch's, so that no op has to be compiled")


def check_trackers(case: Case) -> Iterator[Finding]:
    """Whether what the run reports to, and what draws its pictures, is installed."""
    from anyres_vlm.train.engine.engine import require_trackers

    require_trackers(case.config.trackers)
    yield Finding("trackers", "ok", ", ".join(("tensorboard", *case.config.trackers)))
    if find_spec("matplotlib") is None:
        rendered = any(case.config.stage(name).data.rendered for name in case.stages)
        words = "matplotlib is missing: " + ("its fonts draw the rendered data" if rendered else "no loss curves")
        yield Finding("matplotlib", "fail" if rendered else "warn", words, "pip install 'anyres-vlm[demo]'")


def check_recipe(case: Case) -> Iterator[Finding]:
    """Settings that are known to spoil the recipe."""
    from anyres_vlm.train.recipe import recipe_warnings

    warnings = dict.fromkeys(line for name in case.stages for line in recipe_warnings(case.config, name))
    for warning in warnings:
        yield Finding("recipe", "warn", warning)
    if not warnings:
        yield Finding("recipe", "ok", "no setting that is known to spoil it")


def check_models(case: Case) -> Iterator[Finding]:
    """Whether tokenizer, encoder and weights are at hand, and whether memory holds them for every rank."""
    if case.described is None:
        yield Finding("model", "fail", case.faults[0])
        return
    model, tiling, tokenizer = case.described
    yield Finding("model", "ok", f"{len(tokenizer):,} tokens, tiles of {tiling.tile} px, template {model.template}")
    names = [case.config.model.checkpoint] if isinstance(case.config.model, CheckpointConfig) else [model.llm]
    if not isinstance(case.config.model, CheckpointConfig) and model.encoder.kind == "clip":
        names.append(model.encoder.name)
    sizes = {name: _numbers(name) for name in names}
    for name, size in sizes.items():
        if size is None:
            remedy = f"the first start fetches what is missing; before: hf download {name}"
            yield Finding("weights", "warn", f"{name}: no weights at hand", remedy)
        else:
            is_pickle = any(path.suffix == ".bin" for path in _weight_files(name))
            kind = ", in .bin files: pickle, of which only tensors are read" if is_pickle else ""
            yield Finding("weights", "ok", f"{name}: {size / 1e6:,.1f} M numbers{kind}")
    ranks, free = _local_ranks(), free_memory()
    held = 4 * sum(size or 0 for size in sizes.values()) * ranks
    words = f"{gigabytes(free)} free; weights in fp32, whole on each of {ranks} local ranks, take {gigabytes(held)}"
    remedy = "fewer ranks a node, or a smaller model; anyres estimate says what training needs on the device"
    yield judge("memory", held < free, words, remedy)


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Loader workers hand tiles over through /dev/shm, of which containers have 64 MB unless told."""
    if case.config.workers == 0 or not SHM.is_dir():
        yield Finding("shared memory", "ok", "not used: no loader workers" if SHM.is_dir() else "no /dev/shm here")
        return
    if case.described is None:
        yield Finding("shared memory", "warn", "not judged: it depends on the model")
        return
    _, tiling, _ = case.described
    capacity = max(case.config.stage(name).capacity for name in case.stages)
    pack = capacity / tiling.patches * 3 * tiling.tile**2  # bytes, where every tile keeps all of its tokens
    batches = case.config.workers * PREFETCHED * _local_ranks()
    size = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
    words = f"{gigabytes(size)} free; about {gigabytes(batches * pack)} for {batches} batches of loader workers"
    remedy = "docker run --shm-size, a larger emptyDir at /dev/shm, or fewer workers"
    yield judge("shared memory", size > batches * pack, words, remedy)


def check_disk(case: Case) -> Iterator[Finding]:
    """A file is written, synced and renamed where the run's folder is or will be; room for its checkpoints."""
    place = next(path for path in (case.output.absolute(), *case.output.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".anyres-doctor-") as folder:
            file = Path(folder) / "new"
            with file.open("wb") as stream:
                stream.write(os.urandom(1 << 20))
                stream.flush()
                os.fsync(stream.fileno())
            file.replace(Path(folder) / "written")
    except OSError as error:
        yield Finding("disk", "fail", f"{place}: {error.strerror}", "choose another --output, or make room")
        return
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    model = case.config.model
    names = [model.checkpoint] if isinstance(model, CheckpointConfig) else [model.llm]
    kept = case.config.keep_checkpoints + 1  # the new one is written before the oldest goes
    # Adapters are small: what counts with LoRA are the models of both stages.
    each = 2 * MODEL_BYTES + (CHECKPOINT_BYTES * kept if case.config.stage2.lora is None else 0)
    need = each * sum(_numbers(name) or 0 for name in names)
    words = f"{place} can be written, {gigabytes(free)} free; {kept} checkpoints and two models take "
    words += f"about {gigabytes(need)}" if need else f"{each} bytes a weight"
    yield judge("disk", free > need, words, "make room, or lower keep_checkpoints")


def check_data(case: Case) -> Iterator[Finding]:
    """Each stage's data: opened, and some records and their images looked at, from the first to the last."""
    from anyres_vlm.data.sources import open_source
    from anyres_vlm.data.sources.open import peek

    for name in case.stages:
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
        words = f"{data.path}: {len(source):,} records, {looked.looked - len(looked.bad)} of {looked.looked} looked at"
        if looked.looked and not looked.bad:
            yield Finding(check, "ok", f"{words} are good")
            continue
        is_cause = len(looked.bad) >= max(data.max_bad_fraction, SHARE_OF_BAD) * looked.looked
        first = f" are good; the first bad one: {looked.bad[0]}" if looked.bad else ""
        remedy = f"anyres index {data.path} lists all of them" if looked.bad else "there is nothing to train on"
        yield Finding(check, "fail" if is_cause else "warn", words + first, remedy)


def check_index(case: Case) -> Iterator[Finding]:
    """Each stage's index: whether there is one, and whether it is of these settings."""
    from anyres_vlm.data.conversation import ConversationTokenizer
    from anyres_vlm.data.index.rows import IndexSettings
    from anyres_vlm.data.index.table import read_index
    from anyres_vlm.train.steps import INDEX_FILE

    if case.described is None:
        yield Finding("index", "warn", "not judged: it depends on the model")
        return
    model, tiling, tokenizer = case.described
    for name in case.stages:
        stage = case.config.stage(name)
        path, check = stage.data.index or case.output / name / INDEX_FILE, f"{name} index"
        if not path.exists():
            yield Finding(check, "ok", f"none at {path} yet: the run makes it, or anyres index beforehand")
            continue
        try:
            index = read_index(path)
        except DataError as error:
            yield Finding(check, "warn", str(error), "the run makes it again")
            continue
        conversation = ConversationTokenizer(stage.template or model.template, tokenizer, stage.data.image_position)
        now = IndexSettings(conversation, tiling, stage.max_length).words
        then = {"image_position": "as_is", **index.settings}  # older indexes do not say it
        other = [key for key in now if _tupled(now[key]) != _tupled(then.get(key))]
        if other:
            yield Finding(check, "warn", f"{path} was made for another {', '.join(other)}", "the run makes it again")
        else:
            yield Finding(check, "ok", f"{path}: {int(index.ok.sum()):,} of {len(index):,} records are samples")


def _tupled(value: object) -> object:
    """A value as it compares equal before and after JSON, which knows no tuples."""
    return tuple(map(_tupled, value)) if isinstance(value, (list, tuple)) else value


def require_reachable(model: ModelConfig | CheckpointConfig) -> None:
    """Raise `DataError` for base models that are neither here nor to be had; the client itself tries for minutes."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants, try_to_load_from_cache

    from anyres_vlm.checkpoints.folders import HUB_ID, resolve

    names = [model.checkpoint] if isinstance(model, CheckpointConfig) else [model.llm, model.encoder.name]
    absent = [
        name
        for name in names
        if HUB_ID.fullmatch(name)
        and not Path(resolve(name)).exists()
        and not try_to_load_from_cache(name, "config.json")
    ]
    if not absent or getproxies():
        return
    host = urlsplit(constants.ENDPOINT)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        socket.create_connection((host.hostname or "", host.port or 443), timeout=PATIENCE_S).close()
    except OSError as error:
        raise DataError(
            f"{' and '.join(absent)} not in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be "
            f"reached ({error}): name local folders, or fill the cache elsewhere with hf download and set HF_HOME"
        ) from None


def free_memory() -> int:
    """Bytes of host memory that may still be used: the machine's, or what the container's limit leaves."""
    if MEMORY.exists():
        free = _lines(MEMORY)["MemAvailable"] * 1024
    else:  # no Linux: all that there is
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        cached = _lines(CGROUP / "memory.stat").get("inactive_file", 0)  # files that give way
        free = min(free, int(most) - int((CGROUP / "memory.current").read_text()) + cached)
    return free


def _lines(path: Path) -> dict[str, int]:
    """The numbers of a file of names and numbers, as the kernel writes them."""
    lines = (line.replace(":", " ").split() for line in path.read_text(encoding="ascii").splitlines())
    return {name: int(number) for name, number, *_ in lines}


def _local_ranks() -> int:
    import torch

    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (torch.accelerator.device_count() or 1)


def _weight_files(name: str) -> list[Path]:
    """The weight files of a folder or of a hub id's snapshot, as far as they are at hand."""
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


def _numbers(name: str) -> int | None:
    """How many numbers the weights of a folder or hub id have; None where none is at hand."""
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
            raise DataError(f"{path}: its weights cannot be read ({error}): fetch it again") from None
    return total or None


CHECKS: dict[str, Callable[[Case], Iterable[Finding]]] = {
    "deepspeed": check_deepspeed,
    "trackers": check_trackers,
    "recipe": check_recipe,
    "model": check_models,
    "shared memory": check_shared_memory,
    "disk": check_disk,
    "data": check_data,
    "index": check_index,
}
