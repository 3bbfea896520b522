"""What a kill may leave of a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyres_vlm.errors import DataError
from anyres_vlm.evaluate.runner import AnswerLog


def test_only_whole_batches_of_the_key_are_read(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, "pope", "k1")
    assert log.read() == {}
    log.open("1-of-2")
    log.append("1-of-2", {3: "c\u2028\ud83d", 1: "a"})
    log.append("1-of-2", {2: None})
    content = log.path("1-of-2").read_bytes()
    for length in range(len(content)):
        log.path("1-of-2").write_bytes(content[:length])
        lines = content[:length].count(b"\n")
        assert log.read() == [{}, {}, {3: "c\u2028\ud83d", 1: "a"}][lines]
        log.open("1-of-2")
        log.append("1-of-2", {9: "z"})
        assert log.read()[9] == "z"
    log.path("1-of-2").write_bytes(content)
    log.open("2-of-2")
    log.append("2-of-2", {0: "other"})
    assert log.read() == {0: "other", 1: "a", 2: None, 3: "c\u2028\ud83d"}
    assert AnswerLog(log.folder, "pope", "k2").read() == AnswerLog(log.folder, "gqa", "k1").read() == {}
    log.path("2-of-2").write_bytes(log.path("2-of-2").read_bytes().replace(b"other", b'"'))
    with pytest.raises(DataError, match=r"line 2: not a batch; delete the file"):
        log.read()
