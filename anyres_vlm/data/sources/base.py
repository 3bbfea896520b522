"""What every kind of source offers, and how one entry of any of them becomes a record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from anyres_vlm.errors import DataError
from anyres_vlm.explain import shortened
from anyres_vlm.schema import IMAGE_TOKEN, ImageRef, Record, Role, Turn

ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CONVERSATION_KEYS = ("messages", "conversations", "texts")  # the first that an entry has
FOLLOW_LINKS = "ANYRES_FOLLOW_LINKS"  # of the environment, so that every rank and worker has it

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
        """One item a row, in order; a bad row comes as its `DataError`."""
        ...

    def record(self, row: int) -> Record:
        """The record of any row from 0 on. Raises `DataError` for a bad one."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 in hex of what decides the records; the pixels of images in an image folder are not part of it."""
        ...


def to_record(entry: Any, default_id: str, find_image: ImageFinder) -> Record:
    """One entry, checked. Raises `DataError` naming the record, what was got and what was expected."""
    if not isinstance(entry, dict):
        raise DataError(f"record {default_id}: expected an object, got {type(entry).__name__}")
    name = default_id if entry.get("id") is None else _unicode(str(entry["id"]), f"record {default_id}: the id")
    try:
        return _checked(entry, name, find_image)
    except DataError as error:
        error.record = name  # a list of rejects tells the record by its own name
        raise


def _checked(entry: dict[str, Any], name: str, find_image: ImageFinder) -> Record:
    named = entry.get("images") if entry.get("image") is None else entry["image"]
    items = [] if named is None else named if isinstance(named, list) else [named]
    images = tuple(find_image(item, name) for item in items)
    turns = _turns(entry, name, len(images))
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        said = f"{placeholders} {IMAGE_TOKEN} in the text, but {len(images)} images"
        raise DataError(f"record {name}: {said}", kind="image_count")
    task = "" if entry.get("task") is None else _unicode(str(entry["task"]), f"record {name}: the task")
    return Record(name, images, turns, task)


def image_file(item: Any, name: str, folder: Path) -> ImageRef:
    """A file inside the image folder. Raises `DataError` for anything else than its relative path."""
    if not isinstance(item, str):
        raise DataError(f"record {name}: an image must be a file name, got {shortened(item)}")
    path = path_inside(folder, item, f"record {name}")
    return ImageRef(str(path), path)


def path_inside(folder: Path, name: str, where: str) -> Path:
    """The path of a name in a folder.

    Raises `DataError` for one that leads out of it, by a symbolic link too unless `ANYRES_FOLLOW_LINKS=1` is set.
    """
    if not name or "\0" in name:
        raise DataError(f"{where}: an image must be a file name, got {name!r}")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{where}: image {name!r} lies outside the image folder")
    path = folder / _unicode(name, f"{where}: the image's name")
    if not (follow_links() or _stays_inside(name if os.path.islink(path) else os.path.dirname(name), folder)):
        raise DataError(
            f"{where}: image {name!r} leads out of the image folder by a link: set {FOLLOW_LINKS}=1 if it is yours"
        )
    return path


def follow_links() -> bool:
    """Whether links out of image folders are the owner's."""
    return os.environ.get(FOLLOW_LINKS) == "1"


@lru_cache(maxsize=1 << 16)  # there are far fewer folders and links than images
def _stays_inside(name: str, folder: Path) -> bool:
    return Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))


def shards_name(files: Sequence[Path]) -> str:
    """The name of a source of several files is their folder's."""
    return files[0].stem if len(files) == 1 else files[0].absolute().parent.name


def folder_key(images: Path, data: Path) -> str:
    """An image folder for fingerprints: seen from the data, so that both can move together."""
    return os.path.relpath(images.resolve(), data.resolve().parent)


def _turns(entry: dict[str, Any], name: str, num_images: int) -> tuple[Turn, ...]:
    """User first, alternating, assistant last."""
    turns: list[Turn] = []
    for position, (said_by, text) in enumerate(_spoken(entry, name, num_images), start=1):
        role = ROLES.get(str(said_by))
        wanted: Role = "user" if position % 2 else "assistant"
        if role != wanted:
            remedy = ": move its text into the first question" if said_by == "system" else ""
            raise DataError(f"record {name} turn {position}: expected the {wanted}, got {said_by!r}{remedy}")
        if not text.strip():
            raise DataError(f"record {name} turn {position}: the text is empty")
        turns.append(Turn(role, _unicode(text.strip(), f"record {name} turn {position}: the text")))
    if turns[-1].role != "assistant":
        raise DataError(f"record {name}: the last turn is the user's, nothing answers it", kind="no_answer")
    return tuple(turns)


def _spoken(entry: dict[str, Any], name: str, num_images: int) -> Iterator[tuple[Any, str]]:
    """(role as written, text): `messages` role/content, `conversations` from/value, `texts` user/assistant.

    `texts` (the layout of the_cauldron) has no placeholders: the images come before the first question.
    """
    key = next((key for key in CONVERSATION_KEYS if entry.get(key) is not None), None)
    said_list = None if key is None else entry[key]
    if not isinstance(said_list, list) or not said_list:
        raise DataError(f"record {name}: expected a non-empty list under 'conversations' or 'messages'")
    if key == "texts":
        opening = f"{IMAGE_TOKEN}\n" * num_images
        for position, said in enumerate(said_list):
            yield "user", opening * (position == 0) + _text(said, "user", f"record {name} turn {2 * position + 1}")
            yield "assistant", _text(said, "assistant", f"record {name} turn {2 * position + 2}")
        return
    role_key, text_key = ("role", "content") if key == "messages" else ("from", "value")
    for position, said in enumerate(said_list, start=1):
        text = _text(said, text_key, f"record {name} turn {position}")
        yield said.get(role_key), text


def _text(said: Any, key: str, where: str) -> str:
    """Text, or parts of text and images as Hugging Face's chat datasets have them, a line each."""
    content = said.get(key) if isinstance(said, dict) else None
    if isinstance(content, list):
        return "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: expected text under {key!r}")
    return content


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE_TOKEN
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(f"{where}: expected parts of type 'text' or 'image', got {kind!r}")
    return str(part["text"])


def _unicode(text: str, what: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds a lone surrogate, which is no character: mend it") from None
    return text
