"""Licences read from packages made here, and what the tools do when something is wrong."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import packages
import pytest
from packages import exit_status, new_folder, read_deb, read_npm, read_wheel

from anyres_vlm.errors import DataError, UsageError

DEP5 = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2002 by A
           2003 by B
License: GPL-2

Files: debian/*
Copyright: 2004 by C
License: Expat
"""


def wheel(folder: Path, license_lines: str) -> Path:
    archive = folder / "thing-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n{license_lines}\n\nLicense: Fake\n"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("thing/data.txt", "data")
        file.writestr("thing-1.0.dist-info/METADATA", metadata)
    return archive


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("License: MIT", "MIT"),
        ("License-Expression: BSD-3-Clause\nLicense: see LICENSE", "BSD-3-Clause"),
        ("License: Files: *\n        Copyright: 2009 the team\n        License: BSD-3-Clause\n", "BSD-3-Clause"),
        ("Summary: none", "none"),
    ],
)
def test_wheel_states_its_licence_in_one_of_three_ways(tmp_path: Path, lines: str, expected: str) -> None:
    package = read_wheel(wheel(tmp_path, lines), tmp_path / "root")
    assert (package.name, package.version, package.license) == ("thing", "1.0", expected)
    assert (package.root / "thing/data.txt").read_text() == "data"
    assert (package.root / package.license_file).is_file()


def test_debian_licence_is_the_one_of_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/doc/thing"
    folder.mkdir(parents=True)
    (folder / "copyright").write_text(DEP5, encoding="utf-8")
    assert read_deb(tmp_path, "thing", "1.0").license == "GPL-2"
    (folder / "copyright").write_text("Do what you like.", encoding="utf-8")
    assert read_deb(tmp_path, "thing", "1.0").license == "none"
    (folder / "copyright").unlink()
    with pytest.raises(DataError, match=r"thing 1\.0 has no copyright file"):
        read_deb(tmp_path, "thing", "1.0")


def test_npm_licence_is_in_the_manifest(tmp_path: Path) -> None:
    manifest = json.dumps({"name": "@a/b", "version": "2.0", "license": "MIT"}).encode()
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/package.json")
        entry.size = len(manifest)
        archive.addfile(entry, io.BytesIO(manifest))
    package = read_npm(tmp_path / "b.tgz", tmp_path / "root")
    assert (package.name, package.version, package.license) == ("@a/b", "2.0", "MIT")


def test_another_licence_is_refused_and_the_error_says_where_to_look(tmp_path: Path) -> None:
    package = read_wheel(wheel(tmp_path, "License: Proprietary"), tmp_path / "root")
    package.require_license("proprietary")
    with pytest.raises(DataError, match=r"'Proprietary', expected 'MIT': read thing-1\.0\.dist-info/METADATA"):
        package.require_license("MIT")


def test_missing_client_and_failing_client_are_data_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm package b needs the command npm, which is not installed"):
        packages.fetch_npm("b", "1.0", tmp_path)
    client = tmp_path / "apt-get"
    client.write_text("#!/bin/sh\necho 'E: Unable to locate package b' >&2\nexit 100\n")
    client.chmod(0o755)
    with pytest.raises(DataError, match="Debian package b could not be fetched: E: Unable to locate package b"):
        packages.fetch_deb("b", tmp_path)


def test_new_folder_appears_only_when_all_went_well(tmp_path: Path) -> None:
    target = tmp_path / "deep/target"

    def fail_half_way() -> None:
        with new_folder(target) as folder:
            (folder / "half").write_text("x")
            raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        fail_half_way()
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert (target / "whole").is_file()
    with pytest.raises(UsageError, match="already exists"), new_folder(target):
        pass


@pytest.mark.parametrize(("error", "status"), [(UsageError("bad flag"), 2), (DataError("bad file"), 1), (None, 0)])
def test_exit_status(error: ValueError | None, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        if error:
            raise error

    assert exit_status(main) == status
    assert capsys.readouterr().err == (f"error: {error}\n" if error else "")


def test_cache_folder_follows_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder("pictures") == tmp_path / "anyres_vlm/pictures"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.cache_folder("pictures") == tmp_path / ".cache/anyres_vlm/pictures"
