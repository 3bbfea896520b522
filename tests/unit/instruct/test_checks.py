"""Responses as models write them, good and bad."""

from __future__ import annotations

import random

import pytest

from anyres_vlm.instruct.checks import NearDuplicates, parse_response
from anyres_vlm.instruct.grounding import Reject
from anyres_vlm.instruct.job import KINDS, Prompt, load_prompts
from anyres_vlm.schema import Turn

TWO = Prompt(system="s", boxes=False, rounds=2)
ONE_ANSWER = Prompt(system="s", boxes=True, questions=("Describe it.",), least_words=3)
GOOD = "Question: What is it?\nAnswer: A dog.\nQuestion: Where?\nAnswer: On a mat,\nby the door."


def said(text: str, prompt: Prompt = TWO) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in parse_response(text, prompt, "Describe it.").turns]


def test_turns_are_read() -> None:
    expected = [("user", "What is it?"), ("assistant", "A dog."), ("user", "Where?")]
    assert said(GOOD) == [*expected, ("assistant", "On a mat,\nby the door.")]
    assert not parse_response(GOOD, TWO, "").repaired


@pytest.mark.parametrize(
    "text",
    [
        f"```\n{GOOD}\n```",
        f"```text\n{GOOD}\n```\n",
        GOOD.replace("Question:", "**Question:**").replace("Answer:", "**Answer**:"),
        GOOD.replace("Question:", "### Question:"),
        GOOD.replace("Question:", "question 1:"),
        GOOD.replace("\nQ", "\n===\nQ").replace("\nA", "\n===\nA") + "\n===",
        GOOD.replace(": ", ":\n"),
        GOOD.replace("\n", "\r\n"),
    ],
)
def test_what_has_one_reading_is_repaired(text: str) -> None:
    assert said(text) == said(GOOD)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "malformed"),
        ("   \n ", "malformed"),
        ("lorem ipsum", "malformed"),
        (f"Sure, here it is:\n{GOOD}", "malformed"),
        (GOOD.replace("Question: What is it?\n", ""), "wrong_turns"),  # begins with the answer
        (GOOD.replace("Answer: A dog.\n", ""), "wrong_turns"),  # two questions in a row
        (GOOD.partition("\nQuestion: Where")[0], "wrong_turns"),  # one of two
        (f"{GOOD}\nQuestion: Why?\nAnswer: So.", "wrong_turns"),
        (f"{GOOD}\nQuestion: Why?", "wrong_turns"),
        (GOOD.replace("A dog.", ""), "malformed"),
        (GOOD.replace("A dog.", "  \n===\n"), "malformed"),
        (GOOD.replace("A dog.", "A <image> dog."), "malformed"),
        (GOOD.replace("A dog.", "A \x00 dog."), "malformed"),
        (GOOD.replace("A dog.", "A \ud800 dog."), "malformed"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m sorry, but I can’t help.", "refusal"),  # noqa: RUF001
        ("Sorry, I cannot see images.", "refusal"),
        (GOOD.replace("A dog.", "As an AI language model, I cannot see it."), "refusal"),
        (GOOD.replace("A dog.", "I cannot see the image."), "refusal"),
        (GOOD.replace("A dog.", "The caption says a dog."), "mentions_input"),
        (GOOD.replace("What is it?", "What is in the bounding box?"), "mentions_input"),
        (GOOD.replace("A dog.", "A dog at [0.12, 0.3, 0.5, 0.9]."), "mentions_input"),
        (GOOD.replace("A dog.", "Its coordinates are known."), "mentions_input"),
        (GOOD.replace("A dog.", "According to the description, a dog."), "mentions_input"),
    ],
)
def test_what_is_wrong_is_rejected_by_its_kind(text: str, kind: str) -> None:
    with pytest.raises(Reject) as caught:
        said(text)
    assert caught.value.kind == kind
    assert caught.value.reason


@pytest.mark.parametrize(
    "answer",
    [
        "The dog is located at 0.35, 0.62.",
        "It fills [120, 30, 200, 400].",
        "In the image description, a dog runs.",
        "The second sentence says so.",
        "Based on the given details, a dog.",
        "The list of objects includes a dog.",
        "The bbox covers the dog.",
        "The annotation shows it.",
        "They are described as antique.",
        "As described, the dog runs.",
        "It is not specified in the notes.",
    ],
)
def test_talk_of_the_input(answer: str) -> None:
    with pytest.raises(Reject) as caught:
        said(GOOD.replace("A dog.", answer))
    assert caught.value.kind == "mentions_input"


@pytest.mark.parametrize(
    "answer",
    [
        "I don't have enough information to answer.",
        "I must decline.",
        "I am not able to describe the image.",
        "There is not enough information to determine it.",
    ],
)
def test_answers_that_refuse(answer: str) -> None:
    with pytest.raises(Reject) as caught:
        said(GOOD.replace("A dog.", answer))
    assert caught.value.kind == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        "A list hangs on the fridge; the list says milk.",
        "The text says STOP, and the price is $0.50, $0.75 or $1.00.",
        "Players wear the numbers (7, 12), and she takes notes.",
        "The scene could be described as calm.",
        "The boy says sorry to his sister.",
        "Boxes of pizza are stacked beside a notice.",
        "She describes the scene, and the text on the sign reads STOP.",
        "They cannot cross, since the light is red.",
        "The band played from 0.5 to 1.5 hours.",
    ],
)
def test_ordinary_words_are_no_reason(answer: str) -> None:
    assert said(GOOD.replace("A dog.", answer))[1] == ("assistant", answer)


def test_a_bare_answer() -> None:
    assert said("A dog sleeps.", ONE_ANSWER) == [("user", "Describe it."), ("assistant", "A dog sleeps.")]
    assert said("Answer: A dog sleeps.", ONE_ANSWER)[1] == ("assistant", "A dog sleeps.")
    for text in (GOOD, "A dog."):
        with pytest.raises(Reject, match=r"questions where a description|fewer than 3 words"):
            said(text, ONE_ANSWER)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_examples_pass_their_own_checks(kind: str) -> None:
    prompt = load_prompts(None, boxes=False)[kind]  # type: ignore[index]
    assert prompt.examples
    for example in prompt.examples:
        assert not parse_response(example.response, prompt, "Describe it.").repaired


# Near-duplicates against the exact similarity.


def turns(words: list[str]) -> list[Turn]:
    return [Turn("user", "What is there?"), Turn("assistant", " ".join(words))]


def triples(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:], strict=False))


def test_the_decision_follows_the_exact_similarity() -> None:
    chance = random.Random(1)
    near = far = 0
    for trial in range(60):
        first = [f"w{chance.randrange(5000)}" for _ in range(120)]
        second = list(first)
        for place in chance.sample(range(120), chance.randrange(0, 30)):
            second[place] = f"new{place}"
        one, other = triples(first), triples(second)
        exact = len(one & other) / len(one | other)
        seen = NearDuplicates(0.7)
        assert seen.like("first", turns(first)) is None
        found = seen.like("second", turns(second))
        if exact > 0.85:  # nearly four standard deviations of 128 permutations
            near += 1
            assert found == "first", (trial, exact)
        if exact < 0.55:
            far += 1
            assert found is None, (trial, exact)
    assert near > 5
    assert far > 5


def test_texts_too_short_for_triples() -> None:
    seen = NearDuplicates(1.0)
    assert [seen.like(name, turns([word])) for name, word in (("a", "dog"), ("b", "cat"), ("c", "dog"))] == [
        None,
        None,
        "a",
    ]
