"""Fast tokenizers of base models and checkpoints, which split text as their own files say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from anyres_vlm.checkpoints.folders import base_file, read_json, resolve, unavailable
from anyres_vlm.errors import DataError
from anyres_vlm.schema import IMAGE_TOKEN

logger = logging.getLogger(__name__)

FAST_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
JSON_FILES = (FAST_FILE, "tokenizer_config.json", "special_tokens_map.json", "config.json")
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a file
# AutoTokenizer takes the file's pipeline as it is for these classes and, whatever the class, for LlavaNext.
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# Other model types may have a class that AutoTokenizer prefers to the one that the folder names.
MODEL_TYPES = ("llama", "llava_next", "anyres_vlm")
# Words, digits, white space, letters beyond ASCII and a tag: where the classes of transformers differ. The probe does
# not start with a space, where `legacy: false` and SentencePiece itself differ on purpose.
PROBE = "A naïve 12.50 it's\n\n  x\ty  日本 <z> A."


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a language model's fast tokenizer; `<image>` and a padding token are added if it lacks them.

    This package pads nothing, but other software that loads a saved checkpoint may. Raises `DataError`.
    """
    tokenizer = build_tokenizer(resolve(name), "llm")
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of `<image>`, which stands for one visual token."""
    return cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def build_tokenizer(name: Path | str, what: str) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a folder or hub id; messages start with `what` and the name.

    The class that the files name may build its own pipeline and ignore theirs. If it splits text differently from the
    files, they are used as they are. Raises `DataError` for a tokenizer that cannot be loaded or used.
    """
    where = f"{what} {name}".strip()
    _require_packages(name, where)
    try:
        tokenizer = _from_pretrained(name)
    except Exception as error:  # broken files make the libraries raise exceptions of any kind
        if not Path(name).is_dir():
            raise unavailable(what, str(name), error) from error
        reason = _file_fault(Path(name)) or f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise DataError(f"{where}: its tokenizer cannot be used ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{where}: exact labels need a fast tokenizer, got {type(tokenizer).__name__}")
    _require_unknown(tokenizer, where)
    pieces = _pieces(tokenizer, where)
    if not pieces:  # some classes are built empty if their file is missing
        raise DataError(f"{where}: its tokenizer knows no words: fetch {FAST_FILE} or {SENTENCEPIECE_FILE} again")
    expected = _pieces_by_file(name)
    if expected is not None and pieces != expected:
        verbatim = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
        _require_unknown(verbatim, where)
        kind = type(tokenizer).__name__
        if _pieces(verbatim, where) == expected:
            logger.info("%s: %s splits text differently from its own files: the files are used", where, kind)
            return verbatim
        logger.warning("%s: transformers' %s splits text differently from its own files", where, kind)
    return tokenizer


def _require_packages(name: Path | str, where: str) -> None:
    """Raise `DataError` if the only tokenizer file needs a package that is not installed."""
    if base_file(name, FAST_FILE) is not None or base_file(name, SENTENCEPIECE_FILE) is None:
        return
    present = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    if missing := [package for package, is_there in present.items() if not is_there]:
        names = " ".join(missing)
        raise DataError(
            f"{where}: its tokenizer is {SENTENCEPIECE_FILE} alone, and reading it needs {' and '.join(missing)}: "
            f"pip install {names}"
        )


def _from_pretrained(name: Path | str) -> object:
    """Return what AutoTokenizer returns, without it wherever the class is known from the folder's JSON files."""
    if _is_generic(name):
        return PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
    from transformers import AutoTokenizer  # start-up time: imports torch

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _is_generic(name: Path | str) -> bool:
    """Whether AutoTokenizer would read `tokenizer.json` as it is, without a class for the model."""
    paths = [base_file(name, file) for file in ("config.json", "tokenizer_config.json", FAST_FILE)]
    try:
        model, tokenizer = (read_json(Path(path)) for path in paths[:2] if path is not None)
    except (DataError, ValueError):  # missing or broken: AutoTokenizer reports it
        return False
    kind, declared = model.get("model_type"), tokenizer.get("tokenizer_class")
    is_known = declared in GENERIC_CLASSES or (kind == "llava_next" and isinstance(declared, str))
    return paths[2] is not None and "auto_map" not in tokenizer and kind in MODEL_TYPES and is_known


def _file_fault(folder: Path) -> str | None:
    """Return what is wrong with a folder's files; transformers may blame a package for another format instead."""
    for file in (*JSON_FILES, SENTENCEPIECE_FILE):
        if not (path := folder / file).is_file():
            continue
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in the folder"
        if file != SENTENCEPIECE_FILE:
            try:
                read_json(path)
            except DataError as error:
                return f"{error}: fetch it again"
    if (folder / FAST_FILE).exists():
        return None
    path = folder / SENTENCEPIECE_FILE
    if not path.exists():
        return f"neither {FAST_FILE} nor {SENTENCEPIECE_FILE} in it: fetch it again"
    from sentencepiece import SentencePieceProcessor  # start-up time: few base models need it

    try:
        SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, TypeError):
        return f"{SENTENCEPIECE_FILE} is not a SentencePiece model: fetch it again"
    return None


def _require_unknown(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    if tokenizer.unk_token is not None and tokenizer.unk_token not in tokenizer.get_vocab():
        # transformers would recurse without end, or fail at the first unknown character
        raise DataError(f"{where}: the unk_token {tokenizer.unk_token!r} of its tokenizer is none of its tokens")


def _pieces(tokenizer: PreTrainedTokenizerFast, where: str) -> list[str]:
    try:
        return list(tokenizer.tokenize(PROBE))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{where}: its tokenizer cannot split text ({' '.join(str(error).split())[:300]})") from error


def _pieces_by_file(name: Path | str) -> list[str] | None:
    """Split the probe as the tokenizer's own file does; None if there is no such file or it cannot be read."""
    try:
        if (path := base_file(name, FAST_FILE)) is not None:
            tokenizer = Tokenizer.from_file(path)
            tokenizer.no_truncation()  # left in the file by whoever saved it, as is padding
            tokenizer.no_padding()
            return list(tokenizer.encode(PROBE, add_special_tokens=False).tokens)
        if (path := base_file(name, SENTENCEPIECE_FILE)) is not None:
            from sentencepiece import SentencePieceProcessor  # start-up time: few base models need it

            return list(SentencePieceProcessor(model_file=path).encode(PROBE, out_type=str))
    except Exception:  # tokenizers raises plain Exception; a file that is needed has been reported already
        return None
    return None
