"""Cached features equal the encoder's, whatever the cache holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
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
from anyres_vlm.model.features import FeatureCache

GB = 10**9


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


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """One in 200 of these tiles gets different bf16 features when they are encoded as a batch (fp32, AVX-512)."""
    encoder, tiles = make_encoder(width=96, act="quick_gelu"), noise(960)
    together = FeatureCache(encoder, tmp_path / "a", GB)(tiles)
    cache = FeatureCache(encoder, tmp_path / "b", GB)
    assert torch.equal(torch.cat([cache(tile[None]) for tile in tiles]), together)


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
