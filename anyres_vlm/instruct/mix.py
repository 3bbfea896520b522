"""Join several sets of conversations into one mixture for training, in the volumes of the published mixtures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import Field, field_validator

from anyres_vlm.config import Frozen, Positive, read_mapping, validated
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.files import replacing
from anyres_vlm.instruct.academic import (
    COCO_2017,
    Conversation,
    conversation,
    read_aokvqa,
    read_genome,
    read_gqa,
    read_ocrvqa,
    read_refcoco,
    read_textvqa,
    read_vqav2,
)
from anyres_vlm.instruct.annotations import entry_of, stream_records
from anyres_vlm.instruct.job import KINDS
from anyres_vlm.schema import IMAGE_TOKEN

SetName = Literal["generated", "vqav2", "okvqa", "gqa", "textvqa", "ocrvqa", "aokvqa", "refcoco", "genome", "chat"]
Preset = Literal["80k", "158k", "665k"]
LLAVA_158K = {"conversation": 58_000, "detail": 23_000, "reasoning": 77_000}
# Number of conversations in each set. 665k is LLaVA-1.5's mixture, but with TextVQA's questions instead of TextCaps'
# captions of the same images.
PRESETS: Mapping[Preset, Mapping[str, int]] = {
    "80k": {"conversation": 40_000, "detail": 20_000, "reasoning": 20_000},
    "158k": LLAVA_158K,
    "665k": LLAVA_158K
    | {"vqav2": 82_783, "gqa": 72_140, "okvqa": 8_998, "ocrvqa": 80_000, "aokvqa": 66_160, "textvqa": 21_953}
    | {"refcoco": 48_447, "genome": 86_417, "chat": 40_688},
}
MIXTURE, LICENCES = "mixture.yaml", "SOURCES.md"
SPOKEN = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "chatgpt": "gpt", "bard": "gpt"}


class SetFiles(Frozen):
    """Files of a set. `annotations` are VQAv2's answers or RefCOCO's boxes."""

    data: Path  # the set's official file
    annotations: Path | None = None  # the set's second file, if it has one
    images: Path | None = None  # image folder
    image_name: str | None = None  # file name for an image's number, such as {:012}.jpg
    volume: Positive | None = None  # conversations to draw, instead of the preset's number; per kind if generated

    @field_validator("image_name")
    @classmethod
    def _takes_a_number(cls, name: str | None) -> str | None:
        try:
            return None if name is None else (name.format(1) and name)
        except (LookupError, ValueError) as error:
            raise ValueError(f"expected a name with one number, such as {COCO_2017}: {error!r}") from None


class MixConfig(Frozen):
    """Configuration of `anyres instruct mix`. Paths are relative to its file. Without a preset, all data is taken."""

    sources: Annotated[dict[SetName, SetFiles], Field(min_length=1)]  # by name
    preset: Preset | None = None  # number of conversations per set
    seed: Annotated[int, Field(ge=0)] = 0  # of the random draw


def mix(config: Path, out: Path, preset: str | None) -> dict[str, tuple[int, int | None]]:
    """Write each set as LLaVA JSON, the mixture of them and the list of licences. Returns (found, drawn) for each.

    `drawn` is None for a set that is taken whole. Raises `UsageError` for a set that the preset lacks, and `DataError`
    for a broken one.
    """
    content = read_mapping(config)
    chosen = validated(MixConfig, content if preset is None else content | {"preset": preset}, config)
    volumes = {} if chosen.preset is None else PRESETS[chosen.preset]
    out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, object]] = []
    counts: dict[str, tuple[int, int | None]] = {}
    for name, given in chosen.sources.items():
        names = KINDS if name == "generated" else (name,)
        if volumes and not set(names) & set(volumes):
            raise UsageError(f"config {config}: preset {chosen.preset} has no {name}: remove it, or use 665k")
        files = _resolved(given, config.absolute().parent)
        for part, found in _write(name, files, out, chosen.seed).items():
            volume = given.volume or volumes.get(part)
            drawn = volume if volume is not None and volume < found else None
            counts[part] = (found, drawn)
            entry: dict[str, object] = {"path": f"{part}.json", "images": str(files.images or files.data.parent)}
            parts.append(entry if drawn is None else entry | {"random": drawn, "seed": chosen.seed})
    (out / MIXTURE).write_text(yaml.safe_dump({"sources": parts}, sort_keys=False), encoding="utf-8")
    missing = {name: count for name, count in volumes.items() if name not in counts}
    (out / LICENCES).write_text(_licences(counts, missing, chosen.preset), encoding="utf-8")
    return counts


def _write(name: SetName, files: SetFiles, out: Path, seed: int) -> dict[str, int]:
    """Write a set as one LLaVA JSON, or one per kind. Returns the number of conversations in each."""
    if name == "generated":
        each = {kind: _write_json(_of_kind(files.data, kind), out / f"{kind}.json") for kind in KINDS}
        written: dict[str, int] = {kind: count for kind, count in each.items() if count}
    else:
        written = {name: _write_json(_read(name, files, seed), out / f"{name}.json")}
    if not all(written.values()) or not written:
        raise DataError(f"{files.data}: no conversations for {name}; expected the training split of this set")
    return written


def _read(name: SetName, files: SetFiles, seed: int) -> Iterable[Conversation]:
    match name:
        case "vqav2" | "okvqa":
            return read_vqav2(files.data, files.annotations, files.image_name)
        case "gqa":
            return read_gqa(files.data)
        case "textvqa":
            return read_textvqa(files.data)
        case "ocrvqa":
            return read_ocrvqa(files.data)
        case "aokvqa":
            return read_aokvqa(files.data, files.image_name)
        case "refcoco":
            return read_refcoco(files.data, files.annotations, files.image_name, seed)
        case "genome":
            return read_genome(files.data, files.images, seed)
        case _:
            return read_chat(files.data)


def read_chat(data: Path) -> Iterator[Conversation]:
    """Read text-only chat in ShareGPT's format, from the first question on until the roles stop alternating."""
    for number, entry in enumerate(stream_records(data), start=1):
        with entry_of(data, "conversation", entry):
            said = [(SPOKEN.get(str(turn["from"])), str(turn["value"]).strip()) for turn in entry["conversations"]]
            name = str(entry.get("id", number))
        while said and said[0][0] != "human":
            said.pop(0)
        pairs = []
        for (asker, question), (answerer, answer) in zip(said[::2], said[1::2], strict=False):
            if (asker, answerer) != ("human", "gpt") or not question or not answer or IMAGE_TOKEN in question + answer:
                break
            pairs.append((question, answer))
        if pairs:
            yield conversation(name, None, pairs)


def _of_kind(data: Path, kind: str) -> Iterator[Conversation]:
    for entry in stream_records(data):
        with entry_of(data, "conversation", entry):
            if entry["kind"] == kind:
                yield entry


def _write_json(conversations: Iterable[Conversation], path: Path) -> int:
    """Write a JSON list with one element per line. Returns their number."""
    count = 0
    with replacing(path) as stream:
        for entry in conversations:
            stream.write(",\n" if count else "[\n")
            stream.write(json.dumps(entry, ensure_ascii=False))
            count += 1
        stream.write("\n]\n" if count else "[]\n")
    return count


def _resolved(files: SetFiles, folder: Path) -> SetFiles:
    paths = {name: getattr(files, name) for name in ("data", "annotations", "images")}
    return files.model_copy(update={name: folder / path.expanduser() for name, path in paths.items() if path})


def _licences(counts: Mapping[str, tuple[int, int | None]], missing: Mapping[str, int], preset: Preset | None) -> str:
    """Return a Markdown table of the sets with their sources and licences."""
    total = sum(drawn or found for found, drawn in counts.values())
    lines = [f"# Sources: {total:,} conversations" + (f" of preset {preset}" if preset else ""), ""]
    lines += ["| set | conversations | found | source | licence |", "|---|---:|---:|---|---|"]
    for name, (found, drawn) in counts.items():
        source = SOURCES[name]
        lines.append(f"| {name} | {drawn or found:,} | {found:,} | {source.url} | {source.licence} |")
    if missing:
        lines += ["", "Not given: " + ", ".join(f"{name} ({count:,})" for name, count in missing.items()) + "."]
    lines += [
        "",
        "Images have licences of their own: COCO's are Flickr users', under terms that differ from image to image.",
    ]
    return "\n".join(lines) + "\n"


class Source(NamedTuple):
    """Source and licence of a set, as its authors state them; read their terms before publishing a model."""

    url: str
    licence: str


GENERATED = Source(
    "generated by `anyres instruct generate`",
    "COCO annotations CC BY 4.0; the terms of the endpoint's provider apply to its model's output",
)
SOURCES = {
    "conversation": GENERATED,
    "detail": GENERATED,
    "reasoning": GENERATED,
    "vqav2": Source("https://visualqa.org", "annotations CC BY 4.0"),
    "okvqa": Source("https://okvqa.allenai.org", "annotations CC BY 4.0"),
    "gqa": Source("https://cs.stanford.edu/people/dorarad/gqa", "CC BY 4.0"),
    "textvqa": Source("https://textvqa.org", "CC BY 4.0"),
    "ocrvqa": Source("https://ocr-vqa.github.io", "research use; book covers belong to their publishers"),
    "aokvqa": Source("https://github.com/allenai/aokvqa", "MIT, according to its repository"),
    "refcoco": Source("https://github.com/lichengunc/refer", "none stated for the expressions: ask the authors"),
    "genome": Source("https://homes.cs.washington.edu/~ranjay/visualgenome", "CC BY 4.0"),
    "chat": Source("as given", "see its source; ShareGPT conversations were published by their users without one"),
}
