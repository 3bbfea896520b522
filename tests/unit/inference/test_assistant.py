"""Batches, streamed text and errors of the assistant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import load_pretrained
from anyres_vlm.config import ModelConfig
from anyres_vlm.errors import UsageError
from anyres_vlm.inference.assistant import Assistant, Conversation, inference_dtype, text_pieces
from anyres_vlm.inference.generation import Decoding, stream_tokens
from anyres_vlm.schema import ImageRef, Turn

WORDS = "Ein Stern ⭐ und 'Größe' — 漢字, 👩‍🚀!\n\n  Ende: naïve   café\n"


@pytest.fixture(scope="module")
def assistant(tiny_bases: Path) -> Assistant:
    bases = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "tiny"}
    return Assistant(*build_model(ModelConfig.model_validate(bases), seed=0))


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece with byte fallback: `▁` for spaces, the first of which the decoder drops."""
    vocabulary = {name: number for number, name in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for piece in ("▁", "▁Ein", "▁Stern", "▁und", "E", "n", "d", "e"):
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def sentence_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    head = tokenizer.convert_tokens_to_ids(["▁Ein", "▁Stern", "▁", "▁und", "▁"])
    return head + tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "⭐ 漢é".encode()])


def test_pieces_are_the_text_and_never_half_a_character(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sentencepiece = byte_fallback()
    for tokenizer, tokens, text in (
        (tiny_tokenizer, tiny_tokenizer(f"  {WORDS}", add_special_tokens=False)["input_ids"], WORDS.strip()),
        (sentencepiece, sentence_ids(sentencepiece), "Ein Stern  und ⭐ 漢é"),
    ):
        pieces = list(text_pieces(tokenizer, iter(tokens)))
        assert "".join(pieces) == text
        assert len(pieces) > len(tokens) / 4, "text comes as it is said"
        assert not any("\ufffd" in piece for piece in pieces)
        shown = ""
        for piece in pieces:
            shown += piece
            assert text.startswith(shown)
            assert not shown[-1].isspace()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>\n\n</think>\n\nthe star", "the star"),
        ("the star", "the star"),
        ("<think>\n\n</think>", ""),
        ("<think>\nhm", "<think>\nhm"),
        ("<think>", "<think>"),
    ],
)
def test_text_of_the_template_before_an_answer_is_removed(
    text: str, shown: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(text_pieces(tiny_tokenizer, tokens, "<think>\n\n</think>"))
    assert "".join(pieces) == shown
    assert len(pieces) > 2 or shown != "the star"


def test_an_answer_may_end_inside_a_character(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tiny_tokenizer("a 漢", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(text_pieces(tiny_tokenizer, tokens)) == tiny_tokenizer.decode(tokens) == "a \ufffd"


def test_pieces_are_yielded_before_the_next_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = 0

    def tokens():
        nonlocal asked
        for token in tiny_tokenizer("star", add_special_tokens=False)["input_ids"]:
            asked += 1
            yield token

    assert next(text_pieces(tiny_tokenizer, tokens())) == "s"
    assert asked == 1


def conversations(folder: Path) -> list[Conversation]:
    made = []
    for number in range(9):
        path = folder / f"{number}.png"
        Image.linear_gradient("L").convert("RGB").resize((11 * number + 5, 70 - 6 * number)).save(path)
        count = number % 3
        images = [ImageRef(str(path), path), Image.open(path).convert("RGB")][:count]
        made.append(Conversation([Turn("user", "<image>" * count + "what is this? " * (7 * number % 5))], images))
    return made


@pytest.mark.parametrize("decoding", [Decoding(9), Decoding(9, temperature=1.3, top_p=0.9, seed=3)])
def test_batching_changes_no_answer_and_no_order(assistant: Assistant, tmp_path: Path, decoding: Decoding) -> None:
    asked = conversations(tmp_path)
    done: list[int] = []
    one_batch = assistant.answer_many(asked, decoding)
    assert assistant.answer_many(asked, decoding, 1, done.append) == one_batch
    assert done == list(range(1, 10))
    done.clear()
    assert assistant.answer_many(asked, decoding, 150, done.append) == one_batch
    assert 1 < len(done) < 9
    assert one_batch[0] == assistant.answer(asked[0].turns, asked[0].images, decoding)
    assert "".join(assistant.stream(asked[0].turns, asked[0].images, decoding)) == one_batch[0].text
    assert len({answer.prompt_tokens for answer in one_batch}) > 4
    assert assistant.answer_many([], decoding) == []


def test_a_batch_keeps_to_its_tokens(assistant: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []

    def spy(model, ids, lengths, *rest):
        read.append(list(lengths))
        return stream_tokens(model, ids, lengths, *rest)

    monkeypatch.setattr("anyres_vlm.inference.assistant.stream_tokens", spy)
    assistant.answer_many(conversations(tmp_path), Decoding(4), 120)
    assert all(len(lengths) == 1 or len(lengths) * (max(lengths) + 4) <= 120 for lengths in read)
    flat = [length for lengths in read for length in lengths]
    assert flat == sorted(flat, reverse=True)
    assert max(map(len, read)) > 1


def test_samples_depend_on_the_seed_only(assistant: Assistant) -> None:
    asked = [Conversation([Turn("user", "what?")])] * 6
    sampled = Decoding(8, temperature=1.5)
    torch.manual_seed(1)
    first = assistant.answer_many(asked, sampled)
    torch.manual_seed(2)
    assert assistant.answer_many(asked, sampled) == first
    assert len({answer.text for answer in first}) > 3, "the same question several times has several answers"
    assert assistant.answer_many(asked, Decoding(8, temperature=1.5, seed=1)) != first


def test_errors_for_a_long_prompt_say_what_to_do(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assistant.model.language_model.config, "max_position_embeddings", 40)
    turns = [Turn("user", "what? " * 30)]
    with pytest.raises(UsageError, match=r"has \d+ tokens, the context limit is 40 tokens, answer included: use fewer"):
        assistant.answer(turns, [], Decoding(4))
    with pytest.raises(UsageError, match="the context limit is 40 tokens"):
        assistant.stream(turns, [], Decoding(4))
    short = assistant.answer([Turn("user", "a")], [], Decoding(4000))
    assert short.prompt_tokens + short.new_tokens <= 40


def test_images_and_places_must_match(assistant: Assistant) -> None:
    with pytest.raises(UsageError, match="has 1 <image>, but 0 images"):
        assistant.stream([Turn("user", "<image>")], [], Decoding(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_buffers_and_answers(checkpoint: Path, dtype: torch.dtype) -> None:
    model, tokenizer = load_pretrained(checkpoint, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}
    picture = Image.linear_gradient("L").convert("RGB")
    assert Assistant(model, tokenizer).answer([Turn("user", "<image>a")], [picture], Decoding(3)).new_tokens > 0


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_weights_are_of_a_dtype_that_the_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    """Regression: GPUs that only emulate bf16 were given bf16 weights, without a word."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card")
    assert inference_dtype(torch.device("cuda")) == dtype
    said = f"Card has compute capability {capability[0]}.{capability[1]}, bf16 needs 8.0: weights are converted to "
    assert [said in line for line in caplog.messages] == [True] * (capability < (8, 0))
    assert inference_dtype(torch.device("cpu")) == torch.float32


def test_cudnn_attention_is_off(assistant: Assistant) -> None:
    """Regression: cuDNN plans anew for each number of keys, so for each generated token."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    Assistant(assistant.model, assistant.tokenizer)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
