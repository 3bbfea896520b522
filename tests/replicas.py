"""Facts of published base models and released checkpoints, and folders built from them with random weights.

`build_replica(name, folder)` writes what the repository `name` holds: the same configuration keys and values, the same
kind of tokenizer, weight names, format and dtype. `size="tiny"` shrinks the dimensions and writes random weights;
`size="real"` keeps the true dimensions and a tokenizer of the true number of tokens, and writes no weights. The
tokenizers are trained here; no text and no weight of the originals is copied.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

Size = Literal["tiny", "real"]
Settings = dict[str, Any]

TINY_TEXT = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 16,
}
TINY_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
VICUNA_7B, VICUNA_13B = "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5"
MISTRAL, MISTRAL_WINDOW = "mistralai/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.1"
LLAMA_2, LLAMA_3 = "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA_3_FIRST = f"{LLAMA_3}@first"  # its tokenizer.json before one that adds <|begin_of_text|> replaced it
YI = "NousResearch/Nous-Hermes-2-Yi-34B"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN2_SMALL, QWEN25 = "Qwen/Qwen2-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
CLIP = "openai/clip-vit-large-patch14-336"
NEXT_MISTRAL, NEXT_VICUNA = "llava-hf/llava-v1.6-mistral-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
LLAVA_15 = "llava-hf/llava-1.5-7b-hf"
ORIGINAL_NEXT, ORIGINAL_15 = "liuhaotian/llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.5-7b"

# How byte-level tokenizers split before merging; "digits": GPT-2's own way, each digit alone.
LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_3_SPLIT.replace("{1,3}", "")
CHATML = (
    "{%% for message in messages %%}%s{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}{%% endif %%}"
)
DEFAULT_SYSTEM = (
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou answer questions.<|im_end|>\n' }}{% endif %}"
)
INST_JINJA = (  # bos_token first; other roles, and two turns of one role, are refused
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant are known') }}{% endif %}{% endfor %}"
)
HEADER_JINJA = (
    "{% for message in messages %}{% set text = '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + "
    "message.content | trim + '<|eot_id|>' %}{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Processors of released checkpoints: the content of a message is a list of parts.
PARTS = (
    "{%% for message in messages %%}%s"
    "{%% for part in message.content if part.type == 'image' %%}{{ '<image>\n' }}{%% endfor %%}"
    "{%% for part in message.content if part.type == 'text' %%}%s{%% endfor %%}%s{%% endfor %%}%s"
)
PARTS_VICUNA = PARTS % (
    "{% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}",
    "{{ part.text + ' ' }}",
    "",
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
)
PARTS_MISTRAL = PARTS % (
    "{% if message.role == 'user' %}{{ '[INST] ' }}{% elif message.role == 'assistant' %}{{ ' ' }}{% endif %}",
    "{{ part.text }}",
    "{% if message.role == 'user' %}{{ ' [/INST]' }}{% elif message.role == 'assistant' %}{{ '</s>' }}{% endif %}",
    "",
)


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer's files and traits. `base` tokens were trained; `added` have the ids behind them, in order.

    `first` are the special tokens with the lowest ids, unknown, begin and end first in SentencePiece's.
    """

    kind: Literal["sentencepiece", "byte_level"]
    files: tuple[str, ...]
    base: int
    settings: Settings  # of tokenizer_config.json
    first: tuple[str, ...] = ("<unk>", "<s>", "</s>")
    added: tuple[str, ...] = ()
    dummy_prefix: bool = True  # SentencePiece puts a space before the text
    adds: str | None = None  # what the post-processor of tokenizer.json writes first
    split: str = LLAMA_3_SPLIT


@dataclass(frozen=True)
class Facts:
    """One repository. `build` names what the weights are of; `extra` are further JSON files."""

    build: Literal["llm", "clip", "llava_next", "llava", "original"]
    config: Settings
    tokenizer: TokenizerFacts | None = None
    generation_config: Settings | None = None
    weights: Literal["bin", "safetensors"] = "safetensors"
    shards: int = 1
    dtype: torch.dtype = torch.float16
    extra: dict[str, Settings] = field(default_factory=dict)


def build_replica(name: str, folder: Path, size: Size = "tiny") -> Path:
    """Write the files of the repository `name` into `folder` and return it."""
    facts = FACTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    config, tokens = json.loads(json.dumps(facts.config)), None
    generation, extra = facts.generation_config, json.loads(json.dumps(facts.extra))
    if facts.tokenizer is not None:
        tokens = _write_tokenizer(facts.tokenizer, folder, size)
    if size == "tiny":
        moved = (0, 0) if facts.tokenizer is None else (facts.tokenizer.base, tokens - len(facts.tokenizer.added))
        config, generation = _shrink(config, *moved), _shrink(generation, *moved)
        extra = {file: _shrink_processor(settings) for file, settings in extra.items()}
    _write_json(folder / "config.json", config)
    if generation is not None:
        _write_json(folder / "generation_config.json", generation)
    for file, settings in extra.items():
        _write_json(folder / file, settings)
    if size == "tiny":
        _write_weights(facts, config, folder)
    return folder


def sentencepiece_model(facts: TokenizerFacts, size: Size = "tiny") -> bytes:
    """The content of `tokenizer.model`, a BPE with bytes as fallback and text taken as it is."""
    model = sentencepiece_model_pb2.ModelProto.FromString(_train_sentencepiece(facts.first, facts.dummy_prefix))
    if size == "real":
        for number in range(facts.base - len(model.pieces)):
            model.pieces.add(piece=_filler(number), score=-1e6 - number)
    return model.SerializeToString()


# Tokenizers ----------------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """Sentences of every kind that the templates and the rendered data have."""
    colours, shapes = (
        "red green blue yellow black white orange".split(),
        "star circle square triangle page sign".split(),
    )
    places = ["at the top left", "at the bottom right", "in the middle of the picture", "next to the receipt"]
    lines = [f"The {c} {s} is {p}." for c, s, p in itertools.product(colours, shapes, places)]
    lines += [f"What colour is the {s} {p}? Answer with one word." for s, p in itertools.product(shapes, places)]
    lines += [f"USER: How many {s}s are there? ASSISTANT: There are {n}." for n, s in enumerate(shapes * 3)]
    lines += ["[INST] Describe the image. [/INST] It shows a total of 12.50 and the word BAKERY."] * 3
    lines += ["You are a helpful assistant, and answer the user's questions with detailed and polite words."] * 3
    return [
        *lines,
        "user\nassistant\nsystem\n\n",
        "def f(x):\n    return x + 1\n",
        "café naïve (yes) - no; 3,000 = 100%!",
    ]


@cache
def _train_sentencepiece(first: tuple[str, ...], dummy_prefix: bool) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus() * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_piece=first[0],
        bos_piece=first[1],
        eos_piece=first[2],
        control_symbols=list(first[3:]),
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def _filler(number: int) -> str:
    """A token that no text has, of the private planes."""
    plane, place = divmod(number, 0xFFFE)
    return chr(0xF0000 + place) + plane * chr(0x100000)


def _write_tokenizer(facts: TokenizerFacts, folder: Path, size: Size) -> int:
    """Write its files; returns the number of its tokens."""
    built = _byte_level(facts, size) if facts.kind == "byte_level" else _fast_sentencepiece(facts, size)
    if "tokenizer.model" in facts.files:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(facts, size))
    if "tokenizer.json" in facts.files:
        built.save(str(folder / "tokenizer.json"))
    tokens = built.get_vocab_size()
    special = {token: built.token_to_id(token) for token in (*facts.first, *facts.added)}
    settings = dict(facts.settings)
    if settings.pop("added_tokens_decoder", True):
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {str(number): {"content": name, **flags} for name, number in special.items()}
    _write_json(folder / "tokenizer_config.json", settings)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    _write_json(folder / "special_tokens_map.json", {name: settings[name] for name in names if settings.get(name)})
    return tokens


def _fast_sentencepiece(facts: TokenizerFacts, size: Size) -> Tokenizer:
    """The conversion that older releases saved as tokenizer.json, with a normaliser that replaces spaces."""
    pieces = [piece.piece for piece in sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model(facts)).pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (number, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, number in vocab.items()
        for cut in range(1, len(piece))
        if number >= len(facts.first) + 256 and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    if size == "real":
        vocab |= {_filler(number): len(pieces) + number for number in range(facts.base - len(pieces))}
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, byte_fallback=True, fuse_unk=True, unk_token=facts.first[0]))
    prepended = [normalizers.Prepend("▁")] if facts.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    stripped = [decoders.Strip(" ", 1, 0)] if facts.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return _finish(tokenizer, facts)


@cache
def _trained_byte_level(first: tuple[str, ...], split: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    by_digit = split == "digits"
    before = pre_tokenizers.Digits(True) if by_digit else pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_digit)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus() * 4, trainer)
    return str(tokenizer.to_str())


def _byte_level(facts: TokenizerFacts, size: Size) -> Tokenizer:
    content = json.loads(_trained_byte_level(facts.first, facts.split))
    vocab = content["model"]["vocab"]
    if size == "real":
        vocab |= {_filler(number): number for number in range(len(vocab), facts.base)}
    return _finish(Tokenizer.from_str(json.dumps(content)), facts)


def _finish(tokenizer: Tokenizer, facts: TokenizerFacts) -> Tokenizer:
    special = [AddedToken(token, normalized=False, special=True) for token in (*facts.first, *facts.added)]
    tokenizer.add_special_tokens(special)
    if facts.adds is not None:
        number = tokenizer.token_to_id(facts.adds)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{facts.adds} $A", special_tokens=[(facts.adds, number)]
        )
    elif facts.kind == "byte_level":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


# Configurations ------------------------------------------------------------------------------------------------------


def _shrink(settings: Any, base: int, tiny_base: int) -> Any:
    """Smaller dimensions, and ids and vocabularies moved from a tokenizer of `base` trained tokens to the tiny one."""
    if not isinstance(settings, dict):
        return settings
    changed = {key: _shrink(value, base, tiny_base) for key, value in settings.items()}
    is_vision = "patch_size" in settings
    if base and not is_vision:
        for key, value in settings.items():
            if key.endswith(("_token_id", "_token_index", "vocab_size")) and value is not None:
                ids = [number - base + tiny_base if number >= base else number for number in _listed(value)]
                changed[key] = ids if isinstance(value, list) else ids[0]
    tiny: Settings = TINY_VISION if is_vision else TINY_TEXT
    if "num_hidden_layers" in settings or is_vision or "num_key_value_heads" in settings or "vocab_size" in settings:
        changed |= tiny if settings.get("model_type") != "clip_text_model" else {**TINY_TEXT, "vocab_size": 99}
    if "num_key_value_heads" in settings:
        same = settings["num_key_value_heads"] == settings.get("num_attention_heads", 32)
        changed["num_key_value_heads"] = 4 if same else 2
    for key, value in {
        "max_window_layers": 2,
        "projection_dim": 16,
        "mm_hidden_size": 32,
        "image_seq_length": 4,
        "image_grid_pinpoints": TINY_PINPOINTS,
    }.items():
        if key in settings:
            changed[key] = value
    return changed


def _shrink_processor(settings: Settings) -> Settings:
    """An image processor's or processor's settings for tiles of 28 pixels."""
    changed = dict(settings)
    for key in ("size", "crop_size"):
        if isinstance(settings.get(key), dict):
            changed[key] = dict.fromkeys(settings[key], 28)
        elif key in settings:
            changed[key] = 28
    if "image_grid_pinpoints" in settings:
        changed["image_grid_pinpoints"] = TINY_PINPOINTS
    return changed


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [value]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Weights -------------------------------------------------------------------------------------------------------------


def _write_weights(facts: Facts, config: Settings, folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        named = WEIGHTS[facts.build](config)
    tensors = {name: tensor.to(facts.dtype).contiguous() for name, tensor in named.items()}
    names = sorted(tensors)
    stem, suffix = ("pytorch_model", "bin") if facts.weights == "bin" else ("model", "safetensors")
    places: dict[str, str] = {}
    for shard in range(facts.shards):
        part = f"-{shard + 1:05d}-of-{facts.shards:05d}" if facts.shards > 1 else ""
        held = {name: tensors[name] for name in names[shard :: facts.shards]}
        places |= dict.fromkeys(held, f"{stem}{part}.{suffix}")
        if facts.weights == "bin":
            torch.save(held, folder / f"{stem}{part}.{suffix}")
        else:
            save_file(held, folder / f"{stem}{part}.{suffix}", metadata={"format": "pt"})
    if facts.shards > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        _write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def _randomised(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights large enough that attention and answers depend on what was read."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _known(kind: str, settings: Settings) -> Any:
    return CONFIG_MAPPING[kind].from_dict({key: value for key, value in settings.items() if key != "architectures"})


def _llm_weights(config: Settings) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_config(_known(config["model_type"], config))
    named = _randomised(model)
    if config.get("tie_word_embeddings"):
        del named["lm_head.weight"]
    if config["model_type"] == "llama" and config["torch_dtype"] == "float16":  # buffers that older releases saved
        frequencies = torch.ones(config["hidden_size"] // config["num_attention_heads"] // 2)
        named |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": frequencies.clone() for n in range(2)}
    return named


def _clip_weights(config: Settings) -> dict[str, Tensor]:
    named = _randomised(CLIPModel(CLIPConfig.from_dict(config)))
    for part, positions in (("text_model", 77), ("vision_model", 5)):
        named[f"{part}.embeddings.position_ids"] = torch.arange(positions)[None]
    return named


def _renamed(named: dict[str, Tensor], pairs: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    changed = {}
    for name, tensor in named.items():
        before, after = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        changed[after + name.removeprefix(before)] = tensor
    return changed


def _released_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    pairs = [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ]
    return _renamed(_randomised(model), pairs)


def _next_weights(config: Settings) -> dict[str, Tensor]:
    return _released_weights(LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(config)))


def _llava_weights(config: Settings) -> dict[str, Tensor]:
    return _released_weights(LlavaForConditionalGeneration(LlavaConfig.from_dict(config)))


def _original_weights(config: Settings) -> dict[str, Tensor]:
    """The language model with projector, newline and, where it was tuned, tower inside `model`."""
    named = _llm_weights({**config, "model_type": "llama"})
    width = config["hidden_size"]
    shapes = {"0.weight": (width, 32), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    named |= {f"model.mm_projector.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    if config.get("mm_patch_merge_type") == "spatial_unpad":
        named["model.image_newline"] = 0.3 * torch.randn(width)
    if config.get("unfreeze_mm_vision_tower"):
        clip = _clip_weights(_shrink(FACTS[CLIP].config, 0, 0))
        vision = {name: tensor for name, tensor in clip.items() if name.startswith("vision_model.")}
        named |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in vision.items()}
    return named


WEIGHTS: dict[str, Callable[[Settings], dict[str, Tensor]]] = {
    "llm": _llm_weights,
    "clip": _clip_weights,
    "llava_next": _next_weights,
    "llava": _llava_weights,
    "original": _original_weights,
}

# Facts ---------------------------------------------------------------------------------------------------------------

_LLAMA: Settings = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA_TOKENS: Settings = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 4096,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
_BOTH = ("tokenizer.json", "tokenizer.model")
_VICUNA = Facts(
    "llm",
    {**_LLAMA, "_name_or_path": "vicuna-7b-v1.5", "pad_token_id": 0},
    TokenizerFacts("sentencepiece", ("tokenizer.model",), 32000, {**_LLAMA_TOKENS, "added_tokens_decoder": False}),
    {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_length": 4096,
        "pad_token_id": 0,
        "temperature": 0.9,
        "top_p": 0.6,
        "transformers_version": "4.31.0",
    },
    weights="bin",
    shards=2,
)
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
_MISTRAL_CONFIG: Settings = {
    **{key: value for key, value in _LLAMA.items() if key not in ("pretraining_tp", "rope_scaling")},
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
}
_MISTRAL_TOKENS = TokenizerFacts(
    "sentencepiece",
    _BOTH,
    32000,
    {
        **_LLAMA_TOKENS,
        "additional_special_tokens": [],
        "chat_template": INST_JINJA,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "spaces_between_special_tokens": False,
        "use_default_system_prompt": False,
    },
    adds="<s>",
)
_IDS: Settings = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.36.0"}
_HEADERS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(5, 251)),
)


def _llama_3(adds: str | None) -> Facts:
    config = {
        **_LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0",
        "vocab_size": 128256,
    }
    tokens = {
        "bos_token": "<|begin_of_text|>",
        "chat_template": HEADER_JINJA,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128009],
        "max_length": 4096,
        "temperature": 0.6,
        "top_p": 0.9,
        "transformers_version": "4.40.0.dev0",
    }
    tokenizer = TokenizerFacts("byte_level", ("tokenizer.json",), 128000, tokens, (), _HEADERS, adds=adds)
    return Facts("llm", config, tokenizer, generation, shards=4, dtype=torch.bfloat16)


_YI = Facts(
    "llm",
    {
        **_LLAMA,
        "attention_bias": False,
        "eos_token_id": 7,
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_attention_heads": 56,
        "num_hidden_layers": 60,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rope_theta": 5000000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 64000,
    },
    TokenizerFacts(
        "sentencepiece",
        _BOTH,
        64000,
        {
            **_LLAMA_TOKENS,
            "add_bos_token": False,
            "bos_token": "<|startoftext|>",
            "chat_template": CHATML % "",
            "eos_token": "<|im_end|>",
            "legacy": True,
            "pad_token": "<unk>",
        },
        (
            *("<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>", "<|System|>"),
            *("<|im_start|>", "<|im_end|>"),
        ),
        dummy_prefix=False,
    ),
    {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0},
    shards=3,
    dtype=torch.bfloat16,
)
_SMOLLM2 = Facts(
    "llm",
    {
        **{key: value for key, value in _LLAMA.items() if key != "pretraining_tp"},
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    TokenizerFacts(
        "byte_level",
        ("tokenizer.json",),
        49152,
        {
            "add_prefix_space": False,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": "<|im_start|>",
            "chat_template": CHATML % DEFAULT_SYSTEM,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 8192,
            "pad_token": "<|im_end|>",
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<|endoftext|>",
            "vocab_size": 49152,
        },
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
        split="digits",
    ),
    {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    dtype=torch.bfloat16,
)
_QWEN_ADDED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def _qwen(added: tuple[str, ...], **config: Any) -> Facts:
    settings = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        **config,
    }
    tokens = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": list(added[1:]),
        "bos_token": None,
        "chat_template": CHATML % DEFAULT_SYSTEM,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "transformers_version": "4.37.0",
    }
    tokenizer = TokenizerFacts("byte_level", ("tokenizer.json",), 151643, tokens, (), added, split=QWEN_SPLIT)
    return Facts("llm", settings, tokenizer, generation, dtype=torch.bfloat16)


_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_CLIP = Facts(
    "clip",
    {
        "_name_or_path": "openai/clip-vit-large-patch14-336",
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 1,
            "projection_dim": 768,
            "vocab_size": 49408,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.21.3",
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
    weights="bin",
    dtype=torch.float32,
    extra={
        "preprocessor_config.json": {
            "crop_size": 336,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": _MEAN,
            "image_std": _STD,
            "resample": 3,
            "size": 336,
        }
    },
)
_VISION: Settings = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _released(kind: Literal["llava_next", "llava"], text: Settings, tokens: Settings, jinja: str) -> Facts:
    is_next = kind == "llava_next"
    name = "LlavaNext" if is_next else "Llava"
    processor = {"processor_class": f"{name}Processor", "image_token": "<image>", "patch_size": 14}
    images: Settings = {
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _MEAN,
        "image_processor_type": "LlavaNextImageProcessor" if is_next else "CLIPImageProcessor",
        "image_std": _STD,
        "processor_class": f"{name}Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 336},
    }
    config: Settings = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": 576,
        "image_token_index": 32000,
        "model_type": kind,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.39.0.dev0",
        "vision_config": _VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    if is_next:
        config |= {"image_grid_pinpoints": _PINPOINTS, "use_image_newline_parameter": True, "vocab_size": 32064}
        images["image_grid_pinpoints"] = _PINPOINTS
    tokenizer = TokenizerFacts(
        "sentencepiece", _BOTH, 32000, {**tokens, "pad_token": "<pad>"}, added=("<image>", "<pad>"), adds="<s>"
    )
    extra = {
        "chat_template.json": {"chat_template": jinja},
        "preprocessor_config.json": images,
        "processor_config.json": {
            **processor,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}
    return Facts(kind, config, tokenizer, generation, shards=3, extra=extra)


_TEXT_VICUNA: Settings = {
    "_name_or_path": "lmsys/vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
_TEXT_MISTRAL: Settings = {
    "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}


def _original(weights: Literal["bin", "safetensors"], **config: Any) -> Facts:
    settings = {
        **_LLAMA,
        "architectures": ["LlavaLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_llama",
        "pad_token_id": 0,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        **config,
    }
    tokenizer = TokenizerFacts("sentencepiece", ("tokenizer.model",), 32000, _VICUNA.tokenizer.settings)  # type: ignore[union-attr]
    return Facts("original", settings, tokenizer, _VICUNA.generation_config, weights, shards=2)


FACTS: dict[str, Facts] = {
    VICUNA_7B: _VICUNA,
    VICUNA_13B: Facts(
        "llm",
        {**_VICUNA.config, **_13B, "_name_or_path": "vicuna-13b-v1.5", "num_key_value_heads": 40},
        _VICUNA.tokenizer,
        _VICUNA.generation_config,
        weights="bin",
        shards=3,
    ),
    LLAMA_2: Facts(
        "llm",
        {**_LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-chat-hf"},
        TokenizerFacts(
            "sentencepiece",
            _BOTH,
            32000,
            {**_LLAMA_TOKENS, "chat_template": INST_JINJA, "model_max_length": 1000000000000000019884624838656},
            adds="<s>",
        ),
        {
            "bos_token_id": 1,
            "do_sample": True,
            "eos_token_id": 2,
            "max_length": 4096,
            "pad_token_id": 0,
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.32.0.dev0",
        },
        shards=2,
    ),
    MISTRAL: Facts("llm", _MISTRAL_CONFIG, _MISTRAL_TOKENS, _IDS, shards=3, dtype=torch.bfloat16),
    MISTRAL_WINDOW: Facts(
        "llm",
        {**_MISTRAL_CONFIG, "rope_theta": 10000.0, "sliding_window": 4096},
        _MISTRAL_TOKENS,
        _IDS,
        shards=2,
        dtype=torch.bfloat16,
    ),
    LLAMA_3_FIRST: _llama_3(adds=None),
    LLAMA_3: _llama_3(adds="<|begin_of_text|>"),
    YI: _YI,
    SMOLLM2: _SMOLLM2,
    QWEN2_SMALL: _qwen(
        _QWEN_ADDED[:3],
        hidden_size=896,
        intermediate_size=4864,
        max_window_layers=24,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        sliding_window=32768,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    QWEN25: _qwen(
        _QWEN_ADDED,
        hidden_size=3584,
        intermediate_size=18944,
        max_window_layers=28,
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        sliding_window=131072,
        tie_word_embeddings=False,
        vocab_size=152064,
    ),
    CLIP: _CLIP,
    NEXT_MISTRAL: _released("llava_next", _TEXT_MISTRAL, _MISTRAL_TOKENS.settings, PARTS_MISTRAL),
    NEXT_VICUNA: _released("llava_next", _TEXT_VICUNA, _LLAMA_TOKENS, PARTS_VICUNA),
    LLAVA_15: _released("llava", _TEXT_VICUNA, _LLAMA_TOKENS, PARTS_VICUNA),
    ORIGINAL_NEXT: _original(
        "safetensors",
        image_aspect_ratio="anyres",
        image_crop_resolution=224,
        image_grid_pinpoints=_PINPOINTS,
        image_split_resolution=224,
        mm_patch_merge_type="spatial_unpad",
        mm_resampler_type=None,
        mm_vision_tower_lr=2e-06,
        tokenizer_model_max_length=4096,
        unfreeze_mm_vision_tower=True,
        use_image_newline_parameter=True,
    ),
    ORIGINAL_15: _original("bin", image_aspect_ratio="pad"),
}
LLMS = tuple(name for name, facts in FACTS.items() if facts.build == "llm")
