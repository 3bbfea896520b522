"""The interface of a source, and the conversion of its entries to records.

Entries are read as LLaVA reads them: a leading assistant turn is dropped, and an image of `""`, null or `[]` means no
image. Content that is not supported and would change the meaning of a record (video, audio, tools) causes a reject:
`KEY_MEANINGS` is the table of the keys.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from anyres_vlm.data.blobs import open_file
from anyres_vlm.data.sources.paths import valid_text
from anyres_vlm.errors import DataError, RejectKind
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Record, Role, Turn

ROLES: dict[str, Role | Literal["system"]] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    "developer": "system",
}
TOOL_ROLES = {
    *("tool", "tools", "tool_call", "tool_response", "tool_result"),
    *("function", "function_call", "function_response", "observation", "ipython"),
}
CONVERSATION_KEYS = ("messages", "conversations", "texts")  # the first that holds something counts
READ_KEYS = frozenset({"id", "task", "image", "images", *CONVERSATION_KEYS})

# Other keys of records and turns whose content is used or refused but never ignored, as `key_meaning` spells them.
ENDINGS = ("", "s", "path", "paths", "spath", "spaths", "file", "files", "url", "urls", "bytes")
SYSTEM_WORDS = ("prompt", "message", "text", "instruction", "instructions")
KEY_MEANINGS: dict[str, RejectKind] = {
    **dict.fromkeys(("system", "sysprompt", *(f"system{word}" for word in SYSTEM_WORDS)), "system"),
    **{f"video{ending}": "video" for ending in ENDINGS},
    **{f"{word}{ending}": "audio" for word in ("audio", "sound", "speech") for ending in ENDINGS},
    **dict.fromkeys(("tool", "tools", "toolcall", "toolcalls", "availabletools"), "tools"),
    **dict.fromkeys(("function", "functions", "functioncall", "functioncalls"), "tools"),
    **{f"{word}{ending}": "image_count" for word in ("image", "img", "picture") for ending in ENDINGS},
}
REFUSED_TAG = re.compile(r"<\|?(video|audio)(?:_?pad|_?\d+)?\s*[|/]?>", re.IGNORECASE)
LOSS_KEYS = frozenset({"weight", "loss", "train", "training"})  # of an answer: 0 or false to learn nothing from it
TAG_KINDS: dict[str, RejectKind] = {"video": "video", "audio": "audio"}
REFUSED_PARTS: dict[str, RejectKind] = {
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("tool_use", "tool_call", "tool_result"), "tools"),
    "image_url": "remote_image",
}
REMEDIES: dict[RejectKind, str] = {
    "video": "videos are not supported: leave the record out, or name frames of it as images",
    "audio": "audio is not supported: leave the record out",
    "tools": "tool calls are not supported: leave the record out",
    "image_count": "list all images of the record under its own 'images'",
    "system": "write the system text under the record's own 'system'",
    "remote_image": "download the images and name them under the record's own 'images'",
}
CHAT, LLAVA = ("role", "content"), ("from", "value")  # keys of a turn
TEXT_KEYS = frozenset((*CHAT, *LLAVA))
DROPPED_TURN = "dropped a leading assistant turn"

BOM = b"\xef\xbb\xbf"
LONGEST = 1 << 20  # bytes of a record: more than fit into a sample, and still cheap to parse and to tokenise
CHUNK = 1 << 20  # bytes searched at once for line breaks

# (item of `image` or `images`, name of the record) -> reference to the image
ImageFinder = Callable[[Any, str], ImageRef]

# Role of a turn as one of ours, or an unknown one in lower case; the role as written; the text
Spoken = tuple[Role | str | None, Any, str]


class Source(Protocol):
    """Conversations by row. A source is picklable, safe to use after a fork, and does not load all rows into memory."""

    @property
    def name(self) -> str:
        """The stem of its file, or the name of the folder of its files."""
        ...

    def __len__(self) -> int: ...

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """Yield one item per row, in order; for a bad row, its `DataError`."""
        ...

    def record(self, row: int) -> Record:
        """Return the record of any row from 0 on. Raises `DataError` for a bad one."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 in hex of the content of the records, without the images of an image folder."""
        ...


def to_record(entry: Any, default_id: str, find_image: ImageFinder) -> Record:
    """Check one entry. Raises `DataError` naming the record, what was got and what was expected."""
    if not isinstance(entry, dict):
        raise DataError(f"record {default_id}: expected an object, got {type(entry).__name__}")
    name = default_id if entry.get("id") is None else valid_text(str(entry["id"]), f"record {default_id}: the id")
    try:
        return _checked(entry, name, find_image)
    except DataError as error:
        error.record = name  # lists of rejects name the record by its own id
        raise


def _checked(entry: dict[str, Any], name: str, find_image: ImageFinder) -> Record:
    items = _image_items(entry)
    _refuse(entry, f"record {name}", READ_KEYS, ("system", "image_count") if items else ("system",))
    images = tuple(find_image(item, name) for item in items)
    spoken = _spoken(entry, name, len(images))
    system = _system(entry, spoken, name)
    first = int(spoken[0][0] == "system")
    changes: tuple[str, ...] = ()
    if first < len(spoken) and spoken[first][0] == "assistant":
        first += 1
        changes = (DROPPED_TURN,)
    turns = _turns(spoken, first, name)
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise DataError(
            f"record {name}: {placeholders} {IMAGE_TOKEN} in the text, but {len(images)} images", kind="image_count"
        )
    task = "" if entry.get("task") is None else valid_text(str(entry["task"]), f"record {name}: the task")
    return Record(name, images, turns, task, system, changes)


@lru_cache(maxsize=4096)
def key_meaning(key: str) -> RejectKind | None:
    """Return the kind of a reject for ignoring a key of a record or turn; None if nothing would be lost.

    All spellings of a key are equal: `video_path`, `videoPath`, `Video-Path` and `video_path_1`.
    """
    return KEY_MEANINGS.get(re.sub("[^a-z]", "", key.lower()))


def _refuse(
    content: dict[str, Any], where: str, read: Container[str] = (), kinds_read: Container[RejectKind] = ()
) -> None:
    """Raise `DataError` for the first key that is not read, holds something and has a meaning.

    `read` are the keys that are read, and `kinds_read` the kinds whose keys are read or repeat what is read.
    """
    for key in content:
        kind = None if key in read else key_meaning(key)
        if kind is not None and kind not in kinds_read and not _is_absent(content[key]):
            raise DataError(f"{where}: it has {key!r}: {REMEDIES[kind]}", kind=kind)


def _is_absent(value: Any) -> bool:
    """Return whether a value means nothing: null, false, NaN, or an empty text, or a list or mapping of these."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, list | dict):
        members = value.values() if isinstance(value, dict) else value
        return not any(member or isinstance(member, int) for member in members)
    return value is None or value is False or value == b"" or value != value  # NaN, as pandas writes it


def _image_items(entry: dict[str, Any]) -> list[Any]:
    """Return the images as the entry names them, without empty ones."""
    for key in ("image", "images"):
        value = entry.get(key)
        if items := [item for item in (value if isinstance(value, list) else [value]) if not _is_absent(item)]:
            return items
    return []


def _role(said_by: Any) -> Role | str | None:
    """Return the role of a turn as one of ours; an unknown one in lower case."""
    if not isinstance(said_by, str):
        return None
    if (known := ROLES.get(said_by)) is not None:
        return known
    word = said_by.strip().lower()
    return ROLES.get(word, word)


def _turns(spoken: Sequence[Spoken], first: int, name: str) -> tuple[Turn, ...]:
    """Return the turns from `first` on: the user's first, alternating, the assistant's last."""
    if first == len(spoken):
        raise DataError(f"record {name}: no question: expected a turn of the user, got only {[s[1] for s in spoken]}")
    turns = []
    wanted: Role = "assistant"
    for place in range(first, len(spoken)):
        role, said_by, text = spoken[place]
        wanted = "user" if wanted == "assistant" else "assistant"
        if role != wanted:
            remedy = ": a system turn must be the first" if role == "system" else ""
            raise DataError(f"record {name} turn {place + 1}: expected the {wanted}, got {said_by!r}{remedy}")
        text = text.strip()
        if not text:
            raise DataError(f"record {name} turn {place + 1}: the text is empty")
        if role == "user" and "<" in text:
            _refuse_tags(text, f"record {name} turn {place + 1}")
        if not text.isascii():
            valid_text(text, f"record {name} turn {place + 1}: the text")
        turns.append(Turn(wanted, text))
    if wanted != "assistant":
        raise DataError(f"record {name}: the last turn is the user's, nothing answers it", kind="no_answer")
    return tuple(turns)


def _refuse_tags(text: str, where: str) -> None:
    """Raise `DataError` for a text with a placeholder of video or audio."""
    if (tag := REFUSED_TAG.search(text)) is not None:
        kind = TAG_KINDS[tag[1].lower()]
        raise DataError(f"{where}: the text contains {tag.group()}: {REMEDIES[kind]}", kind=kind)


def _system(entry: dict[str, Any], spoken: Sequence[Spoken], name: str) -> str:
    """Return the system text from a key or the first turn. Raises `DataError` if two differ or one is not text."""
    texts = []
    for key, value in entry.items():
        if key_meaning(key) != "system" or _is_absent(value):
            continue
        if not isinstance(value, str):
            raise DataError(f"record {name}: expected text under {key!r}, got {type(value).__name__}")
        texts.append(value.strip())
    if spoken[0][0] == "system" and spoken[0][2].strip():
        texts.append(spoken[0][2].strip())
    if not texts:
        return ""
    if any(text != texts[0] for text in texts):
        raise DataError(f"record {name}: it has two different system texts: keep one")
    _refuse_tags(texts[0], f"record {name}: the system text")
    return valid_text(texts[0], f"record {name}: the system text")


def _spoken(entry: dict[str, Any], name: str, num_images: int) -> list[Spoken]:
    """Return what is said in each turn, at least one.

    `messages` and `conversations` hold turns of role/content or from/value. `texts`, the layout of the_cauldron, holds
    pairs of user/assistant without placeholders: its images come before the first question.
    """
    key = next((key for key in CONVERSATION_KEYS if entry.get(key)), None)
    said_list = None if key is None else entry[key]
    if not isinstance(said_list, list) or not said_list:
        raise DataError(f"record {name}: expected a non-empty list under 'conversations' or 'messages'")
    spoken: list[Spoken] = []
    if key == "texts":
        for position, said in enumerate(said_list):
            if isinstance(said, dict):
                _refuse(said, f"record {name} turn {2 * position + 1}")
            opening = "" if position else f"{IMAGE_TOKEN}\n" * num_images
            question = opening + _text(said, ("user",), f"record {name} turn {2 * position + 1}")
            answer = _text(said, ("assistant",), f"record {name} turn {2 * position + 2}")
            spoken += [("user", "user", question), ("assistant", "assistant", answer)]
        return spoken
    usual, other = (CHAT, LLAVA) if key == "messages" else (LLAVA, CHAT)
    for position, said in enumerate(said_list, start=1):
        if not isinstance(said, dict):
            kind = type(said).__name__
            raise DataError(f"record {name} turn {position}: expected an object with a role and a text, got {kind}")
        keys = other if said.get(usual[0]) is None and said.get(other[0]) is not None else usual
        said_by, text = said.get(keys[0]), said.get(keys[1])
        role = _role(said_by)
        if role in TOOL_ROLES:
            where = f"record {name} turn {position}"
            raise DataError(f"{where}: its role is {said_by!r}: {REMEDIES['tools']}", kind="tools")
        if not TEXT_KEYS.issuperset(said):  # rarely: this saves half of the time
            _refuse(said, f"record {name} turn {position}")
            if role == "assistant":
                _refuse_untrained(said, f"record {name} turn {position}")
        if not isinstance(text, str):
            text = _text(said, (keys[1], CHAT[1], LLAVA[1]), f"record {name} turn {position}")
        spoken.append((role, said_by, text))
    return spoken


def _refuse_untrained(said: dict[str, Any], where: str) -> None:
    """Raise `DataError` for an answer that is not to be learnt."""
    for key in LOSS_KEYS & said.keys():
        if said[key] == 0:  # or False
            raise DataError(
                f"{where}: it has {key!r}={said[key]!r}, but every answer is trained on: leave the record out",
                kind="unsupervised",
            )


def _text(said: Any, keys: tuple[str, ...], where: str) -> str:
    """Return the text, or parts of text and images as Hugging Face's chat datasets have them, joined by line ends."""
    given = [said[key] for key in keys if said.get(key) is not None] if isinstance(said, dict) else []
    if given and isinstance(given[0], list):
        return "\n".join(_part(part, where) for part in given[0])
    if not given or not isinstance(given[0], str):
        raise DataError(f"{where}: expected text under {keys[0]!r}")
    return given[0]


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE_TOKEN
    if isinstance(kind, str) and (refused := REFUSED_PARTS.get(kind)) is not None:
        raise DataError(f"{where}: it has a part of type {kind!r}: {REMEDIES[refused]}", kind=refused)
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where}: expected parts of type 'text' or 'image', got {kind!r}")
    return str(part["text"])


def shards_name(files: Sequence[Path]) -> str:
    """Return the name of a source of several files: their folder's."""
    return files[0].stem if len(files) == 1 else files[0].absolute().parent.name


def folder_key(images: Path, data: Path) -> str:
    """Return an image folder for fingerprints: relative to the data, so that both can move together."""
    return os.path.relpath(images.resolve(), data.resolve().parent)


def parse_json(content: bytes, where: Callable[[int], str]) -> Any:
    """Parse a value. Raises `DataError` with what `where` returns for the position of the fault in bytes."""
    if len(content) > LONGEST:
        raise DataError(f"{where(0)}: {len(content):,} bytes of JSON; a record has at most {LONGEST:,}: split it")
    try:
        return json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        position = len(error.doc[: error.pos].encode())
        raise DataError(f"{where(position)}: malformed JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where(error.start)}: cannot be read as UTF-8 text: {error.reason}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
        raise DataError(f"{where(0)}: cannot be parsed as JSON: {error}") from None


def place_in_file(path: Path, position: int) -> str:
    """Return file, line and column, both from 1, of a byte."""
    breaks, column = 0, b""
    with open_file(path, str(path)) as stream:
        while position and (chunk := stream.read(min(position, CHUNK))):
            position -= len(chunk)
            breaks += chunk.count(b"\n")
            _, found, after = chunk.rpartition(b"\n")
            column = after if found else column + chunk
    return f"{path} line {breaks + 1} column {_length(column) + 1}"


def place_in_text(name: str, content: bytes, position: int) -> str:
    """Return name, line and column, both from 1, of a byte."""
    lines = content[:position].split(b"\n")
    return f"{name} line {len(lines)} column {_length(lines[-1]) + 1}"


def _length(column: bytes) -> int:
    return len(column.removeprefix(BOM).decode("utf-8", errors="replace"))
