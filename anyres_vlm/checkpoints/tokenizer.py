"""Fast tokenizers from the files of a base model or a checkpoint, read as those files were made."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from anyres_vlm.checkpoints.describe import base_file
from anyres_vlm.errors import DataError

logger = logging.getLogger(__name__)

FAST_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer.model"
# Words, digits, white space, letters beyond ASCII and a marker: where the classes of transformers differ. No space at
# the start, where `legacy: false` and SentencePiece itself differ on purpose.
PROBE = "A naïve 12.50 it's\n\n  x\ty  日本 <z> A."


def build_tokenizer(name: Path | str, what: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder or hub id; `what` stands before it in messages.

    The class that the files name may rebuild its own pipeline and ignore theirs. Where it splits text differently from
    the files themselves, they are read as they are. Raises `DataError` for a tokenizer that cannot be built or used.
    """
    where = f"{what} {name}".strip()
    _require_packages(name, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # broken files raise whatever the library at hand raises
        if not Path(name).is_dir():
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{what} {str(name)!r} cannot be loaded: {reason}; give a hub id, a local folder or an embedded: name"
            ) from error
        reason = _file_fault(Path(name)) or f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise DataError(f"{where}: its tokenizer cannot be used ({reason})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"{where}: exact labels need a fast tokenizer, got {type(tokenizer).__name__}")
    _require_unknown(tokenizer, where)
    pieces = _pieces(tokenizer, where)
    if not pieces:  # some classes make an empty one where their file is missing
        raise DataError(f"{where}: its tokenizer knows no words: fetch {FAST_FILE} or {SENTENCEPIECE_FILE} again")
    expected = _pieces_by_file(name)
    if expected is not None and pieces != expected:
        verbatim = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False)
        _require_unknown(verbatim, where)
        kind = type(tokenizer).__name__
        if _pieces(verbatim, where) == expected:
            logger.info("%s: %s would split text differently from its own files: these are used", where, kind)
            return verbatim
        logger.warning("%s: transformers' %s splits text differently from its own files", where, kind)
    return tokenizer


def _pieces(tokenizer: PreTrainedTokenizerFast, where: str) -> list[str]:
    try:
        return list(tokenizer.tokenize(PROBE))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"{where}: its tokenizer cannot split text ({' '.join(str(error).split())[:300]})") from error


def _require_packages(name: Path | str, where: str) -> None:
    if base_file(name, FAST_FILE) is not None or base_file(name, SENTENCEPIECE_FILE) is None:
        return
    present = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    if missing := [package for package, is_there in present.items() if not is_there]:
        names = " ".join(missing)
        raise DataError(
            f"{where}: its tokenizer is {SENTENCEPIECE_FILE} alone, and reading it needs {' and '.join(missing)}: "
            f"pip install {names}"
        )


def _require_unknown(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    if tokenizer.unk_token is not None and tokenizer.unk_token not in tokenizer.get_vocab():
        # transformers would look it up without end, or fail at the first unknown character
        raise DataError(f"{where}: the unk_token {tokenizer.unk_token!r} of its tokenizer is none of its tokens")


def _pieces_by_file(name: Path | str) -> list[str] | None:
    """How the tokenizer's own file splits the probe; None where there is no such file or it cannot be read."""
    try:
        if (path := base_file(name, FAST_FILE)) is not None:
            return list(Tokenizer.from_file(path).encode(PROBE, add_special_tokens=False).tokens)
        if (path := base_file(name, SENTENCEPIECE_FILE)) is not None:
            from sentencepiece import SentencePieceProcessor  # only such bases need it

            return list(SentencePieceProcessor(model_file=path).encode(PROBE, out_type=str))
    except Exception:  # tokenizers raises plain Exception; what cannot be read has been reported or is not needed
        return None
    return None


def _file_fault(folder: Path) -> str | None:
    """What is wrong with a folder's files where transformers reports packages for formats that it tried instead."""
    if (folder / FAST_FILE).exists():
        return None
    path = folder / SENTENCEPIECE_FILE
    if not path.exists():
        return f"neither {FAST_FILE} nor {SENTENCEPIECE_FILE} in it: fetch it again"
    from sentencepiece import SentencePieceProcessor  # only such bases need it

    try:
        SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, TypeError):
        return f"{SENTENCEPIECE_FILE} is not a SentencePiece model: fetch it again"
    return None
