"""The choice of the next token compared with a hand-computed nucleus, and the room for new tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from anyres_vlm.errors import UsageError
from anyres_vlm.inference.generation import Decoding, _Choice, room_for_answer

CPU = torch.device("cpu")


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> list[float]:
    """Return the probabilities of the most likely tokens that together reach `top_p`."""
    shares = torch.softmax(logits.double() / temperature, -1).tolist()
    kept, total = [], 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        kept.append(token)
        total += shares[token]
        if total >= top_p:
            break
    return [shares[token] / total if token in kept else 0.0 for token in range(len(shares))]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.6, 0.55), (1.0, 0.0)])
def test_sample_frequencies_match_the_nucleus(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.1, 1.0, -3.0]])
    expected = nucleus(logits[0], temperature, top_p)
    choice = _Choice(Decoding(1, temperature, top_p), [0], CPU)
    drawn = [choice(logits, [0])[0] for _ in range(2000)]
    counts = [drawn.count(token) / 2000 for token in range(6)]
    assert counts == pytest.approx(expected, abs=0.045)  # 4 deviations of a share of a half
    assert all(count == 0 for count, share in zip(counts, expected, strict=True) if share == 0)


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.tensor([[0.3, 200.0, -1.0, 199.9]])
    assert {_Choice(Decoding(1, heat), [0], CPU)(logits, [0])[0] for heat in (1e-3, 1e-60, 1e-320)} == {1}


def test_greedy_takes_the_first_of_equal_maxima() -> None:
    choice = _Choice(Decoding(), [0, 1], CPU)
    assert choice(torch.tensor([[0.0, 3.0, 3.0], [9.0, 1.0, 2.0]]), [0, 1]) == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("inf")}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"seed": -1}],
)
def test_invalid_decoding_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Decoding(**wrong)  # type: ignore[arg-type]


def test_room_is_bounded_by_positions_and_window() -> None:
    def model(**config: int | None) -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(**config))

    assert room_for_answer(model(max_position_embeddings=100, sliding_window=None), 90, 50) == 10
    assert room_for_answer(model(max_position_embeddings=100, sliding_window=50), 45, 50) == 5
    assert room_for_answer(model(), 10**6, 50) == 50
    with pytest.raises(UsageError, match=r"has 1,000 tokens, the context limit is 1,000 tokens, answer included"):
        room_for_answer(model(max_position_embeddings=1000), 1000, 1)
    with pytest.raises(UsageError, match="no token"):
        room_for_answer(model(), 0, 1)
