"""What stands in for a model keeps what matters of it; what stands in for the data has its extremes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from huggingface_hub import snapshot_download
from replicas import CLIP, FACTS, LLAMA_3, LLMS, NEXT_MISTRAL, VICUNA_7B, build_replica

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.describe import encoder_geometry
from anyres_vlm.checkpoints.load_save import load_pretrained, save_pretrained
from anyres_vlm.config import CheckpointConfig, EncoderConfig, ModelConfig
from anyres_vlm.data.index.table import SCHEMA
from anyres_vlm.data.sources import open_source
from anyres_vlm.errors import DataError
from anyres_vlm.preflight.replica import CHOSEN, choose, replicate, shrink, small_files, weight_files, write_records
from anyres_vlm.synthetic.dataset import write_dataset


def table(**columns: Any) -> pa.Table:
    """Rows of an index with these columns; the others are empty."""
    count = len(columns["tokens"])
    empty = {"status": ["ok"] * count, "source": ["one"] * count, "heights": [[]] * count, "row": list(range(count))}
    given = empty | columns
    return pa.table({name: pa.array(given[name], SCHEMA.field(name).type) for name in given})


@pytest.mark.parametrize("name", LLMS)
def test_a_shrunk_llm_keeps_every_key_but_its_sizes(name: str) -> None:
    config = FACTS[name].config
    small = shrink(config, 2)
    ratio = config["num_attention_heads"] / config.get("num_key_value_heads", config["num_attention_heads"])
    assert small["num_hidden_layers"] == 2
    assert small["num_attention_heads"] / small["num_key_value_heads"] == ratio
    assert small["hidden_size"] % small["num_attention_heads"] == 0
    assert small["hidden_size"] <= 64
    assert not small.keys() & {"vocab_size", "rope_theta", "sliding_window", "max_position_embeddings", "model_type"}


def test_lists_of_layers_and_of_frequencies_stay_valid() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    config = {"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32, "num_hidden_layers": 4}
    small = shrink({**config, "rope_scaling": factors, "layer_types": ["full_attention"] * 4}, 2)
    assert small["hidden_size"] // small["num_attention_heads"] == 96, "a factor for each of 48 frequencies"
    assert small["layer_types"] == ["full_attention"] * 2
    with pytest.raises(DataError, match="model_type 'llama9' is unknown"):
        shrink({"model_type": "llama9"}, 2)


def test_a_replica_of_real_files_is_small_and_whole(tmp_path: Path) -> None:
    """Of the weights nothing is read: the files need not hold any."""
    for name, folder in ((LLAMA_3, "llm"), (CLIP, "clip")):
        build_replica(name, tmp_path / folder, "real")
        (tmp_path / folder / ("model.safetensors" if folder == "llm" else "pytorch_model.bin")).touch()
    encoder = EncoderConfig(name=str(tmp_path / "clip"), layer=-4)
    config = ModelConfig(llm=str(tmp_path / "llm"), encoder=encoder, template="llama_3")
    state = torch.get_rng_state()
    replica = replicate(config, tmp_path / "replica", 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(replica, ModelConfig)
    model, tokenizer = build_model(replica, 0)
    assert len(tokenizer) == 128257
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert (model.vision_tower.tile, model.vision_tower.patch) == (336, 14)
    made = json.loads((tmp_path / "replica" / "llm" / "config.json").read_text())
    assert made.keys() >= FACTS[LLAMA_3].config.keys()
    assert list((tmp_path / "replica" / "encoder").glob("*.bin")), "of the real ones' format"


def test_a_replica_of_a_checkpoint(tmp_path: Path) -> None:
    folder = build_replica(NEXT_MISTRAL, tmp_path / "real", "real")
    replica = replicate(CheckpointConfig(checkpoint=str(folder)), tmp_path / "replica", 0)
    assert isinstance(replica, CheckpointConfig)
    model, _ = load_pretrained(replica.checkpoint, "mistral")
    assert model.vision_tower.tile == 336
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < 20e6


def test_a_timm_encoder_of_other_arguments_is_saved_with_them(tmp_path: Path, tiny_bases: Path) -> None:
    encoder = EncoderConfig(kind="timm", name="vit_small_patch14_dinov2", layer=-4, tile=112)
    config = ModelConfig(llm=str(tiny_bases / "llm"), encoder=encoder, template="tiny", grid="1x1")
    replica = replicate(config, tmp_path / "replica", 0)
    assert isinstance(replica, ModelConfig)
    assert encoder_geometry(replica.encoder) == encoder_geometry(encoder) == (112, 14)
    model, tokenizer = build_model(replica, 0)
    assert (model.vision_tower.width, len(model.vision_tower.vision_model.blocks)) == (32, 1)
    (tmp_path / "saved").mkdir()
    save_pretrained(model, model.state_dict(), tokenizer, "", tmp_path / "saved")
    again, _ = load_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert timm.create_model("vit_small_patch14_dinov2", img_size=112).embed_dim == 384


def test_the_chosen_records_have_the_extremes() -> None:
    count = 5000
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 200, count)
    tokens[1234] = 900
    status = ["ok"] * count
    status[7], status[8], status[9] = "too_long", "malformed_record", "missing_file"
    heights = [[1]] * count
    heights[40] = [1, 1, 1]
    heights[50] = []
    source = ["one"] * count
    source[60] = "rare"
    chosen = choose(table(tokens=tokens, status=status, heights=heights, source=source), 10_000, 0)
    assert {1234, 7, 9, 40, 50, 60} <= set(chosen)
    assert 8 not in chosen
    assert 9000 < tokens[[row for row in chosen if status[row] == "ok"]].sum() < 11_000
    assert chosen == sorted(set(chosen))
    assert len(choose(table(tokens=tokens), 10**9, 0)) == CHOSEN


def test_written_records_are_those_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_dataset(tmp_path / "data", "instructions", 30, 0))
    monkeypatch.setenv("ANYRES_FOLLOW_LINKS", "1")
    path = write_records(source, [3, 5, 29], tmp_path / "chosen")
    again = open_source(path, path.parent / "images")
    for place, row in enumerate([3, 5, 29]):
        ours, theirs = again.record(place), source.record(row)
        assert (ours.id, ours.turns, len(ours.images)) == (theirs.id, theirs.turns, len(theirs.images))
        for one, other in zip(ours.images, theirs.images, strict=True):
            assert one.path is not None
            assert other.path is not None
            assert one.path.read_bytes() == other.path.read_bytes()


def test_written_records_keep_their_system_text(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "One."}]
    (tmp_path / "data.json").write_text(json.dumps([{"system": "Be brief.", "conversations": turns}]))
    path = write_records(open_source(tmp_path / "data.json"), [0], tmp_path / "chosen")
    assert open_source(path).record(0).system == "Be brief."


def test_vicuna_keeps_its_generation_settings(tmp_path: Path) -> None:
    build_replica(VICUNA_7B, tmp_path / "llm")
    build_replica(CLIP, tmp_path / "clip")
    encoder = EncoderConfig(name=str(tmp_path / "clip"))
    config = ModelConfig(llm=str(tmp_path / "llm"), encoder=encoder, template="vicuna_v1")
    replicate(config, tmp_path / "replica", 0)
    kept = (tmp_path / "replica" / "llm" / "generation_config.json").read_text()
    assert json.loads(kept)["temperature"] == 0.9


def test_weights_of_a_cached_hub_id_are_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--someone--model"
    build_replica(VICUNA_7B, cached / "snapshots" / "1234")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "anyres_vlm.preflight.replica.snapshot_download", partial(snapshot_download, cache_dir=tmp_path)
    )
    assert len(weight_files("someone/model")) == 2
    with pytest.raises(DataError, match="no such folder, and the download from the hub failed"):
        small_files("someone/other")
