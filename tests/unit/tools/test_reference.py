"""The generated references are those of this code, whole, and a change that forgets them fails here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference
import yaml

from anyres_vlm.config import Frozen

CONFIGS = Path(__file__).parents[3] / "configs"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["reference.py", *words])
    return reference.main()


def test_the_references_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--check") == 0, "run tools/reference.py"


def test_a_stale_file_is_found_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "anyres_vlm" / "cli").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    page = tmp_path / "configs" / "REFERENCE.md"
    page.write_text(page.read_text().replace("| `seed` |", "| `sead` |"))
    capsys.readouterr()
    assert run(monkeypatch, "--check") == 1
    assert capsys.readouterr().err == "configs/REFERENCE.md is stale: run tools/reference.py\n"
    assert "sead" in page.read_text(), "a check writes nothing"


def keys(content: Any) -> set[str]:
    """The keys of a configuration at any depth."""
    if not isinstance(content, dict):
        return set()
    return set(content).union(*(keys(value) for value in content.values()))


@pytest.mark.parametrize("name", ["tiny", "llava_next_13b", "smollm2_135m"])
def test_every_key_of_a_shipped_config_is_explained(name: str) -> None:
    page = (CONFIGS / "REFERENCE.md").read_text()
    for key in keys(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())):
        rows = [line for line in page.split("## A mixture")[0].splitlines() if line.startswith(f"| `{key}` |")]
        assert rows, key
        assert all(len(row.split(" | ")[-1].strip(" |")) > 2 for row in rows), rows


class Silent(Frozen):
    """A model as someone may add it."""

    told: int = 0  # what it is for
    # what stands above
    # in two lines
    above: int = 0
    silent: int = 0


def test_a_field_without_a_meaning_is_an_error() -> None:
    assert reference.meaning(Silent, "told") == "what it is for"
    assert reference.meaning(Silent, "above") == "what stands above in two lines"
    with pytest.raises(ValueError, match=r"Silent\.silent: no comment"):
        reference.meaning(Silent, "silent")
