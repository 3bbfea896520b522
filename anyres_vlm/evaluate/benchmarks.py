"""The benchmarks by name."""

from __future__ import annotations

from anyres_vlm.errors import UsageError
from anyres_vlm.evaluate.benchmark import Benchmark
from anyres_vlm.evaluate.gqa import GQA
from anyres_vlm.evaluate.judge import Judge
from anyres_vlm.evaluate.mmvet import MMVet
from anyres_vlm.evaluate.pope import POPE
from anyres_vlm.evaluate.textvqa import TextVQA
from anyres_vlm.evaluate.vqav2 import VQAv2


def make_benchmark(name: str, ocr_tokens: bool | None, judge: Judge | None) -> Benchmark:
    """A benchmark with the choices that it needs; those of others do not matter."""
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
    raise UsageError(f"benchmark {name!r}: expected vqav2, gqa, textvqa, pope or mmvet")
