"""The chunked loss equals the dense one: value and gradients, with bias, frozen or tied head, and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyres_vlm.errors import UsageError
from anyres_vlm.model.loss import chunk_positions, summed_loss
from anyres_vlm.schema import IGNORE_INDEX, supervision

LENGTHS = (1, 14, 25)
DOCUMENTS = ((0, 1), (1, 15), (15, 40))


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 30, (1, 40), generator=generator)
    labels[torch.rand(1, 40, generator=generator) < 0.4] = IGNORE_INDEX
    return torch.randn(1, 40, 8, generator=generator, requires_grad=True), labels


def packed_loss(hidden: Tensor, labels: Tensor, head: nn.Module, chunk: int | None = None) -> Tensor:
    return summed_loss(hidden, *supervision(labels, LENGTHS), head, chunk)


def dense_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Compute the loss per document over all positions with torch's own cross-entropy."""
    losses = [  # the first document has one token, which nothing predicts
        F.cross_entropy(head(hidden[0, a : b - 1]).float(), labels[0, a + 1 : b], reduction="sum")
        for a, b in DOCUMENTS[1:]
    ]
    return torch.stack(losses).sum()


@pytest.mark.parametrize("chunk", [512, 5, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_the_dense_ones(chunk: int, bias: bool) -> None:
    hidden, labels = problem()
    head = nn.Linear(8, 30, bias=bias)
    of = [hidden, *head.parameters()]
    expected = dense_loss(hidden, labels, head)
    total = packed_loss(hidden, labels, head, chunk)
    torch.testing.assert_close(total, expected)
    # divided, as a training step does
    gradients = torch.autograd.grad(total / 7, of)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected / 7, of))


def test_extreme_logits_keep_precision() -> None:
    hidden, labels = problem()
    head = nn.Linear(8, 30, bias=False)
    nn.init.normal_(head.weight, std=300.0)
    total, expected = packed_loss(hidden, labels, head), dense_loss(hidden, labels, head)
    assert total > 10_000
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, hidden), torch.autograd.grad(expected, hidden))


def test_a_frozen_head_costs_no_gradient_and_evaluation_costs_none() -> None:
    hidden, labels = problem()
    head = nn.Linear(8, 30, bias=False).requires_grad_(False)
    packed_loss(hidden, labels, head).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    with torch.no_grad():
        assert packed_loss(hidden, labels, head).grad_fn is None


@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden", "all"])
def test_no_memory_is_used_for_unneeded_gradients(monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    made: list[Tensor] = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda like, **options: made.append(like) or zeros_like(like, **options))
    hidden, labels = problem()
    head = nn.Linear(8, 30)
    parts = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    for name, part in parts.items():
        part.requires_grad_(frozen not in (name, "all"))
    packed_loss(hidden, labels, head)
    wanted = [part for part in parts.values() if part.requires_grad]
    assert len(made) == len(wanted)
    assert {tensor.shape[-2:] for tensor in made} >= {part.shape for part in wanted if part is not hidden}


def test_a_second_derivative_is_refused() -> None:
    hidden, labels = problem()
    total = packed_loss(hidden, labels, nn.Linear(8, 30))
    (gradient,) = torch.autograd.grad(total**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_gradient_reaches_a_tied_weight_once() -> None:
    """A data-parallel engine that reduces a gradient on arrival would lose a second contribution."""
    _, labels = problem()
    embedding, head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    head.weight = embedding.weight
    arrivals: list[Tensor] = []
    embedding.weight.register_post_accumulate_grad_hook(lambda weight: arrivals.append(weight.grad.clone()))
    ids = torch.arange(40)[None] % 30
    packed_loss(embedding(ids), labels, head).backward()
    (mine,) = arrivals
    (expected,) = torch.autograd.grad(dense_loss(embedding(ids), labels, head), embedding.weight)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("whole", [True, False])
def test_bf16_weights_and_autocast_are_close(whole: bool) -> None:
    hidden, labels = problem()
    head = nn.Linear(8, 30)
    expected = dense_loss(hidden, labels, head)
    gradients = torch.autograd.grad(expected, [hidden, head.weight])
    if whole:
        head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
        total = packed_loss(hidden, labels, head)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            total = packed_loss(hidden, labels, head)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=2e-3, atol=0)  # measured: 2e-4
    for mine, theirs in zip(torch.autograd.grad(total, [hidden, head.weight]), gradients, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_no_label_is_no_loss() -> None:
    hidden, labels = problem()
    head = nn.Linear(8, 30)
    total = packed_loss(hidden, torch.full_like(labels, IGNORE_INDEX), head)
    total.backward()
    assert total == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert not head.weight.grad.any()  # present, so that ranks exchange the same gradients


def test_no_prediction_crosses_documents() -> None:
    positions, targets = supervision(torch.arange(6)[None], (1, 3, 2))
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [2, 3, 5]


@pytest.mark.parametrize(
    ("device", "words", "positions"),
    [
        ("cpu", 32_064, 512),
        ("cpu", 256_000, 512),
        ("cuda", 1024, 2048),
        ("cuda", 64_000, 2048),
        ("cuda", 128_256, 1024),
        ("cuda", 152_064, 768),
        ("cuda", 10_000_000, 128),
    ],
)
def test_the_chunk_follows_device_and_vocabulary(device: str, words: int, positions: int) -> None:
    assert chunk_positions(words, device) == positions


def test_a_head_of_several_parts_is_refused() -> None:
    hidden, labels = problem()
    with pytest.raises(UsageError, match="plain linear language-model head, got Sequential"):
        packed_loss(hidden, labels, nn.Sequential(nn.Linear(8, 30)))
