"""Published scores, how to read each benchmark, and why a result may not be comparable with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anyres_vlm.evaluate.benchmarks.pope import dataset_and_split
from anyres_vlm.evaluate.report.results import Result

BENCHMARKS = ("vqav2", "gqa", "textvqa", "pope", "mmvet")
POPE_SPLITS = 3
JUDGE = "gpt-4-0613"


@dataclass(frozen=True)
class Published:
    """A model's scores in the order of BENCHMARKS, and their source."""

    model: str
    scores: tuple[float, ...]
    source: str

    def score(self, benchmark: str) -> float | None:
        """Return the score in percent; None for other benchmarks."""
        return dict(zip(BENCHMARKS, self.scores, strict=True)).get(benchmark)


LLAVA_15 = "Liu et al., Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744"
LLAVA_NEXT = "LLaVA-NeXT, llava-vl.github.io/blog/2024-01-30-llava-next, and its model zoo"
PUBLISHED = (
    Published("LLaVA-1.5-7B", (78.5, 62.0, 58.2, 85.9, 31.1), LLAVA_15),
    Published("LLaVA-1.6-Vicuna-7B", (81.8, 64.2, 64.9, 86.5, 43.9), LLAVA_NEXT),
    Published("LLaVA-1.6-Mistral-7B", (82.2, 64.8, 65.7, 86.7, 47.3), LLAVA_NEXT),
    Published("LLaVA-1.6-Vicuna-13B", (82.8, 65.4, 67.1, 86.2, 48.4), LLAVA_NEXT),
    Published("LLaVA-1.6-34B", (83.7, 67.1, 69.5, 87.7, 57.4), LLAVA_NEXT),
)


@dataclass(frozen=True)
class Guide:
    """How to read a benchmark's score. `floor` is the score of a blind model, `sizes` those of the whole test set."""

    title: str
    measure: str
    tests: str
    misses: str
    floor: float | None = None
    floor_is: str = ""
    sizes: tuple[int, ...] = ()
    published_on: str = ""


GUIDES = {
    "vqav2": Guide(
        "VQAv2",
        "soft accuracy: min(1, matching human answers / 3), averaged over the ten subsets of nine",
        "Short answers about everyday photographs: objects, colours, counts, yes or no. Each question is asked about "
        "two images with different answers, which weakens priors from the text alone.",
        "Reading, detail and long answers. Most answers are yes, no, a number or one word; synonyms of the human "
        "answers score 0. The images are from COCO, which is also in the training mix.",
        44.3,
        "a question-only model on test-standard (Goyal et al. 2017); always yes: 26.0",
        (107_394,),
        "test-dev2015",
    ),
    "gqa": Guide(
        "GQA",
        "exact match",
        "Compositional questions generated from scene graphs: attributes, relations, comparison, logic; by structural "
        "and semantic type.",
        "Knowledge, reading and natural wording: questions come from templates and only one word is correct; synonyms "
        "are wrong. Annotations have errors; humans reach 89.3.",
        42.1,
        "a blind LSTM (Hudson and Manning 2019)",
        (12_578,),
        "testdev, balanced",
    ),
    "textvqa": Guide(
        "TextVQA",
        "soft accuracy of M4C's evaluator",
        "Reading text in photographs, where resolution and tiles matter.",
        "With OCR tokens in the prompt it tests copying from the prompt as much as reading. It has no documents, "
        "charts or long text.",
        8.1,
        "a question-only model on validation (Singh et al. 2019); applies without OCR tokens only",
        (5_000,),
        "validation, Rosetta's OCR tokens in the prompt (LLaVA's llava_textvqa_val_v051_ocr.jsonl)",
    ),
    "pope": Guide(
        "POPE",
        "mean F1 of the three splits",
        "Object hallucination: is there such an object? Half of the objects are present; absent ones are random, "
        "popular, or likely in the scene (adversarial).",
        "Attributes, counts, relations and hallucination in free text. F1 tolerates a bias to yes: check that the "
        "share of yes is near 0.5.",
        66.7,
        "always yes (F1; accuracy 50.0)",
        (8_910, 9_000),
        "COCO val2014, mean of three splits",
    ),
    "mmvet": Guide(
        "MM-Vet",
        "mean grade of a judge",
        "Free answers that combine capabilities: recognition, reading, knowledge, spatial awareness, language, "
        "mathematics.",
        "218 questions, so a few points are noise. The judge is a model, and its version changes scores; long and "
        "confident answers tend to get higher grades.",
        None,
        "no blind score is published; a judge grades guesses near 0",
        (218,),
        "all questions, graded by gpt-4-0613 with MM-Vet's prompt",
    ),
    "heldout": Guide(
        "Held-out questions",
        "exact match except for case and outer punctuation",
        "What a model has learned from its training images, by task, on images that are not in the training set.",
        "Anything else: rendered images are not photographs, and synonyms are wrong.",
        None,
        "measure it with --swap-images on the same questions; yes-or-no tasks start at 50",
    ),
}


def guide(benchmark: str) -> Guide:
    """Return how to read a benchmark; an unknown one gets a blank guide."""
    return GUIDES.get(benchmark) or Guide(benchmark, "mean points", "unknown", "unknown")


def caveats(result: Result) -> list[str]:
    """Return what keeps a result from being compared with the published scores."""
    known, found = guide(result.benchmark), []
    if PUBLISHED[0].score(result.benchmark) is None:
        return []
    if result.limit is not None:
        each = " of each split" if result.benchmark == "pope" else ""
        found.append(f"only the first {result.limit:,} questions{each} (--limit), not the whole benchmark")
    elif known.sizes and result.questions not in known.sizes and result.benchmark != "vqav2":
        found.append(f"{result.questions:,} questions; the whole benchmark has {known.sizes[0]:,}")
    if result.unasked:
        found.append(f"{len(result.unasked):,} questions could not be asked and count as wrong")
    match result.benchmark:
        case "vqav2" if result.answers:
            found.append(
                "scored on public annotations (validation); published scores are on test-dev. Most images of val2014 "
                "are also in COCO's train2017, which is in the training mix"
            )
        case "textvqa" if (ocr := result.protocol.get("ocr_tokens", "unknown")) != "in the prompt (Rosetta)":
            found.append(f"OCR tokens: {ocr}; published scores have them in the prompt, which raises scores by points")
        case "pope" if result.scores:
            found += _pope_data(result)
        case "mmvet" if result.score is not None:
            found += _judging(result.judged_by or result.protocol.get("judge", "unknown"), result.protocol)
    return found


def _pope_data(result: Result) -> list[str]:
    found = []
    if len(result.scores) != POPE_SPLITS:
        found.append(f"splits {', '.join(result.scores)}; published scores are the mean of three")
    datasets = dict.fromkeys(dataset_and_split(name)[0] for name in result.annotations)
    if other := [name for name in datasets if name != "coco"]:
        found.append(
            f"questions of {', '.join(filter(None, other)) or 'another dataset'}; published scores are on COCO"
        )
    return found


def _judging(judge: str, protocol: Mapping[str, str]) -> list[str]:
    found = []
    if judge != JUDGE:
        found.append(f"judge {judge}; published scores use {JUDGE}")
    prompt = protocol.get("judge_prompt", "unknown")
    if not prompt.startswith("MM-Vet's own"):
        found.append(f"judge's prompt: {prompt}; published scores use MM-Vet's own")
    return found


def run_differences(results: Sequence[Result]) -> list[str]:
    """Return how the runs of one benchmark differ in anything but the model."""
    are_files_known = all(result.annotations for result in results)  # results of earlier versions do not name them
    choices = [
        {
            **result.protocol,
            "files": ", ".join(result.annotations) if are_files_known else "",
            "judged by": result.judged_by,
            "questions": f"{result.questions:,}",
            "limit": "none" if result.limit is None else str(result.limit),
        }
        for result in results
    ]
    found = []
    for key in dict.fromkeys(key for choice in choices for key in choice):
        values = [choice.get(key, "unknown") for choice in choices]
        if len(set(values)) > 1:
            listed = "; ".join(f"{result.label}: {value}" for result, value in zip(results, values, strict=True))
            found.append(f"different {key.replace('_', ' ')}: {listed}")
    return found
