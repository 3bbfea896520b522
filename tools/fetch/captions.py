"""Captions of fetched pictures: from descriptions of stamps and Unicode names of emoji, and our own for photographs."""

from __future__ import annotations

import re
import unicodedata

# Plain marks replace typographic ones, so that the same word has the same tokens.
PLAIN_MARKS = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - "}
)
DETERMINERS = "A|An|The|Some|Our|One|Two|Three|Four|Five"
# Where the text of a stamp stops naming the picture and starts to describe its subject.
NEWS = re.compile(r" - |, (?=also|from|a )| (?:is|are|was|were|means|lets|gets|carry|carries|resembles)\b")
# Stamps whose text is true but does not name what is drawn.
UNNAMED_STAMPS = frozenset({"explosion", "menorah", "old_naval_shell", "recycle"})

# Words in the names of characters that are writing, not pictures.
WRITING = re.compile(
    r"\b(?:CJK|KATAKANA|IDEOGRAPH|SQUARED|LATIN CAPITAL|MODIFIER|REGIONAL INDICATOR|COPYRIGHT|REGISTERED|TRADE MARK)\b"
)
# In most Unicode names, "black" and "white" mean filled and outlined; in these they are the visible colours.
REALLY_COLOURED = re.compile(r"(?:SQUARE|CIRCLE|HEART|FLAG)$")
RENAMED = {"HEAVY BLACK HEART": "red heart", "WHITE FLOWER": "flower stamp", "T-REX": "T-Rex dinosaur"}
POSSESSIVES = {"mans": "man's", "womans": "woman's", "mens": "men's", "womens": "women's"}
PROPER = re.compile(
    r"\b(?:africa|americas?|american|asia|australia|europe|bactrian|chinese|european|hindu|japanese|latin|orthodox|shinto"
    r"|aries|taurus|gemini|cancer|leo|virgo|libra|scorpius|sagittarius|capricorn|aquarius|pisces|ophiuchus"
    r"|christmas|earth|milky)\b"
)

PHOTOGRAPHS = {
    "astronaut": "A smiling astronaut in an orange space suit stands before a flag and a model of a space shuttle.",
    "brick": "A brick wall seen in black and white.",
    "camera": "A man in a dark coat looks through a camera on a tripod in a park.",
    "chelsea": "A close-up of a tabby cat with green eyes.",
    "coffee": "A cup of coffee with a spoon on a red saucer on a wooden table.",
    "coins": "Four rows of old coins on a dark background.",
    "grass": "Dry grass seen in black and white.",
    "gravel": "A ground of grey gravel.",
    "horse": "The black silhouette of a standing horse.",
    "hubble_deep_field": "Many distant galaxies in the dark sky.",
    "page": "A printed page about region-based segmentation.",
    "retina": "The orange-red retina of a human eye with its blood vessels.",
    "rocket": "A rocket on its launch pad at dusk, lit by floodlights.",
    "text": "Handwritten mathematical signs on paper, seen at an angle.",
    "china": "A Chinese pagoda among trees above a lake.",
    "flower": "An orange dahlia in front of dark green leaves.",
}


def stamp_caption(stem: str, text: str) -> str | None:
    """Return a sentence that only names a stamp, from its description; None if the description does not name it.

    `stem` is the name of the file without its suffix, `text` the text file next to it, whose first line is English.
    """
    line = text.partition("\n")[0].translate(PLAIN_MARKS)
    line = re.sub(r"\s*\([^)]*\)", "", line).strip()
    sentence = re.split(r"(?<=[.!?…])\"?\s", line)[0]
    name = NEWS.split(sentence)[0].rstrip(" .!?…").replace('."', '"').strip()
    names_something = re.match(rf"(?:{DETERMINERS}|\d+) ", name) or 1 <= len(name.split()) <= 2
    if stem in UNNAMED_STAMPS or not names_something:
        return None
    name = re.sub(r"^An (?=[bcdfghjklmnpqrstvwxyz])", "A ", name)
    return f"{name[0].upper()}{name[1:]}."


def emoji_caption(stem: str) -> str | None:
    """Return a sentence for an emoji: `1f354` -> `The hamburger emoji.`

    Returns None for sequences of characters, writing and characters without a name. `stem` lists code points in
    hexadecimal; `fe0f` only selects the coloured form.
    """
    points = [part for part in stem.split("-") if part != "fe0f"]
    name = unicodedata.name(chr(int(points[0], 16)), "") if len(points) == 1 else ""
    if not name or WRITING.search(name):
        return None
    if name in RENAMED:
        return f"The {RENAMED[name]} emoji."
    if not REALLY_COLOURED.search(name):
        name = re.sub(r"\b(?:BLACK|WHITE) ", "", name)
    name = " ".join(POSSESSIVES.get(word, word) for word in name.lower().split())
    return f"The {PROPER.sub(lambda found: found[0].title(), name)} emoji."


def shows(caption: str) -> str:
    """Return a caption as an answer: `A frog.` -> `The picture shows a frog.`; `Santa Claus.` stays as it is."""
    first, _, rest = caption.partition(" ")
    if rest and re.fullmatch(DETERMINERS, first):
        return f"The picture shows {first.lower()} {rest}"
    return caption
