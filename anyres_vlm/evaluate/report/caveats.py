"""Why numbers that stand side by side may not be alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anyres_vlm.evaluate.report.published import JUDGE, PUBLISHED, guide
from anyres_vlm.evaluate.report.results import Result

POPE_SPLITS = 3


def beside_published(result: Result) -> list[str]:
    """What keeps a result from being compared with the published scores."""
    known, found = guide(result.benchmark), []
    if PUBLISHED[0].score(result.benchmark) is None:
        return []
    if result.limit is not None:
        each = " of each split" if result.benchmark == "pope" else ""
        found.append(f"only the first {result.limit:,} questions{each} (--limit): not the whole benchmark")
    elif known.sizes and result.questions not in known.sizes and result.benchmark != "vqav2":
        found.append(f"{result.questions:,} questions, the whole benchmark has {known.sizes[0]:,}")
    if result.unasked:
        found.append(f"{result.unasked:,} questions could not be asked and count as wrong")
    match result.benchmark:
        case "vqav2" if result.answers:
            found.append(
                "scored on annotations that are public (validation), published scores are test-dev's; COCO's "
                "train2017, from which the training mix is, has most pictures of val2014"
            )
        case "textvqa" if (said := result.protocol.get("ocr_tokens", "unknown")) != "in the prompt (Rosetta)":
            found.append(f"OCR tokens: {said}; published scores have them in the prompt, which is worth points")
        case "pope" if result.scores and len(result.scores) != POPE_SPLITS:
            found.append(f"splits {', '.join(result.scores)}: published scores are the mean of three")
        case "mmvet" if result.score is not None:
            found += _judging(result.judged_by or result.protocol.get("judge", "unknown"), result.protocol)
    return found


def _judging(judge: str, protocol: Mapping[str, str]) -> list[str]:
    found = []
    if judge != JUDGE:
        found.append(f"judge {judge}; published scores are {JUDGE}'s")
    prompt = protocol.get("judge_prompt", "unknown")
    if not prompt.startswith("MM-Vet's own"):
        found.append(f"judge's prompt: {prompt}; published scores have MM-Vet's own")
    return found


def between(results: Sequence[Result]) -> list[str]:
    """In what the runs of one benchmark differ besides the model."""
    choices = [
        {
            **result.protocol,
            "judged by": result.judged_by,
            "questions": f"{result.questions:,}",
            "limit": "none" if result.limit is None else str(result.limit),
            "pictures": "swapped (blind)" if result.blind else "its own",
        }
        for result in results
    ]
    found = []
    for key in dict.fromkeys(key for choice in choices for key in choice):
        values = [choice.get(key, "unknown") for choice in choices]
        if len(set(values)) > 1:
            told = "; ".join(f"{result.label}: {value}" for result, value in zip(results, values, strict=True))
            found.append(f"{key.replace('_', ' ')} differs: {told}")
    return found
