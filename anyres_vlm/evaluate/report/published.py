"""Published scores, and what is known of each benchmark: what it tests, what it misses, what its numbers start from."""

from __future__ import annotations

from dataclasses import dataclass

BENCHMARKS = ("vqav2", "gqa", "textvqa", "pope", "mmvet")


@dataclass(frozen=True)
class Published:
    """A model's scores in the order of BENCHMARKS, and where they stand."""

    model: str
    scores: tuple[float, ...]
    source: str

    def score(self, benchmark: str) -> float | None:
        """In percent; None for a benchmark that is not among them."""
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
    """How to read a benchmark's score. `floor` in percent is reached without looking; `sizes` are whole test sets."""

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
        "soft accuracy: min(1, people who agree / 3), over the ten subsets of nine",
        "Short answers about everyday photographs: objects, colours, counts, yes or no. Each question is asked of two "
        "pictures with different answers, so that words alone decide less.",
        "Reading, detail and long answers. Most answers are yes, no, a number or one word; a right answer in other "
        "words than people's gets nothing. Its pictures are COCO's, which the training mix has as well.",
        44.3,
        "a model of the question alone on test-standard (Goyal et al. 2017); always yes: 26.0",
        (107_394,),
        "test-dev2015",
    ),
    "gqa": Guide(
        "GQA",
        "exact match",
        "Composed questions made from scene graphs: attributes, relations, comparison, logic; by structural and "
        "semantic type.",
        "Knowledge, reading and natural wording: templates ask and one word is right, synonyms are wrong. Annotations "
        "have errors; people reach 89.3.",
        42.1,
        "a blind LSTM (Hudson and Manning 2019)",
        (12_578,),
        "testdev, balanced",
    ),
    "textvqa": Guide(
        "TextVQA",
        "soft accuracy of M4C's evaluator",
        "Reading text in photographs and answering from it: where resolution and tiles matter.",
        "With OCR tokens in the prompt it tests copying from the prompt as much as reading. Documents, charts and long "
        "text are not in it.",
        8.1,
        "a model of the question alone on validation (Singh et al. 2019), and only without OCR tokens",
        (5_000,),
        "validation, Rosetta's OCR tokens in the prompt (LLaVA's llava_textvqa_val_v051_ocr.jsonl)",
    ),
    "pope": Guide(
        "POPE",
        "mean F1 of the three splits",
        "Object hallucination: is there such an object? Half are there; what is not is random, popular, or what goes "
        "with the picture (adversarial).",
        "Attributes, counts, relations and what a model invents in free text. F1 forgives yes-saying: look at the "
        "share of yes, which should be 0.5.",
        66.7,
        "always yes (F1; 50.0 of accuracy)",
        (8_910, 9_000),
        "COCO val2014, mean of three splits",
    ),
    "mmvet": Guide(
        "MM-Vet",
        "mean grade of a judge",
        "Free answers that need several capabilities at once: recognition, reading, knowledge, spatial sense, "
        "language, mathematics.",
        "218 questions: a few points are chance. The judge is a model, whose version moves scores; long and confident "
        "answers tend to be graded up.",
        None,
        "nobody published a blind score; a judge grades what cannot be known near 0",
        (218,),
        "all questions, graded by gpt-4-0613 with MM-Vet's prompt",
    ),
    "heldout": Guide(
        "Held-out questions",
        "exact answers but for case and outer punctuation",
        "What a model trained on such pictures has learned, by task, on pictures that training never shows.",
        "Anything else: rendered pictures are no photographs, and an answer in other words is wrong.",
        None,
        "its own: the same questions with --swap-images; yes-or-no tasks start at 50",
    ),
}
JUDGE = "gpt-4-0613"


def guide(benchmark: str) -> Guide:
    """What is known of a benchmark; next to nothing of an unknown one."""
    return GUIDES.get(benchmark) or Guide(benchmark, "mean points", "Unknown here.", "Unknown here.")
