"""From a response's text to turns, strictly; repaired only where there is one way to read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from anyres_vlm.instruct.prompts import Prompt
from anyres_vlm.schema import IMAGE_TOKEN, Turn

RejectKind = Literal[
    "refused_request",
    "broken_response",
    "cut_short",
    "refusal",
    "malformed",
    "wrong_turns",
    "mentions_input",
    "absent_objects",
    "wrong_count",
    "wrong_side",
    "near_duplicate",
    "unfinished",
]


class Reject(Exception):
    """A response that is not used, and why."""

    def __init__(self, kind: RejectKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Parsed:
    """The turns of a conversation; `repaired` where the text was not quite in the form that was asked for."""

    turns: tuple[Turn, ...]
    repaired: bool


FENCE = re.compile(r"\A```\w*[ \t]*\n(?P<inside>.*)\n```\Z", re.DOTALL)
LABEL = re.compile(
    r"""^[ \t]* (?:\#{1,4}[ \t]+)? (?P<mark>[*_]{0,3}) (?P<role>question|answer) (?:[ \t]*\d{1,2})? [ \t]*
    (?: (?P=mark)[ \t]*: | :[ \t]*(?P=mark) )""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
RULE = re.compile(r"^[ \t]*(?:={3,}|-{3,}|\*{3,})[ \t]*$", re.MULTILINE)  # lines between turns
FORBIDDEN = re.compile(rf"[\x00-\x08\x0e-\x1f\ud800-\udfff\ufffd]|{IMAGE_TOKEN}")  # controls, half characters
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
SHARE = r"[01]?\.\d+"  # of an image's side
MENTIONS = re.compile(
    rf"""\b(?:captions?|captioned|bounding[- ]box(?:es)?|bbox(?:es)?|coordinates?|annotations?|annotated)\b
    | \b(?:provided|given)\ {INPUT}\b | \b{INPUT}\ (?:provided|given)\b | \bimage\ descriptions?\b
    | \b(?:list\ of\ objects|object\ list|objects?\ listed|listed\ objects?)\b
    | \b(?:the|these|those)\ (?:\w+\ )?{TELLS}\ (?:says?|states?|mentions?|describes?|indicates?|do(?:es)?\ not)\b
    | \b(?:based\ on|according\ to)\ (?:the|these|those|your)\ {INPUT}\b
    | \b(?:mentioned|described|stated|specified|listed)\ in\ (?:the|these|those|your)\ {INPUT}\b
    | \b(?:as|is|are|was|were)\ (?:described|mentioned|stated)\b(?!\ (?:on|by)\b)
    | [\[(]\s* {SHARE} (?:\s*,\s*{SHARE}){{1,3}} \s*[\])] | (?<![\d.$])0?\.\d{{2,3}}\s*,\s*0?\.\d{{2,3}}\b
    | [\[(]\s* \d+ (?:\s*,\s*\d+){{3}} \s*[\])]""",
    re.IGNORECASE | re.VERBOSE,
)


def parse_response(text: str, prompt: Prompt, question: str) -> Parsed:
    """The turns of a response. `question` is what a prompt with questions has the human ask.

    Raises `Reject`.
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
    """The whole text, which may have been put behind one label."""
    labels = list(LABEL.finditer(text))
    if labels:
        if len(labels) > 1 or labels[0].start() or labels[0]["role"].lower() != "answer":
            raise Reject("malformed", f"questions where a description was asked for: {_shorten(text)}")
        text = text[labels[0].end() :].strip()
    return (Turn("user", question), Turn("assistant", text)), bool(labels)


def _labelled(text: str) -> tuple[tuple[Turn, ...], bool]:
    """Turns behind `Question:` and `Answer:`; bold or numbered labels and lines between turns are left out."""
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
    """Raises `Reject` for a turn that is empty, refuses, holds what no text may or talks of the input."""
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
