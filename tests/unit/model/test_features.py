"""Cached features equal those of the encoder; stored records are read back intact or not at all."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.config import load_config, shipped_config
from anyres_vlm.errors import UsageError
from anyres_vlm.geometry import Size, plan_tiles
from anyres_vlm.model.encoder import ClipEncoder
from anyres_vlm.model.features import BATCH, FeatureCache, FeatureStore

GB = 10**9
SHAPE = (4, 32)  # of a stored record


def make_encoder(width: int = 32, layer: int = -2, seed: int = 0, std: float = 0.25, act: str = "gelu") -> ClipEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=width * 3 // 2,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            hidden_act=act,
        )
        encoder = ClipEncoder(CLIPVisionModel(config), layer, [0.5] * 3, [std] * 3)
    return encoder.eval().requires_grad_(False)


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: encoders this small spend their time on thread synchronisation, above all under load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_features_are_those_of_the_encoder_rounded_once(tmp_path: Path) -> None:
    encoder, tiles = make_encoder(), noise(6)
    cold = FeatureCache(encoder, tmp_path, GB)
    found = cold(tiles[[0, 1, 1, 2, 0]])
    alone = torch.cat([encoder(tile[None]) for tile in tiles])
    assert found.dtype == torch.float32
    assert torch.equal(found, alone.bfloat16().float()[[0, 1, 1, 2, 0]])
    assert cold.take_counts() == (2, 3)
    half = FeatureCache(encoder, tmp_path, GB)
    assert torch.equal(half(tiles), alone.bfloat16().float())
    assert half.take_counts() == (3, 3)
    assert torch.equal(half(tiles.flip(0)), alone.bfloat16().float().flip(0))
    assert half.take_counts() == (6, 0)
    assert cold(noise(0)).shape == (0, 4, 32)


@pytest.mark.parametrize("threads", [1, 2])
def test_features_do_not_depend_on_the_other_tiles(tmp_path: Path, threads: int) -> None:
    """With two threads, 5 of 64 of these tiles get different bf16 features alone than in a batch (fp32, AVX-512)."""
    torch.set_num_threads(threads)
    encoder, tiles = make_encoder(width=96, act="quick_gelu"), noise(250)
    together = FeatureCache(encoder, tmp_path / "a", GB)(tiles)
    cache = FeatureCache(encoder, tmp_path / "b", GB)
    assert torch.equal(torch.cat([cache(some) for some in tiles.split([1, 9, 3, 8, 229])]), together)
    shuffled = FeatureCache(encoder, tmp_path / "c", GB)(tiles.flip(0))
    assert torch.equal(shuffled.flip(0), together)


def test_misses_are_encoded_in_full_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, tiles = make_encoder(), noise(21)
    cache = FeatureCache(encoder, tmp_path, GB)
    cache(tiles[:2])
    sizes: list[int] = []
    encode = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda tiles: sizes.append(len(tiles)) or encode(tiles))
    cache(torch.cat([tiles, tiles]))
    assert sizes == [BATCH] * 3  # 19 tiles
    assert cache.take_counts() == (2 + 21, 2 + 19)
    cache(tiles)
    assert sizes == [BATCH] * 3


def test_encoders_layers_normalisations_and_precisions_are_kept_apart(tmp_path: Path) -> None:
    tiles = noise(2)
    changed = make_encoder()
    changed.vision_model.encoder.layers[0].mlp.fc1.bias[0] += 1e-7  # too little to show in bf16
    encoders = [
        make_encoder(),
        make_encoder(seed=1),
        make_encoder(layer=-3),
        make_encoder(std=0.26),
        make_encoder(act="quick_gelu"),
        changed,
    ]
    for number, encoder in enumerate(encoders, start=1):
        cache = FeatureCache(encoder, tmp_path, GB)
        assert torch.equal(cache(tiles)[1], encoder(tiles[1:])[0].bfloat16().float())
        assert cache.take_counts() == (0, 2)
        assert len(list(tmp_path.iterdir())) == number
    with torch.autocast("cpu", torch.bfloat16):
        mixed = FeatureCache(encoders[0], tmp_path, GB)
        mixed(tiles)
    assert mixed.take_counts() == (0, 2)
    again = FeatureCache(make_encoder(), tmp_path, GB)
    again(tiles)
    assert again.take_counts() == (2, 0)


def test_a_removed_folder_is_filled_again(tmp_path: Path) -> None:
    encoder, tiles = make_encoder(), noise(3)
    cache = FeatureCache(encoder, tmp_path, GB)
    first = cache(tiles)
    cache(tiles)
    for path in tmp_path.glob("*/*"):
        path.unlink()
    cache.take_counts()
    for counts in [(0, 3), (3, 0)]:
        assert torch.equal(cache(tiles), first)
        assert cache.take_counts() == counts


def test_a_full_cache_changes_no_feature(tmp_path: Path) -> None:
    encoder, tiles = make_encoder(), noise(8)
    free = FeatureCache(encoder, tmp_path / "free", GB)(tiles)
    full = FeatureCache(encoder, tmp_path / "full", 3 * 276)
    for _ in range(2):
        assert torch.equal(full(tiles), free)
    assert full.take_counts() == (3, 8 + 5)


def test_a_write_error_is_not_fatal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, tiles = make_encoder(), noise(2)
    expected = FeatureCache(encoder, tmp_path / "good", GB)(tiles)
    cache = FeatureCache(encoder, tmp_path / "bad", GB)
    (tmp_path / "bad" / cache.store.folder.name).write_text("no folder")
    for _ in range(2):
        assert torch.equal(cache(tiles), expected)
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]
    assert "no more features are cached" in caplog.text
    with pytest.raises(UsageError, match=r"cache_features\.folder.*choose a writable folder"):
        FeatureCache(encoder, tmp_path / "bad" / cache.store.folder.name, GB)


def test_only_the_features_of_a_model_change(tiny_bases: Path, tmp_path: Path) -> None:
    names = [f"model.llm={tiny_bases}/llm", f"model.encoder.name={tiny_bases}/vit"]
    model, _ = build_model(load_config(shipped_config("tiny"), names).model, 0)
    model.vision_tower.requires_grad_(False)
    plan = plan_tiles(Size(height=28, width=50), model.tiling)
    ids = torch.full((1, plan.total_tokens), model.image_token_id)
    tiles, words, weights = noise(plan.num_tiles), torch.arange(10)[None], list(model.state_dict())
    plain, text = model.embed(ids, tiles, [plan]), model.embed(words, noise(0), [])
    model.cached_features = cache = FeatureCache(model.vision_tower, tmp_path, GB)
    assert list(model.state_dict()) == weights
    assert torch.equal(model.embed(words, noise(0), []), text)
    model.embed(words, noise(0), []).sum().backward()
    assert model.image_newline.grad is not None
    assert not model.image_newline.grad.any()
    assert cache.take_counts() == (1, 1)  # the blank tile of a text-only pack
    rounded = model.embed(ids, tiles, [plan])
    assert not torch.equal(rounded, plain)
    assert (rounded - plain).abs().max() < 0.01 * plain.abs().max()  # bf16's 8 bits; seen: 0.0024


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
