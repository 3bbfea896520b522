"""How VQA answers are made comparable: the rules of the official VQA and TextVQA evaluations, their slips included.

Sources: GT-Vision-Lab/VQA, vqaEval.py at a013f00, and the answer processor of MMF's M4C evaluator, which LLaVA uses for
TextVQA and for VQAv2 submissions. What looks wrong here is wrong there, and scores must be theirs.
"""

from __future__ import annotations

import re
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = frozenset({"a", "an", "the"})
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_REMOVED = 32  # both sources pass a flag of `re`, whose number is 32, where `sub` expects a count

APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: right for right in APOSTROPHES for wrong in _without_one_apostrophe(right)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the sources have this one the wrong way round


def one_line(text: str) -> str:
    """Line ends and tabs as spaces, none around the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """A mark goes where it stands beside a space anywhere in the text or a number has a comma, else becomes a space."""
    has_number_comma = COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        goes = has_number_comma or f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if goes else " ")
    return PERIOD.sub("", stripped, count=PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe, single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)  # people's answers repeat
def vqa_answer(text: str) -> str:
    """An answer of one line as VQA's evaluation compares it."""
    return normalise_words(strip_punctuation(text))


def evalai_answer(text: str) -> str:
    """An answer as M4C's `EvalAIAnswerProcessor` compares it."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(one_line(words))
