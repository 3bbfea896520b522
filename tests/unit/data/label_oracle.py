"""Labels by brute force, without offsets: every prompt is tokenised on its own and compared with the conversation."""

from __future__ import annotations

import random
import unicodedata

from anyres_vlm.data.conversation import ConversationTokenizer
from anyres_vlm.schema import IGNORE_INDEX, Record, Turn

WORDS = (
    "what is the colour of this star red blue a sign that says BAKERY 12.50 naïve café 日本 😀 it's (yes), no! "
    "שלום ... A 7"
).split()
ODD = (
    "\n~\n\n~ ~  ~   ~\t~\r\n~\u00a0~\u200b~\u3000~-~:~'s~.~7~12~1,000~a~Word~ the~😀~👩\u200d👩\u200d👧~"
    "e\u0301~\u0301~é~日本~語~שלום~مرحبا~ﬁ~½~\x00~"
    "    return x~\n  y~[INST]~ASSISTANT:~<|~|>~</~{eos}~{{~\ufffd~\U0010ffff~ß~İ"
).split("~")


def expected_labels(encoder: ConversationTokenizer, turns: tuple[Turn, ...]) -> list[int] | None:
    """The labels that the rule demands; None where no labels can keep it."""
    tokenizer = encoder.tokenizer
    text, _ = encoder.render(turns)
    written = text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not written)["input_ids"]
    labels = [IGNORE_INDEX] * len(ids)
    for position in range(1, len(turns), 2):
        prompt = encoder.prompt(turns[:position]).tolist()
        if ids[: len(prompt)] != prompt or encoder.end_id not in ids[len(prompt) :]:
            return None
        stop = ids.index(encoder.end_id, len(prompt))
        answer = encoder.render(turns[: position + 1])[0].removeprefix(encoder.render(turns[:position], prompt=True)[0])
        end = tokenizer.convert_ids_to_tokens(encoder.end_id)
        decoded = tokenizer.decode(ids[len(prompt) : stop], clean_up_tokenization_spaces=False)
        if normal(decoded) != normal(answer[: answer.rindex(end)]):
            return None
        labels[len(prompt) : stop + 1] = ids[len(prompt) : stop + 1]
    return labels


def normal(text: str) -> str:
    """Canonical form; SentencePiece decoders drop one leading space."""
    return unicodedata.normalize("NFC", text).lstrip(" ")


def ordinary_record(rng: random.Random, name: str, images: int) -> Record:
    """Words between single spaces, images first."""
    turns = []
    for number in range(rng.randint(1, 4)):
        said = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        turns.append(Turn("user", "<image>\n" * (images if number == 0 else 0) + said))
        turns.append(Turn("assistant", " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))))
    return Record(name, (), tuple(turns))


def odd_record(rng: random.Random, name: str) -> Record:
    """Pieces of every kind run together, with images anywhere."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        asked = [rng.choice([*ODD, *WORDS, *["<image>"] * 8]) for _ in range(rng.randint(1, 8))]
        said = [rng.choice(ODD if rng.random() < 0.7 else WORDS) for _ in range(rng.randint(1, 8))]
        turns += [Turn("user", "".join(asked)), Turn("assistant", "".join(said))]
    return Record(name, (), tuple(turns))
