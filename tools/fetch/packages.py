"""Fetch a package from PyPI, Debian or npm with the client of the registry, and read the licence that it states."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from tempfile import TemporaryDirectory

from anyres_vlm.errors import DataError, UsageError


@dataclass(frozen=True)
class Package:
    """An unpacked package: name and version, its stated licence, and the file inside `root` that states it."""

    name: str
    version: str
    registry: str
    license: str
    license_file: str
    root: Path

    def require_license(self, expected: str) -> None:
        """Raise `DataError` if the package states another licence than the expected one."""
        if self.license.casefold() != expected.casefold():
            raise DataError(
                f"{self.registry} package {self.name} {self.version} states the licence {self.license!r}, expected "
                f"{expected!r}: read {self.license_file} in it before you use it; nothing was written"
            )


def fetch_wheel(requirement: str, folder: Path) -> Package:
    """Download a wheel such as `name==1.0` without its dependencies and unpack it below `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    _run([*pip, "--dest", str(folder), requirement], f"PyPI package {requirement}")
    return read_wheel(_only(folder, "*.whl"), folder / "wheel")


def fetch_deb(name: str, folder: Path) -> Package:
    """Download a Debian package from the configured distribution and unpack it below `folder`."""
    _run(["apt-get", "download", "--quiet", name], f"Debian package {name}", folder)
    archive = _only(folder, "*.deb")
    root = folder / "deb"
    _run(["dpkg-deb", "--extract", str(archive), str(root)], f"Debian package {name}")
    return read_deb(root, name, version=archive.name.split("_")[1])


def fetch_npm(name: str, version: str, folder: Path) -> Package:
    """Download an npm package and unpack it below `folder`; none of its scripts run."""
    _run(["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"], f"npm package {name}", folder)
    return read_npm(_only(folder, "*.tgz"), folder / "npm")


def read_wheel(archive: Path, root: Path) -> Package:
    """Unpack a wheel into `root` and read its metadata."""
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(root)
    metadata = _only(root, "*.dist-info/METADATA")
    headers = HeaderParser().parsestr(metadata.read_text(encoding="utf-8"))
    stated = headers["License-Expression"] or headers["License"] or "none"
    return Package(
        name=headers["Name"],
        version=headers["Version"],
        registry="PyPI",
        license=_dep5_license(stated) or stated.strip(),
        license_file=str(metadata.relative_to(root)),
        root=root,
    )


def read_deb(root: Path, name: str, version: str) -> Package:
    """Read the copyright file of an unpacked Debian package."""
    copyright_file = root / "usr/share/doc" / name / "copyright"
    if not copyright_file.is_file():
        raise DataError(f"Debian package {name} {version} has no copyright file: its licence is unknown")
    stated = _dep5_license(copyright_file.read_text(encoding="utf-8")) or "none"
    return Package(name, version, "Debian", stated, str(copyright_file.relative_to(root)), root)


def read_npm(archive: Path, root: Path) -> Package:
    """Unpack an npm package into `root` and read its package.json."""
    with tarfile.open(archive) as tarball:
        tarball.extractall(root, filter="data")
    manifest = json.loads((root / "package/package.json").read_text(encoding="utf-8"))
    stated = manifest.get("license", "none")
    return Package(manifest["name"], manifest["version"], "npm", stated, "package/package.json", root)


def cache_folder(name: str) -> Path:
    """Return the default output folder of a tool."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyres_vlm" / name


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` only on success. Raises `UsageError` if `target` exists."""
    if target.exists():
        raise UsageError(f"{target} already exists: use it, remove it, or give another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as parent:
        folder = Path(parent) / target.name
        folder.mkdir()
        yield folder
        shutil.move(folder, target)


def exit_status(main: Callable[[], None]) -> int:
    """Run a tool. Prints errors in one line and returns the exit status: 2 for wrong use, 1 for bad data."""
    try:
        main()
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _dep5_license(text: str) -> str | None:
    """Return the licence of `Files: *` in a machine-readable Debian copyright file; None if there is none."""
    found = re.search(r"^\s*Files: \*\n(?:\s*\S.*\n)*?\s*License: (\S+)", text, re.MULTILINE)
    return found[1] if found else None


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{what} needs the command {command[0]}, which is not installed here") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"{what} could not be fetched: {lines[-1]}")


def _only(folder: Path, pattern: str) -> Path:
    matches = list(folder.glob(pattern))
    if len(matches) != 1:
        raise DataError(f"expected one {pattern} in the package, got {len(matches)}")
    return matches[0]
