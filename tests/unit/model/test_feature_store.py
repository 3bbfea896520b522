"""Records are read back intact or not at all, with several writers, kills and damaged files."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyres_vlm.model.features import FeatureStore

GB = 10**9
SHAPE = (4, 32)


def records(count: int) -> tuple[list[bytes], Tensor]:
    """Distinct keys and features."""
    features = torch.arange(count * SHAPE[0] * SHAPE[1]).view(count, *SHAPE).to(torch.bfloat16)
    return [number.to_bytes(16, "big") for number in range(count)], features


def read_all(store: FeatureStore, keys: Sequence[bytes]) -> dict[int, Tensor]:
    found = {}
    store.refresh()
    for number, key in enumerate(keys):
        out = torch.full(SHAPE, torch.nan, dtype=torch.bfloat16)
        if store.read(key, out):
            found[number] = out
    return found


def open_store(root: Path, max_bytes: int = GB) -> FeatureStore:
    return FeatureStore(root, "encoder", SHAPE, max_bytes)


def test_two_processes_share_records(tmp_path: Path) -> None:
    keys, features = records(6)
    one, other = open_store(tmp_path), open_store(tmp_path)
    one.write(keys[:2], features[:2])
    other.write(keys[2:4], features[2:4])
    assert set(read_all(one, keys)) == set(read_all(other, keys)) == {0, 1, 2, 3}
    one.write(keys[4:], features[4:])
    found = read_all(other, keys)
    assert len(found) == 6
    assert all(torch.equal(record, features[number]) for number, record in found.items())


@pytest.mark.parametrize(
    ("suffix", "damage", "left"),
    [
        (".features", lambda content: content[: 3 * 256 + 100], {0, 1, 2}),
        (".features", lambda content: b"", set()),
        (".features", lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:], {0, 2, 3, 4}),
        (".features", lambda content: content[256:512] + content[:256] + content[512:], {2, 3, 4}),
        (".features", lambda content: content[:256] + bytes(1024), {0}),
        (".keys", lambda content: content[:50], {0, 1}),
        (".keys", lambda content: content[20:36] + content[16:20] + content[:16] + content[36:], {2, 3, 4}),
        (".keys", lambda content: bytes([content[0] ^ 1]) + content[1:], {1, 2, 3, 4}),
        (".keys", lambda content: content[:17] + bytes([content[17] ^ 1]) + content[18:], {1, 2, 3, 4}),
    ],
)
@pytest.mark.parametrize("known", [False, True], ids=["before it is opened", "while it is open"])
def test_damage_is_detected(tmp_path, caplog, suffix, damage, left, known) -> None:
    keys, features = records(5)
    open_store(tmp_path).write(keys, features)
    store = open_store(tmp_path)
    if known:
        read_all(store, keys)
        left = left if suffix == ".features" else {0, 1, 2, 3, 4}  # keys are read once
    (path,) = tmp_path.glob(f"encoder/*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    found = read_all(store, keys)
    assert set(found) == left
    assert all(torch.equal(record, features[number]) for number, record in found.items())
    read_all(store, keys)
    assert len(caplog.records) <= 1
    if suffix == ".features":
        assert "missing features are computed again" in caplog.text
    lost = [number for number in range(5) if number not in left]
    store.write([keys[number] for number in lost], features[lost])
    assert len(read_all(store, keys)) == 5


def test_the_size_limit_spans_encoders_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, features = records(20)
    entry = 256 + 20
    FeatureStore(tmp_path, "another", SHAPE, GB).write(keys[:3], features[:3])
    (tmp_path / "another" / "notes.txt").write_bytes(bytes(5000))  # not the cache's
    store = open_store(tmp_path, 10 * entry + 140)
    for first in range(0, 20, 5):
        store.write(keys[first : first + 5], features[first : first + 5])
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*s")) == 10 * entry
    assert set(read_all(store, keys)) == set(range(7))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"{tmp_path} is full at max_gb=2.9e-06"]


def write_on(root: Path, first: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    store = FeatureStore(root, "encoder", (64, 1024), GB)
    for number in range(first, 10**6, 2):
        record = torch.full((1, 64, 1024), float(number)).to(torch.bfloat16)
        store.write([number.to_bytes(16, "big")], record)


def test_two_writers_killed_while_they_write(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_on, args=(tmp_path, first), daemon=True) for first in range(2)]
    for writer in writers:
        writer.start()
    store = FeatureStore(tmp_path, "encoder", (64, 1024), GB)
    out = torch.empty((64, 1024), dtype=torch.bfloat16)
    deadline = time.monotonic() + 60
    number = 0
    while number < 100 and time.monotonic() < deadline:  # read what is being written
        store.refresh()
        if store.read(number.to_bytes(16, "big"), out):
            assert torch.equal(out, torch.full_like(out, number))
            number += 1
    for writer in writers:
        writer.kill()
        writer.join()
    assert number == 100
    after = FeatureStore(tmp_path, "encoder", (64, 1024), GB)
    after.refresh()
    written = [path.stat().st_size // store.record_bytes for path in tmp_path.glob("*/*.features")]
    found = [number for number in range(2 * max(written) + 2) if after.read(number.to_bytes(16, "big"), out)]
    assert sum(written) - 2 <= len(found) <= sum(written)  # a kill may come between a record and its key
