"""Mixtures: exact shares, the same everywhere, and mistakes with a remedy."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from anyres_vlm.data.sources import open_source, read_records
from anyres_vlm.data.sources.mixture import Part
from anyres_vlm.errors import DataError, UsageError
from anyres_vlm.schema import Record


def entries(count: int, bad: int | None = None) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    return [{"id": str(n), "image": f"{n}.png", "conversations": turns if n != bad else []} for n in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(entries(40)))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "sub").mkdir()
    pq.write_table(pa.Table.from_pylist(entries(300)), tmp_path / "sub" / "b.parquet", row_group_size=50)
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, entries(10, bad=3))))
    return tmp_path


def mixture(folder: Path, *sources: dict[str, Any], name: str = "mix.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({"sources": list(sources)}))
    return path


def ids(path: Path) -> list[str]:
    source = open_source(path)
    return [item.id for item in source.records(0, len(source)) if isinstance(item, Record)]


def numbers(path: Path) -> list[int]:
    return [int(name.rpartition("/")[2].partition("#")[0]) for name in ids(path)]


@pytest.mark.parametrize(
    ("share", "times"),
    [
        ({}, {1: 300}),
        ({"fraction": 0.25}, {1: 75}),
        ({"fraction": 0.29, "seed": 5}, {1: 87}),
        ({"fraction": 1}, {1: 300}),
        ({"random": 7}, {1: 7}),
        ({"random": 300}, {1: 300}),
        ({"weight": 2}, {2: 300}),
        ({"weight": 2.5}, {2: 150, 3: 150}),
        ({"weight": 0.1}, {1: 30}),
    ],
)
def test_shares_are_exact(folder: Path, share: dict[str, float], times: dict[int, int]) -> None:
    found = numbers(mixture(folder, {"path": "sub/b.parquet", **share}))
    assert Counter(Counter(found).values()) == times
    assert sum(number > after for number, after in pairwise(found)) == max(times) - 1


def test_the_first_are_the_first(folder: Path) -> None:
    assert numbers(mixture(folder, {"path": "sub", "first": 7})) == list(range(7))


def test_a_choice_is_its_seed_s_and_looks_random(folder: Path) -> None:
    choices = [numbers(mixture(folder, {"path": "sub", "fraction": 0.5, "seed": seed})) for seed in range(20)]
    assert len({tuple(choice) for choice in choices}) == 20
    times = np.bincount(np.concatenate(choices), minlength=300)
    assert times.min() >= 1
    assert times.max() <= 19  # binomial (20, 1/2): beyond with a chance of 1 in 1,700 for all 300
    quarter = numbers(mixture(folder, {"path": "sub", "fraction": 0.25, "seed": 3}))
    assert set(quarter) < set(choices[3])


def test_the_choice_is_pinned() -> None:
    """Other machines and later versions must choose the same rows: this is part of what an index means."""
    chosen = Part(path=Path("x"), random=5, seed=7).rows(1000)
    keys = np.random.PCG64(7).random_raw(1000).tolist()
    assert chosen.tolist() == sorted(sorted(range(1000), key=keys.__getitem__)[:5])
    assert chosen.tolist() == [6, 37, 114, 614, 865]


def test_every_process_sees_the_same(folder: Path) -> None:
    path = mixture(folder, {"path": "a.json", "fraction": 0.4}, {"path": "sub", "random": 30, "seed": 2})
    source = open_source(path)
    copy = pickle.loads(pickle.dumps(source))
    stream = list(source.records(0, len(source)))
    assert list(copy.records(0, len(copy))) == stream
    assert [copy.record(row) for row in reversed(range(46))] == stream[::-1]
    for start, stop in [(0, 3), (10, 20), (15, 17), (16, 46), (46, 46)]:
        assert list(source.records(start, stop)) == stream[start:stop]
    script = (
        "import sys; from pathlib import Path; from anyres_vlm.data.sources import open_source\n"
        "source = open_source(Path(sys.argv[1])); print(source.fingerprint(), *(r.id for r in source.records(0, 46)))"
    )
    other = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [source.fingerprint(), *(record.id for record in stream)]


def test_ids_are_unique_and_say_where_from(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "a.json").write_text(json.dumps(entries(2)))
    path = mixture(folder, {"path": "a.json", "weight": 2}, {"path": "other/a.json"}, {"path": "~/none/../x.json"})
    with pytest.raises(DataError, match=r"mix\.yaml source 3: .*x\.json: no such file"):
        open_source(path)
    found = ids(mixture(folder, {"path": "a.json", "weight": 2}, {"path": "other/a.json"}))
    assert len(set(found)) == len(found) == 82
    assert found[39:42] == ["a/39", "a/0#2", "a/1#2"]
    assert found[80:] == ["a-2/0", "a-2/1"]


def test_paths_are_seen_from_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mixture(folder, {"path": "sub/b.parquet", "images": "pictures"}, {"path": "a.json"}, {"path": "~/c.jsonl"})
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "sub")
    records = [item for item in open_source(path).records(0, 341) if isinstance(item, Record)]
    assert records[0].images[0].path == folder / "pictures" / "0.png"
    assert records[300].images[0].path == folder / "0.png"
    assert records[340].id == "c/0"


def test_bad_records_name_their_source(folder: Path) -> None:
    source = open_source(mixture(folder, {"path": "a.json"}, {"path": "c.jsonl"}))
    (item,) = source.records(43, 44)
    assert str(item).startswith("c: record 3: expected a non-empty list")
    with pytest.raises(DataError, match="c: record 3: "):
        source.record(43)
    with pytest.raises(DataError, match=r"1 of 50 records are bad \(c: record 3: "):
        read_records(folder / "mix.yaml", None)


def test_fingerprint_follows_everything_that_counts(folder: Path) -> None:
    variants: list[list[dict[str, Any]]] = [
        [{"path": "a.json"}],
        [{"path": "a.json", "fraction": 0.5}],
        [{"path": "a.json", "fraction": 0.5, "seed": 1}],
        [{"path": "a.json", "images": "x"}],
        [{"path": "a.json"}, {"path": "sub"}],
        [{"path": "sub"}, {"path": "a.json"}],
        [{"path": "a.json", "weight": 2}],
    ]
    prints = [open_source(mixture(folder, *sources)).fingerprint() for sources in variants]
    assert len(set(prints)) == len(variants)
    assert open_source(mixture(folder, *variants[0], name="other.yml")).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.json", "fractoin": 0.5}, "unknown key sources.0.fractoin; did you mean fraction?"),
        ({"path": "a.json", "zzz": 1}, "unknown key sources.0.zzz; known: path, images, fraction, first"),
        ({"images": "x"}, "key sources.0.path is missing"),
        ({"path": "a.json", "fraction": 1.5}, "sources.0.fraction: Input should be less than or equal to 1, got 1.5"),
        ({"path": "a.json", "first": 0}, "sources.0.first"),
        (
            {"path": "a.json", "first": 3, "weight": 2},
            "give one of fraction, first, random and weight, not first and weight",
        ),
    ],
)
def test_mistakes_in_the_file_are_named(folder: Path, source: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_source(mixture(folder, source))
    assert message in str(caught.value)
    assert "mix.yaml" in str(caught.value)
    assert ";" not in str(caught.value).replace("; did you mean", "").replace("; known", ""), "one fault, one message"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.json", "first": 41}, "source 1: first=41, but it has 40 records: lower it"),
        ({"path": "a.json", "random": 41}, "source 1: random=41, but it has 40 records: lower it"),
        ({"path": "a.json", "fraction": 0.01}, "source 1: 0.01 of 40 records is none: raise the share"),
        ({"path": "empty.json"}, "source 1: contains no records"),
        ({"path": "mix.yaml"}, "a mixture inside a mixture: list its sources themselves"),
    ],
)
def test_what_a_source_cannot_give_is_said(folder: Path, source: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(mixture(folder, source))
    assert message in str(caught.value)


def test_files_that_are_no_mixture(folder: Path) -> None:
    for content, message in (
        ("sources: []", "sources is empty: list at least one"),
        ("- a", "expected a mapping"),
        ("a: [", "YAML"),
    ):
        (folder / "mix.yaml").write_text(content)
        with pytest.raises(UsageError, match=message):
            open_source(folder / "mix.yaml")
    with pytest.raises(DataError, match=r"none\.yaml: no such file; expected a YAML mixture"):
        open_source(folder / "none.yaml")
    with pytest.raises(UsageError, match="a mixture names the image folder of each source itself"):
        open_source(mixture(folder, {"path": "a.json"}), folder)


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        (None, range(40)),
        ("all", range(40)),
        ("first:7", range(7)),
        ("first:10%", range(4)),
        ("first:11%", range(5)),  # rounded up
        ("end:7", range(33, 40)),
        ("end:10%", range(36, 40)),
        ("first:4000", range(40)),
        ("end", range(40)),
        ("random:100%", range(40)),
    ],
)
def test_llava_next_s_strategies(folder: Path, strategy: str | None, rows: range) -> None:
    entry = {"json_path": "a.json"} | ({} if strategy is None else {"sampling_strategy": strategy})
    (folder / "next.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    assert numbers(folder / "next.yaml") == list(rows)


def test_llava_next_s_random_choice_is_its_seed_s(folder: Path) -> None:
    def drawn(**changes: Any) -> list[int]:
        entry = {"json_path": "sub/b.parquet", "sampling_strategy": "random:20%", **changes}
        (folder / "next.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
        return numbers(folder / "next.yaml")

    assert drawn() == drawn(seed=0) == numbers(mixture(folder, {"path": "sub/b.parquet", "fraction": 0.2}))
    assert drawn() != drawn(seed=1)
    assert len(drawn()) == 60


def test_llava_next_s_image_folder_is_the_run_s_or_the_entry_s(folder: Path) -> None:
    listed = [{"json_path": str(folder / "a.json")}, {"json_path": "a.json", "images": "sub"}]
    (folder / "next.yaml").write_text(yaml.safe_dump({"datasets": listed}))
    source = open_source(folder / "next.yaml", folder / "pictures")
    paths = [source.record(row).images[0].path for row in (0, 40)]
    assert paths == [folder / "pictures" / "0.png", folder / "sub" / "0.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"datasets": []}, "datasets is empty"),
        (
            {"datasets": [{"json_path": "a.json", "sampling_strategy": "last:5"}]},
            "expected all, or first, end or random",
        ),
        (
            {"datasets": [{"json_path": "a.json", "sampling_strategy": "all:5"}]},
            "expected all, or first, end or random",
        ),
        ({"datasets": [{"json_path": "a.json", "sampling_strategy": "first:-5"}]}, "expected all, or first"),
        ({"datasets": [{"json_path": "a.json", "sampling_strategy": "first:0"}]}, "of 40 records is none"),
        ({"datasets": [{"json_path": "a.json", "sampling_strategie": "all"}]}, "did you mean sampling_strategy"),
        ({"datasets": [{"path": "a.json"}]}, "unknown key datasets.0.path"),
    ],
)
def test_llava_next_s_layout_and_its_mistakes(folder: Path, content: dict[str, Any], message: str) -> None:
    (folder / "next.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises((DataError, UsageError), match=message):
        open_source(folder / "next.yaml")
