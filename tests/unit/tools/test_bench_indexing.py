"""The indexing benchmark compares equal work: its bare loop reads the same headers and tokens as the index."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import data_indexing
import pytest
from PIL import Image

from anyres_vlm.checkpoints.bases import load_tokenizer
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.index.build import build_index
from anyres_vlm.data.index.rows import IndexSettings
from anyres_vlm.geometry import Tiling

IMAGES = 40


def test_the_bare_loop_does_the_work_of_the_index(tmp_path: Path) -> None:
    data_indexing.make_data(tmp_path, IMAGES, random.Random(0))
    conversation = ConversationTokenizer("vicuna_v1", load_tokenizer("embedded:tiny-lm"))
    bare = data_indexing.BareLoop(tmp_path, conversation)
    bare(1)
    settings = IndexSettings(conversation, Tiling(), max_length=4096)
    out = tmp_path / "index.parquet"
    index = build_index(tmp_path / "data.json", tmp_path, settings, out, workers=1, max_bad_fraction=0.0).index
    assert len(index) == len(bare.texts) == len(bare.files) == IMAGES
    assert bare.tokens == int(index.numbers("text_tokens").sum()) + IMAGES, "one <image> token a record is no text"
    for place, path in enumerate(bare.files):
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            height, width = image.size if turned else image.size[::-1]
        size = read_size(path)
        assert (size.height, size.width) == (height, width)
        assert index.sizes(place) == (size,)


def test_a_run_prints_its_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    data_indexing.add_arguments(parser)
    words = ["--images", "20", "--workers", "1", "--runs", "1", "--tokenizer", "tiny"]
    result = data_indexing.run(parser.parse_args(words))
    data_indexing.show(result)
    assert f"ratio:{result['ratio']:>25.1%}".split() == capsys.readouterr().out.splitlines()[-1].split()
