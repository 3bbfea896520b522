"""A base model's generation config, reduced to what transformers accepts when the trained model is saved.

Published files carry values that transformers only warns about on loading, and refuses to save once anything in the
config has changed, as a run's end tokens do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

logger = logging.getLogger(__name__)

# Other values are valid or not depending on these, so they are tried first.
MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
IGNORED = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")


def clean_generation_config(settings: Mapping[str, Any], where: str) -> GenerationConfig:
    """A config of all settings that can be saved together; one line of log names the others and why they are dropped.

    Every setting is tried by transformers' own strict validation, so this holds for the rules of any release.
    """
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for name in sorted(settings.keys() - set(IGNORED), key=lambda name: (name not in MODES, name)):
        if settings[name] is None:
            continue
        if (reason := _refusal(kept | {name: settings[name]}, name)) is None:
            kept[name] = settings[name]
        else:
            dropped.append(f"{name}={settings[name]!r} ({reason})")
    if dropped:
        logger.info(
            "%s: generation settings dropped, a model that has them could not be saved: %s", where, ", ".join(dropped)
        )
    return GenerationConfig(**kept)


def end_tokens(config: GenerationConfig) -> set[int]:
    """Its end tokens; a config names none, one or a list."""
    ending: Any = config.eos_token_id
    return set() if ending is None else {ending} if isinstance(ending, int) else set(ending)


def clean_padding(config: PreTrainedConfig, where: str) -> None:
    """Drop a padding id outside the vocabulary, such as -1: the embedding would take another row for padding."""
    settings: Any = config.get_text_config()
    pad, rows = getattr(settings, "pad_token_id", None), getattr(settings, "vocab_size", None)
    if isinstance(pad, int) and isinstance(rows, int) and not 0 <= pad < rows:
        settings.pad_token_id = None
        logger.info("%s: pad_token_id=%d dropped, the vocabulary has %d rows", where, pad, rows)


def _refusal(settings: Mapping[str, Any], name: str) -> str | None:
    """Why these settings cannot be saved with the one of this name, in a few words; None if they can."""
    if name.endswith("_token_id"):
        ids = settings[name] if isinstance(settings[name], list) else [settings[name]]
        if not ids or not all(type(number) is int and number >= 0 for number in ids):
            return "not a token id"
    config = GenerationConfig()
    for key, value in settings.items():
        setattr(config, key, value)
    try:
        config.validate(strict=True)
        config.to_json_string()
    except Exception as error:  # values of any JSON type reach comparisons that were written for numbers
        return _short(str(error))
    return None


def _short(message: str) -> str:
    """The rule without the advice around it."""
    text = " ".join(message.split())
    if "only used in sample-based" in text:
        return "only used with do_sample"
    if "only used in beam-based" in text:
        return "only used with num_beams above 1"
    return text.removeprefix("GenerationConfig is invalid: ")[:160]
