"""A pack is its documents run alone: losses and gradients, with and without images, for several families of models."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

from anyres_vlm.config import ModelConfig
from anyres_vlm.data.loader import collate
from anyres_vlm.errors import UsageError
from anyres_vlm.model import loss as loss_module
from anyres_vlm.model.hub import build_model
from anyres_vlm.model.loss import next_token_targets, summed_loss
from anyres_vlm.schema import IGNORE_INDEX, ImageRef, Record, Turn

GRADIENT_RTOL = 2e-5  # of the largest entry; worst seen over these packs in fp32 on CPU: 2e-6
WORDS = "red blue star circle where is the a of what 1 2 3".split()


def records(folder: Path, count: int, rng: random.Random) -> list[Record]:
    made = []
    for number in range(count):
        images = []
        for index in range(rng.choice((0, 0, 1, 1, 2))):
            width, height = rng.randint(5, 90), rng.randint(5, 90)
            pixels = np.random.default_rng(rng.randrange(10**6)).integers(0, 255, (height, width, 3), dtype=np.uint8)
            images.append(folder / f"{number}-{index}.png")
            Image.fromarray(pixels).save(images[-1])
        question = "<image>\n" * len(images) + " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        answer = " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))
        made.append(
            Record(
                str(number),
                tuple(ImageRef(str(path), path) for path in images),
                (Turn("user", question), Turn("assistant", answer)),
            )
        )
    return made


def family(bases: Path, folder: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama, or a random model of another family beside its tokenizer."""
    if name == "llama":
        return bases / "llm"
    shape = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    config = MistralConfig(**shape, sliding_window=None) if name == "mistral" else Qwen2Config(**shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [
        ("llama", "spatial_unpad", 1),
        ("llama", "spatial_unpad", 9),
        ("llama", "flat", 20),
        ("mistral", "flat", 7),
        ("qwen2", "spatial_unpad", 7),
    ],
)
def test_packed_equals_alone(tiny_bases, tiny_tokenizer, load_records, tmp_path, name, layout, count) -> None:
    config = ModelConfig.model_validate(
        {
            "llm": str(family(tiny_bases, tmp_path, name, tiny_tokenizer)),
            "encoder": {"name": str(tiny_bases / "vit")},
            "template": "vicuna_v1",
            "layout": layout,
        }
    )
    model, tokenizer = build_model(config, seed=0)
    made = records(tmp_path, count, random.Random(count))
    samples = load_records(made, "vicuna_v1", tokenizer, model.tiling)
    assert [sample.length for sample, _ in samples] == [
        collate([sample], 28, model.image_token_id).input_ids.shape[1] for sample in samples
    ]

    def gradients(packs: list[list]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for pack in packs:
            loss = model(collate(pack, 28, model.image_token_id))
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    packed_loss, packed = gradients([samples])
    alone_loss, alone = gradients([[sample] for sample in samples])
    assert packed_loss == pytest.approx(alone_loss, rel=1e-5)
    assert packed.keys() == alone.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for parameter, gradient in packed.items():
        # Some gradients are zero but for rounding (a key's bias moves no softmax): those are held to the largest.
        scale = max(float(alone[parameter].abs().max()), 1e-3 * largest)
        torch.testing.assert_close(gradient / scale, alone[parameter] / scale, atol=GRADIENT_RTOL, rtol=0)


def test_the_loss_is_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 40, 8, generator=generator, requires_grad=True)
    head = torch.nn.Linear(8, 30, bias=False)
    labels = torch.randint(0, 30, (1, 40), generator=generator)
    labels[torch.rand(1, 40, generator=generator) < 0.4] = IGNORE_INDEX
    ends = torch.tensor([0, 1, 15, 40], dtype=torch.int32)
    dense = sum(
        torch.nn.functional.cross_entropy(
            head(hidden[0, a : b - 1]), labels[0, a + 1 : b], ignore_index=IGNORE_INDEX, reduction="sum"
        )
        for a, b in ((1, 15), (15, 40))
    )
    (expected,) = torch.autograd.grad(dense, hidden, retain_graph=True)
    for chunk in (2048, 5):
        monkeypatch.setattr(loss_module, "CHUNK", chunk)
        total = summed_loss(hidden, labels, ends, head)
        (gradient,) = torch.autograd.grad(total, hidden)
        torch.testing.assert_close(total, dense)
        torch.testing.assert_close(gradient, expected)


def test_nothing_is_predicted_across_documents() -> None:
    labels = torch.arange(6)[None]
    targets = next_token_targets(labels, torch.tensor([0, 1, 4, 6]))
    assert targets.tolist() == [IGNORE_INDEX, 2, 3, IGNORE_INDEX, 5, IGNORE_INDEX]


def test_a_window_shorter_than_a_document_is_refused(tiny_bases, tiny_tokenizer, load_records, tmp_path) -> None:
    folder = family(tiny_bases, tmp_path, "mistral", tiny_tokenizer)
    content = (folder / "config.json").read_text().replace('"sliding_window": null', '"sliding_window": 8')
    (folder / "config.json").write_text(content)
    config = {"llm": str(folder), "encoder": {"name": str(tiny_bases / "vit")}, "template": "vicuna_v1"}
    model, tokenizer = build_model(ModelConfig.model_validate(config), seed=0)
    samples = load_records(records(tmp_path, 2, random.Random(1)), "vicuna_v1", tokenizer, model.tiling)
    with pytest.raises(UsageError, match="sliding window of 8: lower max_length to 8"):
        model(collate(samples, 28, model.image_token_id))


def test_llama_config_is_left_alone_by_saving(tiny_bases, load_records, tmp_path) -> None:
    """A saved model goes on with its own attention: once, saving reset it to a mask-free default."""
    from anyres_vlm.model.pretrained import save_pretrained

    config = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "vicuna_v1"}
    model, tokenizer = build_model(ModelConfig.model_validate(config), seed=0)
    samples = load_records(records(tmp_path, 5, random.Random(2)), "vicuna_v1", tokenizer, model.tiling)
    batch = collate(samples, 28, model.image_token_id)
    before = model(batch).item()
    save_pretrained(model, model.state_dict(), tokenizer, "", tmp_path)
    assert model(batch).item() == before
    assert isinstance(model.language_model.config, LlamaConfig)
