"""Words, colours and shapes of the rendered world, and the sentences that state facts about it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["train", "heldout"]

RGB = {
    "red": (214, 40, 40),
    "orange": (240, 132, 20),
    "yellow": (236, 204, 30),
    "green": (40, 150, 62),
    "blue": (36, 86, 204),
    "purple": (128, 52, 164),
    "brown": (122, 74, 34),
    "gray": (124, 128, 134),
}
COLOURS = tuple(RGB)
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")

# One shape a colour and one colour a shape, so that each is well known apart from the other.
HELDOUT_OBJECTS = frozenset((colour, SHAPES[(3 * index + 2) % len(SHAPES)]) for index, colour in enumerate(COLOURS))

_GROUPS = {
    "shop": "BAKERY MARKET CAFE GARAGE PHARMACY LIBRARY HOTEL BANK STUDIO MUSEUM SCHOOL CLINIC TAVERN DINER SALON "
    "BUTCHER FLORIST TAILOR GROCER KIOSK OFFICE DEPOT ARCADE THEATRE CINEMA STATION",
    "notice": "OPEN CLOSED EXIT STOP SALE WELCOME PUSH PULL DANGER QUIET PARKING PRIVATE SLOW FREE STAFF LIFT STAIRS "
    "TICKETS TAXI DETOUR BRIDGE AHEAD WAIT ENTER NORTH SOUTH",
    "good": "BREAD MILK RICE TEA COFFEE SUGAR SALT APPLE PEAR LEMON GRAPE MELON CHEESE BUTTER EGGS FISH SOUP PASTA "
    "JUICE WATER HONEY CAKE COOKIE ONION POTATO CARROT TOMATO PEPPER BEANS CORN NUTS OIL SOAP TOWEL CANDLE PENCIL "
    "PAPER BATTERY LAMP ROPE",
    "column": "PRICE COUNT WEIGHT SIZE STOCK AGE SCORE HOURS",
    "subject": "SALES RAIN VISITS POINTS TRIPS ORDERS COSTS VOTES",
    "place": "PARIS ROME OSLO LIMA CAIRO DELHI TOKYO LAGOS QUITO DUBLIN MADRID VIENNA BERLIN ATHENS SEOUL BOSTON "
    "HANOI LISBON ZURICH NAIROBI",
    "plain": "GARDEN RIVER WINTER SUMMER STORY MUSIC LETTER WINDOW FOREST MOUNTAIN HARBOR EVENING MORNING TRAVEL LIGHT "
    "SILVER GOLDEN HIDDEN SECRET LITTLE ANCIENT MODERN HISTORY SCIENCE NATURE OCEAN DESERT ISLAND VALLEY SHADOW "
    "PICTURE JOURNEY FRIEND FAMILY KITCHEN ANIMAL FLOWER THUNDER BREEZE MEADOW",
}
WORDS = {group: tuple(words.split()) for group, words in _GROUPS.items()}
HELDOUT_WORDS = frozenset(word for words in WORDS.values() if len(words) > 8 for word in words[3::7])


def words_of(group: str, split: Split) -> tuple[str, ...]:
    """The words of a group that a split may show; held-out pictures show both kinds."""
    return tuple(word for word in WORDS[group] if split == "heldout" or word not in HELDOUT_WORDS)


Task = Literal[
    "colour", "shape", "position", "count", "exists", "relation", "sign", "receipt", "table", "chart", "page"
]


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its short exact answer and the same answer as a sentence."""

    task: Task
    question: str
    answer: str
    sentence: str


@dataclass
class Facts:
    """Sentences and questions about one picture."""

    caption: str = ""
    detail: str = ""
    questions: list[Question] = field(default_factory=list)
    reasoning: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, rng: random.Random, task: Task, wordings: list[str], answer: str, sentence: str) -> None:
        """Add a question in one of its wordings."""
        self.questions.append(Question(task, rng.choice(wordings), answer, sentence))


def listing(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def plural(count: int, noun: str) -> str:
    """`1 star`, `2 stars`; crosses and boxes take -es."""
    return f"{count} {noun}" if count == 1 else f"{count} {plural_of(noun)}"


def plural_of(noun: str) -> str:
    """The plural of a shape or of `object`."""
    return f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"


def an(word: str) -> str:
    """The word behind its indefinite article."""
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"
