"""Objects, counts and sides that the text claims, against boxes."""

from __future__ import annotations

import pytest

from anyres_vlm.instruct.annotations import Box, Object, Scene
from anyres_vlm.instruct.grounding import Reject, absent_objects, find_objects, require_grounded, vocabulary
from anyres_vlm.schema import Turn

LEFT, RIGHT = Box(0.0, 0.2, 0.2, 0.8), Box(0.7, 0.2, 0.9, 0.8)
DOGS = (Object("dog", LEFT), Object("dog", Box(0.1, 0.1, 0.3, 0.3)))
SCENE = Scene("1", "1.jpg", ("Two dogs and a cat on a couch.",), (*DOGS, Object("cat", RIGHT)))


def turns(answer: str, question: str = "What?") -> list[Turn]:
    return [Turn("user", question), Turn("assistant", answer)]


def named(text: str) -> list[str]:
    return [mention.word.category for mention in find_objects(text)]


@pytest.mark.parametrize(
    ("text", "categories"),
    [
        ("A hot dog beside a dog.", ["hot dog", "dog"]),
        ("Benches, buses and sandwiches.", ["bench", "bus", "sandwich"]),
        ("He waits at the bus stop near the train station.", []),
        ("Teddy bears; a teddy bear.", ["teddy bear", "teddy bear"]),
        ("The carpet and the catalogue, a scar, doggedly.", []),
        ("MEN at a Dining Table", ["person", "dining table"]),
        ("two sofas", ["couch"]),
    ],
)
def test_objects_are_found_by_whole_words_the_longest_first(text: str, categories: list[str]) -> None:
    assert named(text) == categories


def test_the_vocabulary_is_coco_s() -> None:
    assert len({word.category for word in vocabulary().values()}) == 80


@pytest.mark.parametrize(
    ("answer", "absent"),
    [
        ("A dog and a cat on a couch.", []),
        ("A dog, a horse and two zebras.", ["horse", "zebra"]),
        ("There is no horse, and the room is without a tv.", []),
        ("There isn't a horse, but a zebra.", ["zebra"]),
        ("People often keep an orange cat; the mouse hides.", []),  # words that say little of what is there
        ("A man holds it.", ["person"]),
        ("A puppy lies on the sofa.", []),
    ],
)
def test_absent_objects(answer: str, absent: list[str]) -> None:
    assert absent_objects([answer], SCENE) == absent


@pytest.mark.parametrize(
    ("caption", "boxes", "answer", "absent"),
    [
        # other words for what captions and boxes have
        ("A batter swings at a pitch.", [], "A man swings a baseball bat before a baseball glove.", ["baseball glove"]),
        ("A batter and a catcher.", [], "A man swings a baseball bat before a baseball glove.", []),
        ("A toy on a shelf.", ["teddy bear"], "The bear leans on the wall.", []),
        ("Two by a wall.", ["motorcycle"], "Both bikes have black seats.", []),
        ("A snack.", ["hot dog"], "The dog is topped with mustard.", []),
        ("A man on the phone.", [], "He holds a cell phone.", []),
        ("Surfing at sunset.", [], "A surfboard cuts the wave.", []),
        # colours, verbs, compounds
        ("A dress.", [], "It is orange, and so are her glasses. The glass is empty.", []),
        ("A bear.", ["bear"], "It bears the cold well, and bear in mind that bears sleep.", []),
        ("A street.", [], "He waits at the bus stop to book a trip. The apple tree is bare.", []),
        ("A plate.", ["dog"], "A hot dog lies next to the dog.", ["hot dog"]),
        # what is not said to be there
        ("A duck on a road.", ["bird"], "It could be hit by a car or chased by a dog.", []),
        ("A bag.", [], "One may pack for a journey by train. A bus stands outside.", ["bus"]),
        ("A pan.", [], "It shines like a clock. There is no fork, but a spoon.", ["spoon"]),
    ],
)
def test_absent_objects_with_other_words(caption: str, boxes: list[str], answer: str, absent: list[str]) -> None:
    objects = tuple(Object(name, LEFT) for name in boxes)
    assert absent_objects([answer], Scene("1", "1.jpg", (caption,), objects)) == absent


def test_more_absent_objects_than_the_limit_are_a_reject() -> None:
    require_grounded(turns("A horse and a zebra."), SCENE, 2)
    with pytest.raises(Reject, match="neither captions nor boxes have giraffe, horse, zebra"):
        require_grounded(turns("A horse, a zebra and a giraffe."), SCENE, 2)


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("There are three dogs in the image.", "What?"),
        ("There are 3 dogs.", "What?"),
        ("There are five dogs visible in the picture, all brown.", "What?"),
        ("Three.", "How many dogs are there?"),
        ("There are three dogs resting.", "How many dogs are in the image?"),
        ("There are twelve dogs, it seems.", "What?"),
    ],
)
def test_wrong_counts(answer: str, question: str) -> None:
    with pytest.raises(Reject) as caught:
        require_grounded(turns(answer, question), SCENE, 0)
    assert caught.value.kind == "wrong_count"
    right = answer.replace("hree", "wo").replace("3", "2").replace("five", "two").replace("twelve", "two")
    require_grounded(turns(right, question), SCENE, 0)


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("There are two dogs in the image.", "How many dogs are there?"),
        ("There is one dog lying on the left.", "What?"),  # one of two
        ("One of them.", "How many dogs are asleep in the image?"),  # some of them
        ("Three or four.", "How many dogs are there?"),
        ("There are four horses.", "What?"),  # no boxes to say otherwise
    ],
)
def test_counts_that_are_right_or_not_plain(answer: str, question: str) -> None:
    require_grounded(turns(answer, question), SCENE, 9)


def test_crowds_and_captions_excuse_a_count() -> None:
    crowd = Scene("1", "1.jpg", (), (*DOGS, Object("dog", RIGHT, crowd=True)))
    require_grounded(turns("There are seven dogs."), crowd, 0)
    told = Scene("1", "1.jpg", ("Three small dogs.",), DOGS)
    require_grounded(turns("There are three dogs."), told, 0)


@pytest.mark.parametrize(
    "claim",
    [
        "The cat is to the left of the dog.",
        "The dogs are sitting to the right of the cat.",
        "The cat is on the left side of the image.",
        "A dog stands on the far right of the picture.",
        "The cat on the left-hand side of the photo sleeps.",
    ],
)
def test_wrong_sides(claim: str) -> None:
    with pytest.raises(Reject) as caught:
        require_grounded(turns(claim), SCENE, 0)
    assert caught.value.kind == "wrong_side"
    swapped = claim.replace("left", "?").replace("right", "left").replace("?", "right")
    require_grounded(turns(swapped), SCENE, 0)


def test_a_side_that_one_of_several_boxes_has() -> None:
    both = Scene("1", "1.jpg", (), (Object("dog", LEFT), Object("dog", RIGHT)))
    require_grounded(turns("A dog is on the left of the image. A dog is on the right of the image."), both, 0)
