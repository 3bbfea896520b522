"""From one response to the turns of a conversation, or the reason why it is rejected."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from anyres_vlm.instruct.grounding import Reject, require_grounded
from anyres_vlm.instruct.job import Item, Prompt
from anyres_vlm.schema import IMAGE_TOKEN, Turn


def judge(entry: dict[str, Any], item: Item) -> Parsed:
    """Return the conversation of a response. Raises `Reject`."""
    if entry["status"] != 200:
        raise Reject("refused_request", f"HTTP {entry['status']}: {entry['body'][:200]}")
    completion = decode_body(entry["body"])
    try:
        (choice, *_) = completion["choices"]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        refusal = choice["message"].get("refusal")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Reject("broken_response", "no chat completion: it has no choices with a message") from None
    if refusal or reason == "content_filter":
        raise Reject("refusal", f"the endpoint reports a refusal: {str(refusal or reason)[:80]}")
    if reason == "length":
        raise Reject("cut_short", f"the answer reached the limit of {item.job.longest_answer} tokens")
    if not isinstance(text, str):
        raise Reject("broken_response", f"the message's content is {type(text).__name__}, expected text")
    prompt = item.prompt
    question = prompt.questions[int(item.key[:8], 16) % len(prompt.questions)] if prompt.questions else ""
    parsed = parse_response(text, prompt, question)
    require_grounded(parsed.turns, item.scene, item.job.checks.max_absent_objects)
    return parsed


def decode_body(body: str) -> Any:
    """Parse the JSON body of a response. Raises `Reject` if it is malformed."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Reject("broken_response", f"the body is no JSON, {len(body)} characters: {body[:60]!a}") from None


@dataclass(frozen=True, slots=True)
class Parsed:
    """The turns of a conversation; `repaired` if the text deviated slightly from the requested form."""

    turns: tuple[Turn, ...]
    repaired: bool


FENCE = re.compile(r"\A```\w*[ \t]*\n(?P<inside>.*)\n```\Z", re.DOTALL)
LABEL = re.compile(
    r"""^[ \t]* (?:\#{1,4}[ \t]+)? (?P<mark>[*_]{0,3}) (?P<role>question|answer) (?:[ \t]*\d{1,2})? [ \t]*
    (?: (?P=mark)[ \t]*: | :[ \t]*(?P=mark) )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
RULE = re.compile(r"^[ \t]*(?:={3,}|-{3,}|\*{3,})[ \t]*$", re.MULTILINE)  # lines between turns
FORBIDDEN = re.compile(rf"[\x00-\x08\x0e-\x1f\ud800-\udfff\ufffd]|{IMAGE_TOKEN}")  # controls, lone surrogates
PLAIN_LABEL = re.compile(r"(Question|Answer):")

CANNOT = r"(?:cannot|can't|can\ not|won't|don't|do\ not|am\ (?:not\ able|unable)\ to|'m\ (?:not\ able|unable)\ to)"
REFUSED = (
    r"help|assist|comply|provide|fulfil|generate|create|write|see|view|have\ (?:access|enough)|continue|do\ that"
    r"|describe|answer|tell|determine|identify"
)
REFUSAL = re.compile(
    rf"""\A\W* (?:
        (?:i'm|i\ am)\ (?:very\ |so\ |really\ )?sorry\b
      | (?:sorry|apologies|unfortunately|i\ apologi[sz]e)\W+ (?:but\ )?(?:i|as\ an?)\b
      | i\ ?{CANNOT}\ (?:{REFUSED})\b
      | i\ (?:regret\ that|must\ decline)\b
    )
    | \bas\ an?\ (?:ai|artificial\ intelligence|(?:large\ )?language\ model)\b
    | \bi(?:'m|\ am)\ (?:just\ |only\ )?an?\ (?:ai|language\ model)\b
    | \bnot\ enough\ (?:information|context|details?)\b""",
    re.IGNORECASE | re.VERBOSE,
)
TELLS = r"(?:notes?|annotations?|descriptions?|sentences?|information|details|context|boxes)"
INPUT = rf"(?:{TELLS}|text|lists?)"
FRACTION = r"[01]?\.\d+"  # of an image's side
MENTIONS = re.compile(
    rf"""\b(?:captions?|captioned|bounding[- ]box(?:es)?|bbox(?:es)?|coordinates?|annotations?|annotated)\b
    | \b(?:provided|given)\ {INPUT}\b | \b{INPUT}\ (?:provided|given)\b | \bimage\ descriptions?\b
    | \b(?:list\ of\ objects|object\ list|objects?\ listed|listed\ objects?)\b
    | \b(?:the|these|those)\ (?:\w+\ )?{TELLS}\ (?:says?|states?|mentions?|describes?|indicates?|do(?:es)?\ not)\b
    | \b(?:based\ on|according\ to)\ (?:the|these|those|your)\ {INPUT}\b
    | \b(?:mentioned|described|stated|specified|listed)\ in\ (?:the|these|those|your)\ {INPUT}\b
    | \b(?:as|is|are|was|were)\ (?:described|mentioned|stated)\b(?!\ (?:on|by)\b)
    | [\[(]\s* {FRACTION} (?:\s*,\s*{FRACTION}){{1,3}} \s*[\])] | (?<![\d.$])0?\.\d{{2,3}}\s*,\s*0?\.\d{{2,3}}\b
    | [\[(]\s* \d+ (?:\s*,\s*\d+){{3}} \s*[\])]""",
    re.IGNORECASE | re.VERBOSE,
)


def parse_response(text: str, prompt: Prompt, question: str) -> Parsed:
    """Parse a response strictly; deviations with only one possible reading are repaired.

    `question` is the human's turn for a prompt with questions. Raises `Reject`.
    """
    found = "\n".join(text.splitlines()).replace("\u2019", "'").strip()  # one apostrophe, one kind of line break
    cleaned = FENCE.sub(lambda fence: fence["inside"], found).strip()
    if not cleaned:
        raise Reject("malformed", "the response is empty")
    if refusal := REFUSAL.search(cleaned):
        raise Reject("refusal", f"the model refuses: {_shorten(cleaned[refusal.start() :])}")
    if prompt.questions:
        turns, repaired = _bare_answer(cleaned, question)
    else:
        turns, repaired = _labelled(cleaned)
        if len(turns) != 2 * prompt.rounds:
            raise Reject("wrong_turns", f"{len(turns) // 2} questions with answers, asked for were {prompt.rounds}")
    for turn in turns:
        _require_clean(turn)
        if turn.role == "assistant" and len(turn.text.split()) < prompt.least_words:
            raise Reject("malformed", f"an answer of fewer than {prompt.least_words} words: {_shorten(turn.text)}")
    return Parsed(turns, repaired or cleaned != found)


def _bare_answer(text: str, question: str) -> tuple[tuple[Turn, ...], bool]:
    """Return the whole text as the answer, without an `Answer:` label at its start."""
    labels = list(LABEL.finditer(text))
    if labels:
        if len(labels) > 1 or labels[0].start() or labels[0]["role"].lower() != "answer":
            raise Reject("malformed", f"questions where a description was asked for: {_shorten(text)}")
        text = text[labels[0].end() :].strip()
    return (Turn("user", question), Turn("assistant", text)), bool(labels)


def _labelled(text: str) -> tuple[tuple[Turn, ...], bool]:
    """Split a text at its `Question:` and `Answer:` labels; bold or numbered labels and rules are removed."""
    labels = list(LABEL.finditer(text))
    if not labels or text[: labels[0].start()].strip():
        raise Reject("malformed", f"expected 'Question:' first, got {_shorten(text)}")
    turns: list[Turn] = []
    ends = [label.start() for label in labels[1:]] + [len(text)]
    repaired = False
    for number, (label, end) in enumerate(zip(labels, ends, strict=True), start=1):
        wanted = "question" if number % 2 else "answer"
        if label["role"].lower() != wanted:
            raise Reject("wrong_turns", f"turn {number}: expected the {wanted}, got {label.group().strip()!r}")
        inside = text[label.end() : end]
        said = RULE.sub("", inside).strip()
        repaired |= PLAIN_LABEL.fullmatch(label.group()) is None or said != inside.strip()
        turns.append(Turn("user" if number % 2 else "assistant", said))
    return tuple(turns), repaired


def _require_clean(turn: Turn) -> None:
    """Raise `Reject` for a turn that is empty, refuses, has forbidden characters or mentions the model's input."""
    who = "question" if turn.role == "user" else "answer"
    if not turn.text:
        raise Reject("malformed", f"an empty {who}")
    if FORBIDDEN.search(turn.text):
        raise Reject("malformed", f"a control sequence in {_shorten(turn.text)}")
    if turn.role == "assistant" and REFUSAL.search(turn.text):
        raise Reject("refusal", f"an answer refuses: {_shorten(turn.text)}")
    if mention := MENTIONS.search(turn.text):
        raise Reject("mentions_input", f"the {who} talks of what the model was given: {mention.group()!r}")


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


PERMUTATIONS = 128  # standard error of a similarity: about 0.04
SHINGLE = 3  # words


class NearDuplicates:
    """Finds near-duplicates with MinHash, keeping the first of each group. The permutations have a fixed seed."""

    def __init__(self, max_similarity: float) -> None:
        self._max = max_similarity
        self._index = MinHashLSH(threshold=max(max_similarity - 0.1, 0.1), num_perm=PERMUTATIONS)
        self._kept: dict[str, NDArray[np.uint32]] = {}

    def like(self, name: str, turns: Sequence[Turn]) -> str | None:
        """Return an earlier conversation whose similarity reaches the limit; None if there is none and this is kept."""
        sketch = MinHash(PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in sorted(_shingles(turns))])
        for other in sorted(self._index.query(sketch)):
            if np.mean(sketch.hashvalues == self._kept[other]) >= self._max:
                return str(other)
        self._index.insert(name, sketch)
        self._kept[name] = sketch.hashvalues
        return None


def _shingles(turns: Sequence[Turn]) -> set[str]:
    """Return the word triples of the answers."""
    words = " ".join(turn.text.lower() for turn in turns if turn.role == "assistant").split()
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(len(words) - SHINGLE + 1, 1))}
