"""Speed of indexing a dataset, compared with a bare loop over the same headers and tokenizer calls.

Run as `tools/bench/data.py index`. Files and text are generated: small JPEGs of many sizes, half of them with EXIF, and
dialogues of one to five questions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from common import of_peer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anyres_vlm.checkpoints.tokenizer import load_tokenizer
from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.data.headers import read_size
from anyres_vlm.data.index.build import CHUNK, build_index
from anyres_vlm.data.index.rows import BATCH, IndexSettings
from anyres_vlm.data.sources import open_source
from anyres_vlm.geometry import Tiling
from anyres_vlm.schema import IMAGE_TOKEN, Record

VOCABULARY = 32_000  # of the byte-level BPE, which is trained on the dialogues
WORDS = 20_000
QUICK = {"images": 5000, "runs": 3}
DISTINCT = 500  # number of different JPEGs; the others are copies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--images", type=int, default=20_000, help="JPEGs, one per record")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=5, help="alternating runs; medians are shown")
    parser.add_argument("--tokenizer", choices=("bpe", "tiny"), default="bpe", help="trained here, or the embedded one")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the data, then alternate between indexing and the bare loop. Rates are in images per second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, arguments.images, random.Random(0))
        tokenizer = load_tokenizer("embedded:tiny-lm") if arguments.tokenizer == "tiny" else train_tokenizer(folder)
        conversation = ConversationTokenizer("vicuna_v1", tokenizer)
        settings = IndexSettings(conversation, Tiling(), max_length=4096)
        bare = BareLoop(folder, conversation)
        bare(arguments.workers)  # fills the page cache for both
        seconds: dict[str, list[float]] = {"bare": [], "index": []}
        for _ in range(arguments.runs):
            seconds["bare"].append(_timed(lambda: bare(arguments.workers)))
            seconds["index"].append(_timed(lambda: _index(folder, settings, arguments.workers)))
        tokens = bare.tokens / arguments.images
    rates = {name: arguments.images / statistics.median(times) for name, times in seconds.items()}
    return {
        "images": arguments.images,
        "workers": arguments.workers,
        "tokenizer": arguments.tokenizer,
        "text_tokens_a_record": round(tokens, 1),
        "bare_images_per_second": round(rates["bare"]),
        "index_images_per_second": round(rates["index"]),
        "ratio": round(rates["index"] / rates["bare"], 3),
        "ratios": {"bare loop": of_peer(seconds["bare"], seconds["index"])},
        "seconds": {name: [round(value, 2) for value in times] for name, times in seconds.items()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    print(
        f"{result['images']:,} JPEGs, {result['workers']} processes, {result['text_tokens_a_record']} text tokens each"
    )
    print(f"bare loop of headers and tokenizer: {result['bare_images_per_second']:>7,} images/s")
    print(f"index:                              {result['index_images_per_second']:>7,} images/s")
    print(f"ratio:                              {result['ratio']:>7.1%}")


class BareLoop:
    """Header and tokenizer calls only, in the same batches and number of processes as the index."""

    def __init__(self, folder: Path, conversation: ConversationTokenizer) -> None:
        source = open_source(folder / "data.json", folder)
        records = [item for item in source.records(0, len(source)) if isinstance(item, Record)]
        self.texts = [conversation.render(record.turns)[0] for record in records]
        self.files = [image.path for record in records for image in record.images if image.path is not None]
        self.tokenizer = conversation.tokenizer
        self.tokens = 0

    def __call__(self, workers: int) -> None:
        """Process all records."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_keep, initargs=(self,)) as pool:
            self.tokens = sum(pool.map(_bare_chunk, range(0, len(self.texts), CHUNK)))

    def chunk(self, first: int) -> int:
        """Process one chunk of records and return the number of its text tokens."""
        for path in self.files[first : first + CHUNK]:
            read_size(path)
        tokens = 0
        for start in range(first, first + CHUNK, BATCH):
            if texts := self.texts[start : min(start + BATCH, first + CHUNK)]:
                encoded = self.tokenizer(texts, return_offsets_mapping=True)
                tokens += sum(map(len, encoded["input_ids"]))
        return tokens


_kept: list[BareLoop] = []


def _keep(loop: BareLoop) -> None:
    _kept[:] = [loop]


def _bare_chunk(first: int) -> int:
    return _kept[0].chunk(first)


def _index(folder: Path, settings: IndexSettings, workers: int) -> None:
    out = folder / "index.parquet"
    build_index(folder / "data.json", folder, settings, out, workers=workers, max_bad_fraction=0.0, rebuild=True)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def make_data(folder: Path, images: int, rng: random.Random) -> None:
    """Write `images` JPEGs in folders of a thousand, and data.json with a dialogue about each."""
    pictures = [_jpeg(rng) for _ in range(DISTINCT)]
    words = [_word(rng) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]  # Zipf's law
    stream = iter(rng.choices(words, weights, k=4_000_000))

    def sentence(count: int) -> str:
        nonlocal stream
        drawn = [word for word, _ in zip(stream, range(count), strict=False)]
        if len(drawn) < count:
            stream = iter(rng.choices(words, weights, k=4_000_000))
        return " ".join(drawn or ["yes"]).capitalize()

    entries = []
    for number in range(images):
        name = f"{number // 1000:04d}/{number:07d}.jpg"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.choice(pictures))
        turns: list[dict[str, str]] = []
        for turn in range(rng.randint(1, 5)):
            opening = f"{IMAGE_TOKEN}\n" if turn == 0 else ""
            turns.append({"from": "human", "value": f"{opening}{sentence(rng.randint(4, 15))}?"})
            turns.append({"from": "gpt", "value": f"{sentence(min(int(rng.lognormvariate(2.5, 1)) + 1, 200))}."})
        entries.append({"id": f"{number:07d}", "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")


def _jpeg(rng: random.Random) -> bytes:
    """Return a small JPEG whose header states a random size; half of them have EXIF like that of cameras."""
    exif = Image.Exif()
    exif[0x0110] = "Camera " * rng.randint(1, 20)
    exif[0x0112] = rng.randint(1, 8)
    options: dict[str, Any] = {"exif": exif} if rng.random() < 0.5 else {}
    buffer = BytesIO()
    noise = Image.frombytes("RGB", (48, 32), rng.randbytes(48 * 32 * 3))
    noise.save(buffer, format="JPEG", quality=rng.randint(40, 95), progressive=rng.random() < 0.2, **options)
    content = bytearray(buffer.getvalue())
    start = max(content.find(b"\xff\xc0\x00\x11"), content.find(b"\xff\xc2\x00\x11"))
    struct.pack_into(">HH", content, start + 5, rng.randint(100, 4000), rng.randint(100, 4000))
    return bytes(content)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfglmnprstv") + rng.choice("aeiou") for _ in range(rng.randint(1, 5)))


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of the usual size on the dialogues."""
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))[:5000]
    texts = (turn["value"] for entry in entries for turn in entry["conversations"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "llm")
    return load_tokenizer(str(folder / "llm"))
