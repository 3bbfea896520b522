"""Small tokenizers of every kind in use, trained here: SentencePiece-style, byte-level with four splits, WordPiece."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import resources

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from anyres_vlm.data.templates import TEMPLATES

MARKERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *MARKERS]
CORPUS = [
    *(text for template in TEMPLATES.values() for text in (template.head(), template.jinja)),
    "USER: What colour is the star? ASSISTANT: The star is red. User: a Assistant: b [INST] c [/INST] d",
    "def f(x):\n    return x  # twice\n\n\nprint(f(1))\n\n    and more\n \n  the end\n\n",
    "naïve café 日本語 日本 😀😀 👩‍👩‍👧 مرحبا שלום 12.50 + 3,000 = ... :) (yes) “no” 100%",
]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    split: pre_tokenizers.PreTokenizer | None = None,
    bos: bool = False,
    trim_offsets: bool = False,
    normalizer: normalizers.Normalizer | None = None,
) -> PreTrainedTokenizerFast:
    """GPT-2's own split, or another before the bytes."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = as_bytes if split is None else pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    tokenizer.post_processor = processors.Sequence(steps + ([begin_token()] if bos else []))
    return wrap(tokenizer)


def sentencepiece(model: str, form: str, byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """BPE or unigram over `▁`; the dummy space is put before every piece (`legacy`) or only before the text."""
    trained = Tokenizer(models.BPE() if model == "bpe" else models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    kind = trainers.BpeTrainer if model == "bpe" else trainers.UnigramTrainer
    trained.train_from_iterator(CORPUS * 3, kind(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    first = [*SPECIAL, *([f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else [])]
    if model == "bpe":
        pieces = dict.fromkeys([*first, *learnt["vocab"]])
        vocab = {piece: number for number, piece in enumerate(pieces)}
        merges = [tuple(pair) for pair in learnt["merges"]]
        if form == "llama_class":
            return LlamaTokenizer(
                vocab=vocab, merges=merges, pad_token="<pad>", additional_special_tokens=["<image>", *MARKERS]
            )
        tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=byte_fallback, unk_token="<unk>", fuse_unk=True))
    else:
        scores = [(piece, 0.0) for piece in first] + [(piece, score) for piece, score in learnt["vocab"][1:]]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=byte_fallback))
    if form == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=form == "split")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = begin_token()
    return wrap(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: lower case, accents and white space lost, a token put at the end."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return wrap(tokenizer)


def embedded() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(str(resources.files("anyres_vlm") / "assets" / "tiny-lm"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *MARKERS]})
    return tokenizer


def begin_token() -> processors.PostProcessor:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", *MARKERS],
    )


def split_on(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


EXACT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama_legacy": lambda: sentencepiece("bpe", "legacy"),
    "llama_class": lambda: sentencepiece("bpe", "llama_class"),
    "llama_split": lambda: sentencepiece("bpe", "split"),
    "unigram_legacy": lambda: sentencepiece("unigram", "legacy"),
    "unigram": lambda: sentencepiece("unigram", "split"),
    "gpt2": byte_level,
    "roberta": lambda: byte_level(bos=True, trim_offsets=True),
    "llama3": lambda: byte_level(split_on(CL100K), bos=True),
    "qwen": lambda: byte_level(split_on(CL100K.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "no_split": lambda: byte_level(split_on(r"\n{9}")),  # merges may cross everything but control tokens
    "embedded": embedded,
}


@cache
def exact_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of `EXACT`, trained once."""
    return EXACT[kind]()
