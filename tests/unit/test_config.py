"""Configurations: shipped ones load, mistakes are named with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyres_vlm.config import ModelConfig, load_config, shipped_config
from anyres_vlm.errors import UsageError

CONFIGS = sorted(p for p in (Path(__file__).parents[2] / "configs").glob("*.yaml") if not p.stem.startswith("ablation"))
TINY = shipped_config("tiny")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_how_to_run_them(path: Path) -> None:
    load_config(path)
    header = path.read_text().split("model:")[0]
    assert "anyres train" in header
    assert "Hardware" in header


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem not in ("tiny", "smollm2_135m")], ids=str)
def test_recipes_of_real_models_keep_the_recipe(path: Path) -> None:
    config = load_config(path)
    assert (config.stage1.learning_rate, config.stage1.batch_size) == (1e-3, 256)
    assert (config.stage2.learning_rate, config.stage2.batch_size) == (2e-5, 128)
    for stage in (config.stage1, config.stage2):
        assert (stage.epochs, stage.warmup_ratio, stage.weight_decay, stage.eta_min) == (1, 0.03, 0.0, 0.0)
    assert config.stage1.template == "plain"


def test_overrides_and_flags() -> None:
    config = load_config(TINY, ["stage2.learning_rate=1e-5", "seed=7"], {"model.grid": "3x3"})
    assert (config.stage2.learning_rate, config.seed, config.model.grid) == (1e-5, 7, "3x3")


@pytest.mark.parametrize(
    ("written", "pinpoints"),
    [
        ("(1x1),...,(2x3)", [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]),
        ("(1x2), (9x9), (2x3)", [(1, 2), (1, 3), (2, 2), (2, 3)]),  # the first and the last count
        ("[[28, 56], [56, 28]]", [(1, 2), (2, 1)]),
        ("[(28, 56), (56, 28)]", [(1, 2), (2, 1)]),
        ("((28, 56),)", [(1, 2)]),
    ],
)
def test_pinpoints_as_llava_next_writes_them(written: str, pinpoints: list[tuple[int, int]]) -> None:
    model = load_config(TINY, [f"model.pinpoints='{written}'"]).model
    assert isinstance(model, ModelConfig)
    expected = tuple((28 * first, 28 * second) for first, second in pinpoints)
    assert model.tiling(tile=28, patch=14).pinpoints == expected
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.learning_rat=1", "unknown key stage1.learning_rat; did you mean learning_rate?"),
        ("modle.grid=1x1", "unknown key modle; did you mean model?"),
        ("stage1.learning_rate=high", "stage1.learning_rate"),
        ("stage1.batch_size=0", "stage1.batch_size"),
        ("model.grid=2by2", "expected ROWSxCOLUMNS"),
        ("model.grid=13x1", "from 1 to 12"),
        ("stage1.capacity=10", "capacity=10 is below max_length"),
        ("stage1.data.path=x.json", "expected either `path`"),
        ("stage1.lora.rank=8", "stage 1 does not train the language model; put lora under stage2"),
        ("stage2.lora.rnk=8", "unknown key stage2.lora.rnk; did you mean rank?"),
        ("stage2.lora.rank=0", "stage2.lora.rank"),
        ("model.pinpoints=(0x1),...,(6x6)", "or a range of tiles such as (1x1),...,(6x6), at most 12 a side"),
        ("model.pinpoints='336'", "expected pairs of pixels"),
        ("model.pinpoints=[[336]]", "model.pinpoints"),
        ("stage1.data.image_position=back", "stage1.data.image_position"),
        ("stage2.lora.target_modules=[]", "stage2.lora.target_modules"),
        ("model.encoder.layer=[]", "model.encoder.layer"),
        ("model.encoder.layer=last", "model.encoder.layer"),
        ("model.encoder.tile=224", "tile=224 requires kind: timm"),
        ("seed", "expected key=value"),
        ("cache_features.foldr=x", "unknown key cache_features.foldr; did you mean folder?"),
        ("cache_features={folder: x, max_gb: 0}", "cache_features.max_gb"),
        ("seed.deep=1", "is a value, not a section"),
        ("seed=[", "not YAML"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(TINY, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cached_features_are_a_folder_or_a_section() -> None:
    assert load_config(TINY).cache_features is None
    short, long = (load_config(TINY, [f"cache_features{key}=~/f"]).cache_features for key in ("", ".folder"))
    assert short == long
    assert short is not None
    assert (short.folder, short.max_gb) == (Path.home() / "f", 50)
    for stage in ("stage1", "stage2"):
        with pytest.raises(UsageError, match=f"{stage}.vision_lr=2e-06 trains the encoder"):
            load_config(TINY, ["cache_features=f", f"{stage}.vision_lr=2e-6"])


def test_a_section_written_out_as_null_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TINY.read_text() + "cache_features: null\n")
    assert load_config(path, ["cache_features.folder=f", "stage1.data.augment.color=0.1"]).cache_features is not None


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\tx: 1", ""])
def test_files_that_are_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        load_config(path)
    with pytest.raises(UsageError, match="no such file"):
        load_config(tmp_path / "missing.yaml")
