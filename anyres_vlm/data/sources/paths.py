"""Find the image file that a record names, inside the image folder and nowhere else."""

from __future__ import annotations

import os
import re
import stat
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

from anyres_vlm.errors import DataError, shortened
from anyres_vlm.schema import ImageRef

FOLLOW_LINKS = "ANYRES_FOLLOW_LINKS"  # an environment variable, so that every rank and worker sees it

UNUSUAL = re.compile(r"\\|^/|^[A-Za-z][A-Za-z0-9+.-]*:|(?:^|/)\.\.(?:/|$)")
FILE_URL = re.compile(r"file:(?://localhost(?=/)|//|(?=/))", re.IGNORECASE)
OTHER_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:[^/\\]*[;,/]", re.IGNORECASE)
DRIVE = re.compile(r"[A-Za-z]:/")


def image_file(item: Any, name: str, folder: Path) -> ImageRef:
    """Return the file in the image folder that record `name` calls `item`.

    Raises `DataError` for anything but the name of a file inside the folder.
    """
    if not isinstance(item, str):
        raise DataError(f"record {name}: an image must be a file name, got {shortened(item)}")
    path = path_inside(folder, item, f"record {name}")
    return ImageRef(str(path), path)


def path_inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of a named file in a folder; the file may be missing.

    Accepted are relative names, absolute paths and `file://` URLs into the folder, `\\` in place of `/`, and names that
    differ from that of the file only in case or Unicode normalisation. Raises `DataError` for other URLs and for a path
    that leaves the folder, also by a symbolic link unless `ANYRES_FOLLOW_LINKS=1` is set.
    """
    name = valid_text(name, f"{where}: the image's name")
    if UNUSUAL.search(name):
        name = _relative_name(folder, name, where)
    if not name or "\0" in name:
        raise DataError(f"{where}: an image must be a file name, got {name!r}")
    path = folder / name
    is_link = _is_link(path)
    if is_link is None and (other := _other_spelling(folder, name)) is not None:
        name, path = other, folder / other
        is_link = _is_link(path)
    if not (follow_links() or _stays_inside(name if is_link else os.path.dirname(name), folder)):
        raise DataError(
            f"{where}: image {name!r} leads out of the image folder by a link: set {FOLLOW_LINKS}=1 if it is yours"
        )
    return path


def follow_links() -> bool:
    """Whether symbolic links may lead out of image folders."""
    return os.environ.get(FOLLOW_LINKS) == "1"


def valid_text(text: str, what: str) -> str:
    """Return the text. Raises `DataError` for a lone surrogate, which JSON can contain and tokenizers cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} contains a lone surrogate, half of a character: correct the text") from None
    return text


def _relative_name(folder: Path, name: str, where: str) -> str:
    """Return the name relative to the folder. Raises `DataError` if it is outside the folder."""
    if found := FILE_URL.match(name):
        given = unquote(name[found.end() :])
    elif OTHER_URL.match(name):
        raise DataError(
            f"{where}: image {shortened(name)} is a URL: download the images first and name the files relative to the "
            "image folder",
            kind="remote_image",
        )
    else:
        given = name
    if "\\" in given and not os.path.lexists(folder / given):
        given = given.replace("\\", "/")
    if "\0" in given or not UNUSUAL.search(given):
        return given
    if DRIVE.match(given.lstrip("/")):
        raise DataError(f"{where}: image {name!r} is a Windows path: name it relative to the image folder")
    plain, real = os.path.abspath(folder), os.path.realpath(folder)
    # The folder as given, the folder without links, and the image's own folder without links.
    leads_to = [os.path.join(plain, given), os.path.join(real, given)]
    if given.startswith("/"):
        leads_to.append(os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given)))
    for full in map(os.path.normpath, leads_to):
        for base in (plain, real):
            if full != base and Path(full).is_relative_to(base):
                return os.path.relpath(full, base)
    raise DataError(
        f"{where}: image {name!r} lies outside the image folder {folder}: name it relative to that folder, or give the "
        "folder that holds it"
    )


def _is_link(path: Path) -> bool | None:
    """Return whether a path is a symbolic link; None if it does not exist."""
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return None


def _other_spelling(folder: Path, name: str) -> str | None:
    """Return the only existing name that differs in nothing but case or Unicode normalisation, or None."""
    found = ""
    for part in PurePosixPath(name).parts:
        forms = [part, normalize("NFC", part), normalize("NFD", part)]
        here = folder / found
        match = next((form for form in forms if os.path.lexists(here / form)), None)
        match = match or _names_in(here).get(_folded(part))
        if match is None:
            return None
        found = os.path.join(found, match)
    return found


@lru_cache(maxsize=64)
def _names_in(folder: Path) -> dict[str, str | None]:
    """Names in a folder by their folded form; None where several have the same one."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found: dict[str, str | None] = {}
    for name in names:
        folded = _folded(name)
        found[folded] = None if folded in found else name
    return found


def _folded(name: str) -> str:
    return normalize("NFC", normalize("NFC", name).casefold())


@lru_cache(maxsize=1 << 16)  # there are far fewer folders and links than images
def _stays_inside(name: str, folder: Path) -> bool:
    return Path(os.path.realpath(folder / name)).is_relative_to(os.path.realpath(folder))
