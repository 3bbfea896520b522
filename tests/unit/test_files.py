"""Files are complete or absent after errors and kills."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyres_vlm.files import append, cut_partial_line, replacing, whole_lines


@pytest.mark.parametrize(("mode", "content"), [("w", "new ü"), ("wb", b"new \xff")])
def test_the_new_file_appears_complete_when_the_block_ends(tmp_path: Path, mode: str, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, mode) as file:
        file.write(content)
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [found.read_text() for found in tmp_path.iterdir()] == ["old"]


def test_lines_survive_and_files_are_complete_after_a_kill(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from anyres_vlm.files import append, replacing\n"
        "folder = Path(sys.argv[1])\n"
        "for number in range(10**9):\n"
        "    append(folder / 'lines', b'%d\\n' % number)\n"
        "    with replacing(folder / 'whole') as file: file.write(f'{number} ' * 10_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    while not (tmp_path / "whole").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    numbers = list(map(int, (tmp_path / "lines").read_text().splitlines()))
    words = (tmp_path / "whole").read_text().split()
    assert numbers == list(range(len(numbers)))
    assert len(words) == 10_000
    assert set(words) <= {str(numbers[-1]), str(numbers[-1] - 1)}


def test_append_creates_the_file(tmp_path: Path) -> None:
    append(tmp_path / "lines", b"a\n")
    append(tmp_path / "lines", b"b\n")
    assert (tmp_path / "lines").read_bytes() == b"a\nb\n"


@pytest.mark.parametrize("length", [1, 10, (1 << 16) - 1, 1 << 16, (1 << 17) + 3])
def test_a_line_cut_short_is_dropped(tmp_path: Path, length: int) -> None:
    log = tmp_path / "log"
    assert list(whole_lines(log)) == []
    cut_partial_line(log)
    assert not log.exists()
    for kept in (b"", b"first\n", b"first\n" + b"y" * 70_000 + b"\n"):
        log.write_bytes(kept + b"x" * length)
        assert b"".join(whole_lines(log)) == kept
        cut_partial_line(log)
        assert log.read_bytes() == kept
        append(log, b"next\n")
        assert list(whole_lines(log))[-1] == b"next\n"
