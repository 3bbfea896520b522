"""Benchmarks: official questions, prompts, submission formats and scores."""

from __future__ import annotations

from anyres_vlm.errors import UsageError
from anyres_vlm.evaluate.benchmarks.base import Benchmark
from anyres_vlm.evaluate.benchmarks.gqa import GQA
from anyres_vlm.evaluate.benchmarks.heldout import Heldout
from anyres_vlm.evaluate.benchmarks.mmvet import Judge, MMVet
from anyres_vlm.evaluate.benchmarks.pope import POPE
from anyres_vlm.evaluate.benchmarks.vqa import TextVQA, VQAv2


def make_benchmark(
    name: str, ocr_tokens: bool | None = None, judge: Judge | None = None, swap_images: bool = False
) -> Benchmark:
    """Return a benchmark with the options that apply to it; the others are ignored."""
    match name:
        case "vqav2":
            return VQAv2()
        case "gqa":
            return GQA()
        case "textvqa":
            return TextVQA(ocr_tokens)
        case "pope":
            return POPE()
        case "mmvet":
            return MMVet(judge)
        case "heldout":
            return Heldout(swap_images)
    raise UsageError(f"benchmark {name!r}: expected vqav2, gqa, textvqa, pope, mmvet or heldout")
