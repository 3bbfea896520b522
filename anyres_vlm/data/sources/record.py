"""What every kind of source offers, and how one entry of any of them becomes a record.

Entries are read as LLaVA reads them: a leading assistant turn is dropped, and an image of `""`, null or `[]` counts as
none. What would change a record's meaning and cannot be used (videos, audio, tools) is a reject of its own kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from anyres_vlm.data.blobs import open_file
from anyres_vlm.data.sources.paths import valid_text
from anyres_vlm.errors import DataError, RejectKind
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Record, Role, Turn

ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
}
TOOL_ROLES = {"tool", "function", "function_call", "observation"}
CONVERSATION_KEYS = ("messages", "conversations", "texts")  # the first that holds something counts
SYSTEM_KEYS = ("system", "system_prompt")
REFUSED_KEYS: dict[str, RejectKind] = {
    "video": "video",
    "videos": "video",
    "audio": "audio",
    "audios": "audio",
    "tools": "tools",
    "functions": "tools",
    "tool_calls": "tools",
    "function_call": "tools",
}
REFUSED_TAGS: dict[str, RejectKind] = {"<video>": "video", "<audio>": "audio"}
REFUSED_PARTS: dict[str, RejectKind] = {
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("tool_use", "tool_call", "tool_result"), "tools"),
    "image_url": "remote_image",
}
TURN_KEYS: dict[str, RejectKind] = {
    **REFUSED_KEYS,
    "image": "image_count",
    "images": "image_count",
}
ENTRY_KEYS = ("id", "task", "image", "images", *CONVERSATION_KEYS, *SYSTEM_KEYS, *REFUSED_KEYS)  # those that are read
REMEDIES: dict[RejectKind, str] = {
    "video": "videos are not supported: leave the record out, or name frames of it as images",
    "audio": "audio is not supported: leave the record out",
    "tools": "tool calls are not supported: leave the record out",
    "image_count": "list the images of all turns under the record's own 'images'",
    "remote_image": "download the images and name them under the record's own 'images'",
}
DROPPED_TURN = "dropped a leading assistant turn"

BOM = b"\xef\xbb\xbf"
LONGEST = 1 << 20  # bytes of a record: more than any that fits into a sample, and cheap to parse and to tokenise
CHUNK = 1 << 20  # bytes searched at once for line breaks

# (item of `image` or `images`, name of the record) -> where that image lies
ImageFinder = Callable[[Any, str], ImageRef]


class Source(Protocol):
    """Conversations by row. A source is picklable, safe to use after a fork, and keeps no row in memory for long."""

    @property
    def name(self) -> str:
        """The stem of its file, or the name of the folder of its files."""
        ...

    def __len__(self) -> int: ...

    def records(self, start: int, stop: int) -> Iterator[Record | DataError]:
        """Yield one item a row, in order; a bad row comes as its `DataError`."""
        ...

    def record(self, row: int) -> Record:
        """Return the record of any row from 0 on. Raises `DataError` for a bad one."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 in hex of what decides the records; the pixels of an image folder are not part of it."""
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
    _refuse(entry, REFUSED_KEYS, f"record {name}")
    images = tuple(find_image(item, name) for item in _image_items(entry))
    spoken = list(_spoken(entry, name, len(images)))
    system = _system(entry, spoken, name)
    first = int(_role(spoken[0][0]) == "system")
    changes: tuple[str, ...] = ()
    if first < len(spoken) and _role(spoken[first][0]) == "assistant":
        first += 1
        changes = (DROPPED_TURN,)
    turns = tuple(_turns(spoken, first, name))
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise DataError(
            f"record {name}: {placeholders} {IMAGE_TOKEN} in the text, but {len(images)} images", kind="image_count"
        )
    task = "" if entry.get("task") is None else valid_text(str(entry["task"]), f"record {name}: the task")
    return Record(name, images, turns, task, system, changes)


def _refuse(content: dict[str, Any], keys: dict[str, RejectKind], where: str) -> None:
    """Raise `DataError` for the first key that holds something and cannot be used."""
    for key in content.keys() & keys.keys():
        if not _is_absent(content[key]):
            kind = keys[key]
            raise DataError(f"{where}: it has {key!r}: {REMEDIES[kind]}", kind=kind)


def _is_absent(value: Any) -> bool:
    """Whether a value stands for nothing: null, false, an empty text, list or mapping, or one of such members alone."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, list | dict):
        members = value.values() if isinstance(value, dict) else value
        return not any(member or isinstance(member, int) for member in members)
    return value is None or value is False or value == b""


def _image_items(entry: dict[str, Any]) -> list[Any]:
    """The images as the entry names them, empty ones left out."""
    for key in ("image", "images"):
        value = entry.get(key)
        if value is not None and value != "" and value != []:
            return [item for item in (value if isinstance(value, list) else [value]) if not _is_absent(item)]
    return []


def _role(said_by: Any) -> Role | str | None:
    """The role of a turn in one of our words; an unknown one in lower case."""
    if not isinstance(said_by, str):
        return None
    word = said_by.strip().lower()
    return ROLES.get(word, word)


def _turns(spoken: Sequence[tuple[Any, str]], first: int, name: str) -> Iterator[Turn]:
    """Yield the turns from `first` on: the user's first, alternating, the assistant's last."""
    if first == len(spoken):
        said_by = [role for role, _ in spoken]
        raise DataError(f"record {name}: no question: expected a turn of the user, got only {said_by}")
    for place in range(first, len(spoken)):
        said_by, text = spoken[place]
        where = f"record {name} turn {place + 1}"
        wanted: Role = "assistant" if (place - first) % 2 else "user"
        if (role := _role(said_by)) != wanted:
            if role in TOOL_ROLES:
                raise DataError(f"{where}: its role is {said_by!r}: {REMEDIES['tools']}", kind="tools")
            remedy = ": a system turn must be the first" if role == "system" else ""
            raise DataError(f"{where}: expected the {wanted}, got {said_by!r}{remedy}")
        if not text.strip():
            raise DataError(f"{where}: the text is empty")
        if wanted == "user":
            _refuse_tags(text, where)
        yield Turn(wanted, valid_text(text.strip(), f"{where}: the text"))
    if wanted != "assistant":
        raise DataError(f"record {name}: the last turn is the user's, nothing answers it", kind="no_answer")


def _refuse_tags(text: str, where: str) -> None:
    for tag, kind in REFUSED_TAGS.items():
        if tag in text:
            raise DataError(f"{where}: the text contains {tag}: {REMEDIES[kind]}", kind=kind)


def _system(entry: dict[str, Any], spoken: Sequence[tuple[Any, str]], name: str) -> str:
    """The system text, of a key or of a first turn. Raises `DataError` where two differ or it is no text."""
    texts = []
    for key in SYSTEM_KEYS:
        value = entry.get(key)
        if _is_absent(value):
            continue
        if not isinstance(value, str):
            raise DataError(f"record {name}: expected text under {key!r}, got {type(value).__name__}")
        texts.append(value.strip())
    if _role(spoken[0][0]) == "system" and spoken[0][1].strip():
        texts.append(spoken[0][1].strip())
    if not texts:
        return ""
    if any(text != texts[0] for text in texts):
        raise DataError(f"record {name}: it has two different system texts: keep one")
    _refuse_tags(texts[0], f"record {name}: the system text")
    return valid_text(texts[0], f"record {name}: the system text")


def _spoken(entry: dict[str, Any], name: str, num_images: int) -> Iterator[tuple[Any, str]]:
    """Yield (role as written, text) of each turn, at least one.

    `messages` and `conversations` hold turns of role/content or from/value. `texts`, the layout of the_cauldron, holds
    pairs of user/assistant without placeholders: its images come before the first question.
    """
    present = [key for key in CONVERSATION_KEYS if entry.get(key) is not None]
    key = next((key for key in present if entry[key]), present[0] if present else None)
    said_list = None if key is None else entry[key]
    if not isinstance(said_list, list) or not said_list:
        raise DataError(f"record {name}: expected a non-empty list under 'conversations' or 'messages'")
    if key == "texts":
        opening = f"{IMAGE_TOKEN}\n" * num_images
        for position, said in enumerate(said_list):
            yield "user", opening * (position == 0) + _text(said, ("user",), f"record {name} turn {2 * position + 1}")
            yield "assistant", _text(said, ("assistant",), f"record {name} turn {2 * position + 2}")
        return
    for position, said in enumerate(said_list, start=1):
        where = f"record {name} turn {position}"
        if not isinstance(said, dict):
            raise DataError(f"{where}: expected an object with a role and a text, got {type(said).__name__}")
        if said.keys() & TURN_KEYS.keys():
            _refuse(said, TURN_KEYS, where)
        is_chat = said.get("from") is None and (key == "messages" or said.get("role") is not None)
        said_by = said.get("role") if is_chat else said.get("from")
        if _role(said_by) in TOOL_ROLES:
            raise DataError(f"{where}: its role is {said_by!r}: {REMEDIES['tools']}", kind="tools")
        yield said_by, _text(said, ("content", "value") if is_chat else ("value", "content"), where)


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
