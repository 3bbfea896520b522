"""Hostile configurations of every kind, and what the project makes of one: a model of it, or one line of error."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from target import Target

from anyres_vlm.ablate.sweep import read_sweep
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.instruct.job import load_settings
from anyres_vlm.preflight.estimate.memory import read_sharding

LAUGHS = "a: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
TEXTS = [
    LAUGHS,
    "a: &a [*a]",
    "model: &m {llm: *m}",
    "a: !!python/object/apply:os.system ['touch here']",
    "!!python/name:os.system",
    "[" * 5_000,
    "{a: " * 5_000,
    "a:\n" + "- " * 50_000,
    "seed: 1\nseed: 2",
    "model: {llm: a, llm: b}",
    f"seed: {'9' * 5000}",
    f"seed: 0x{'f' * 5000}",
    "seed: !!int x",
    "seed: 2001-02-31",
    "seed: !!timestamp x",
    "seed: !!bool x",
    "seed: !!binary x",
    "<<: 3",
    "? [a]\n: b",
    "a: b\n---\na: c",
    "\0",
    "",
    "- 1",
    "seed: 1 " + "\n# " + "x" * 300_000,
]
VALUES: list[Any] = [None, True, -1, 0, 1, 1 << 63, -(1 << 70), 10**400, 1e300, float("nan"), float("inf")]
VALUES += [
    -float("inf"),
    -0.5,
    "",
    "x" * 5000,
    "a\0b",
    "\n",
    "../../x",
    "1e999",
    "9" * 30 + "x2",
    [],
    {},
    [[]],
    [1, {}],
]
VALUES += [{"x": 1}, {1: 2}, {None: None}, "/dev/zero", "~nobody/x", "1x0"]


@cache
def plain_runs() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What is in order: a run, a sweep and instruct's settings as shipped."""
    names = ("tiny", "ablation_tiny", "instruct/default")
    run, sweep, settings = (yaml.safe_load(shipped_config(name).read_text("utf-8")) for name in names)
    return run, sweep, settings


def places(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key and item."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path for key, value in items for path in [(*above, key), *places(value, (*above, key))]]


def replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there."""
    if not path:
        return value
    if isinstance(content, dict):
        return content | {path[0]: replaced(content[path[0]], path[1:], value)}
    return [replaced(item, path[1:], value) if at == path[0] else item for at, item in enumerate(content)]


def refused(error: Exception) -> bool:
    """False, and a fault if it was not said in one line of some length."""
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 3000, str(error)[:200]
    return False


def refuses(read: Callable[[], Any]) -> bool:
    """True if it refused, in one line. Anything but an error of ours is a fault."""
    try:
        read()
    except (UsageError, DataError) as error:
        return not refused(error)
    return False


def check_text(text: str | bytes, folder: Path) -> bool:
    """A file of any bytes as a configuration of every kind."""
    path = folder / "hostile.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    kinds = [load_config, read_sweep, lambda path: load_settings(path, {}), lambda path: open_source(path, None)]
    return sum(refuses(lambda kind=kind: kind(path)) for kind in kinds) < len(kinds)


def check_key(case: tuple[int, int, Any], folder: Path) -> bool:
    """A shipped file with another value at one key."""
    which, at, value = case
    content = plain_runs()[which]
    found = places(content)
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump(replaced(content, found[at % len(found)], value)), "utf-8")
    (folder / "tiny.yaml").write_bytes(shipped_config("tiny").read_bytes())
    kinds = (load_config, read_sweep, lambda path: load_settings(path, {}))
    return not refuses(lambda: kinds[which](path))


def check_override(text: str, folder: Path) -> bool:
    """`--set` with any text."""
    return not refuses(lambda: load_config(shipped_config("tiny"), [text]))


def check_preset(content: Any, folder: Path) -> bool:
    """DeepSpeed's JSON."""
    path = folder / "hostile.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8", "surrogatepass")
    return not refuses(lambda: read_sharding(str(path)))


def check_mixture(content: Any, folder: Path) -> bool:
    """A mixture's YAML."""
    (folder / "good.json").write_text("[]")
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": content}), "utf-8")
    return not refuses(lambda: len(open_source(path, None)))


values = st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=9)
yaml_text = st.lists(
    st.sampled_from([*"[]{}:,-?&*!|>'\"%@`#\n \t", "a", "&a ", "*a", "!!int ", "!!python/object:x ", "<<: ", "seed"])
    | st.text(max_size=5),
    max_size=40,
).map("".join)
keys = st.sampled_from(
    ["seed", "stage1", "model.llm", "stage1.data", "stage2.batch_size", "", ".", "a\n", "model.grid"]
)
zero_keys = st.sampled_from(["stage", "offload_optimizer", "reduce_bucket_size", "overlap_comm", "sub_group_size"])
json_values = values.filter(lambda value: not isinstance(value, dict) or all(isinstance(key, str) for key in value))
part_keys = st.sampled_from(["path", "images", "fraction", "first", "random", "weight", "seed"])
TARGETS = {
    "configurations: text": Target(st.sampled_from(TEXTS) | yaml_text | st.binary(max_size=60), check_text),
    "configurations: keys": Target(st.tuples(st.integers(0, 2), st.integers(0, 999), values), check_key),
    "configurations: --set": Target(
        st.tuples(keys, yaml_text | values.map(repr)).map("=".join) | st.text() | st.sampled_from(TEXTS), check_override
    ),
    "configurations: DeepSpeed": Target(
        st.dictionaries(st.sampled_from(["zero_optimization", "bf16", "x"]), json_values)
        | st.dictionaries(zero_keys, json_values).map(lambda zero: {"zero_optimization": zero})
        | yaml_text,
        check_preset,
    ),
    "configurations: mixture": Target(
        st.lists(st.dictionaries(part_keys, values).map(lambda part: {"path": "good.json"} | part)) | values,
        check_mixture,
    ),
}
