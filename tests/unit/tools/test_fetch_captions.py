"""Captions from stamp texts and Unicode names."""

import pytest
from captions import emoji_caption, shows, stamp_caption


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("A frog.\nde.utf8=Ein Frosch.", "A frog."),
        ("A happy lion!", "A happy lion."),
        ("Teddy bear", "Teddy bear."),
        ("50 Japanese yen.", "50 Japanese yen."),
        ("An hippopotamus.", "A hippopotamus."),
        ("An F-22 Raptor.", "An F-22 Raptor."),
        ("A ripe, red tomato!", "A ripe, red tomato."),
        ("An albino peahen (a female peafowl, or peacock).", "An albino peahen."),
        ("A spiny lobster, from the Hawaiian islands.", "A spiny lobster."),
        ("A candy cane is a traditional Christmas treat in the United States.", "A candy cane."),
        ("Mars\u2014the red planet. It\u2019s just beyond earth.", "Mars."),
        ("A \u201cStop\u201d sign. Stop here, then go.", 'A "Stop" sign.'),
        ("A US 50 cent piece ($.50) called a \u201cHalf Dollar.\u201d", 'A US 50 cent piece called a "Half Dollar".'),
    ],
)
def test_stamp_text_becomes_a_sentence_that_only_names(text: str, caption: str) -> None:
    assert stamp_caption("any", text) == caption


@pytest.mark.parametrize("text", ["", "Eat your broccoli!", "We remember those who have died.", "- Because of it."])
def test_stamp_text_that_names_nothing_gives_no_caption(text: str) -> None:
    assert stamp_caption("any", text) is None


def test_stamp_known_to_be_misnamed_gives_no_caption() -> None:
    assert stamp_caption("recycle", "This means something can be recycled.") is None


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("1f354", "The hamburger emoji."),
        ("1f3ef", "The Japanese castle emoji."),
        ("1f30d", "The Earth globe Europe-Africa emoji."),
        ("1f452", "The woman's hat emoji."),
        ("2600-fe0f", "The sun with rays emoji."),  # BLACK SUN WITH RAYS, which is yellow
        ("2764-fe0f", "The red heart emoji."),  # HEAVY BLACK HEART
        ("1f5a4", "The black heart emoji."),
        ("1f3f3-fe0f", "The waving white flag emoji."),
    ],
)
def test_emoji_is_named_as_unicode_names_it(stem: str, caption: str) -> None:
    assert emoji_caption(stem) == caption


@pytest.mark.parametrize(
    "stem",
    [
        "1f44b-1f3fb",  # a skin tone
        "1f3f4-e0067_e0062_e0065_e006e_e0067",  # a flag spelt in tags
        "1f21a",  # a Chinese character in a square
        "1f170-fe0f",  # a letter
        "e000",  # private use: no name
    ],
)
def test_sequences_and_writing_give_no_caption(stem: str) -> None:
    assert emoji_caption(stem) is None


@pytest.mark.parametrize(
    ("caption", "answer"),
    [
        ("A frog.", "The picture shows a frog."),
        ("Some cherries.", "The picture shows some cherries."),
        ("The hamburger emoji.", "The picture shows the hamburger emoji."),
        ("Santa Claus.", "Santa Claus."),
        ("A.", "A."),
        ("Antlers on a wall.", "Antlers on a wall."),
    ],
)
def test_answer_adds_nothing_to_the_caption(caption: str, answer: str) -> None:
    assert shows(caption) == answer
