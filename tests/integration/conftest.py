"""Servers that tests of `anyres instruct` ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from generation import start_server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts a server with the given arguments; gives its base URL."""
    processes = []

    def start(*arguments: object) -> str:
        process, url = start_server(tmp_path, *arguments)
        processes.append(process)
        return url

    yield start
    for process in processes:
        process.kill()
        process.wait()
