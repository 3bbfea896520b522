"""Pictures to be read: signs, receipts, tables, bar charts and pages of text."""

from __future__ import annotations

import math
import random

from anyres_vlm.synthetic.drawing import FACES, Ink, Sheet, fitting_size, text_width
from anyres_vlm.synthetic.words import HELDOUT_WORDS, RGB, Facts, Split, listing, words_of

PAPERS: tuple[Ink, ...] = ((255, 255, 255), (250, 246, 232), (236, 242, 248), (240, 240, 238))
INKS: tuple[Ink, ...] = ((0, 0, 0), (24, 30, 80), (90, 16, 16), (20, 66, 34))
SMALLEST = 10  # pixels of font size


def draw_sign(rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    """One or two words on a coloured board."""
    words = _words(rng, split, "shop", 1) + _words(rng, split, "notice", rng.choice((0, 1, 1)))
    if rng.random() < 0.4:
        words = _words(rng, split, "notice", rng.choice((1, 2)))
    stacked = len(words) > 1 and rng.random() < 0.6
    height = rng.randint(90, 160) if stacked else rng.randint(60, 110)
    sheet = Sheet(height, rng.randint(120, 250), rng.choice(PAPERS))
    colour = rng.choice([name for name in RGB if name not in ("yellow", "orange")])
    sheet.pen.rectangle((4, 4, sheet.width - 5, sheet.height - 5), fill=RGB[colour])
    face = rng.choice(FACES)
    lines = words if stacked else [" ".join(words)]
    largest = int(sheet.height * 0.5 / len(lines))
    size = fitting_size(lines, face, sheet.width - 22, min(largest, 40), SMALLEST)
    for index, line in enumerate(lines):
        baseline = sheet.height * (index + 0.5) / len(lines) + size * 0.36
        sheet.text((sheet.width - text_width(line, face, size)) / 2, baseline, line, face, size, (255, 255, 255))
    text = " ".join(words)
    facts = Facts(
        caption=f"A {colour} sign that says {text}.",
        detail=f"The picture shows a {colour} sign. It says {text}.",
    )
    facts.ask(
        rng,
        "sign",
        ["What does the sign say?", "What is written on the sign?"],
        text,
        f"The sign says {text}.",
    )
    if len(words) > 1:
        wordings = ["What is the last word on the sign?"]
        facts.ask(rng, "sign", wordings, words[-1], f"The last word on the sign is {words[-1]}.")
    facts.reasoning.append(
        (
            "How many words are on the sign?",
            f"The sign says {text}, so it has {len(words)} word{'s' * (len(words) > 1)}.",
        )
    )
    return sheet, facts


def draw_receipt(rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    """A shop's name, goods with prices and the total."""
    shop = _words(rng, split, "shop", 1)[0]
    goods = _words(rng, split, "good", rng.randint(2, 4))
    cents = [rng.randint(10, 99) * 10 for _ in goods]
    total = sum(cents)
    sheet = Sheet(rng.randint(170, 252), rng.randint(92, 120), rng.choice(PAPERS[:2]))
    face, ink = rng.choice(FACES), rng.choice(INKS)
    rows = [*zip(goods, map(_money, cents), strict=True), ("TOTAL", _money(total))]
    size = fitting_size([f"{left} {right}" for left, right in rows], face, sheet.width - 12, 15, SMALLEST)
    pitch = (sheet.height - 12) / (len(rows) + 1.6)
    head = fitting_size([shop], face, sheet.width - 14, 18, SMALLEST)
    sheet.text((sheet.width - text_width(shop, face, head)) / 2, pitch * 0.9, shop, face, head, ink)
    for index, (left, right) in enumerate(rows):
        baseline = pitch * (index + 2) + (pitch * 0.3 if index == len(rows) - 1 else 0)
        sheet.text(6, baseline, left, face, size, ink)
        sheet.text(sheet.width - 6 - text_width(right, face, size), baseline, right, face, size, ink)
    rule = pitch * (len(rows) + 1.3) - size - 4
    sheet.pen.line((6, rule, sheet.width - 6, rule), fill=ink)
    items = [f"{good} {_money(price)}" for good, price in zip(goods, cents, strict=True)]
    facts = Facts(
        caption=f"A receipt from {shop}: {', '.join(items)}, TOTAL {_money(total)}.",
        detail=f"The picture shows a receipt from {shop}. It lists {listing(items)}. The total is {_money(total)}.",
    )
    money = _money(total)
    facts.ask(rng, "receipt", ["What is the total?", "How much was paid in all?"], money, f"The total is {money}.")
    facts.ask(rng, "receipt", ["Which shop is the receipt from?"], shop, f"The receipt is from {shop}.")
    for good, price in zip(goods, cents, strict=True):
        wordings = [f"How much is the {good}?", f"What does the {good} cost?"]
        facts.ask(rng, "receipt", wordings, _money(price), f"The {good} costs {_money(price)}.")
    if len(set(cents)) == len(cents):
        dearest = goods[cents.index(max(cents))]
        answer = f"The prices are {listing(items)}, so the {dearest} costs the most."
        facts.reasoning.append(("Which item costs the most?", answer))
    facts.reasoning.append(
        ("How many items were bought?", f"The receipt lists {listing(goods)}, so {len(goods)} items.")
    )
    return sheet, facts


def draw_table(rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    """Goods or places against one or two columns of numbers."""
    names = _words(rng, split, rng.choice(("good", "place")), rng.choice((2, 3)))
    columns = rng.sample(words_of("column", split), rng.choice((1, 2)))
    cells = [[rng.randint(2, 99) for _ in columns] for _ in names]
    rows = [["ITEM", *columns], *([name, *map(str, row)] for name, row in zip(names, cells, strict=True))]
    height, width, paper = rng.randint(90, 168), rng.randint(130, 200), rng.choice(PAPERS)
    face, ink = rng.choice(FACES), rng.choice(INKS)
    words = [cell for row in rows for cell in row]
    widest = max(text_width(word, face, SMALLEST) for word in words)
    sheet = Sheet(height, max(width, math.ceil((widest + 8) * len(rows[0]))), paper)
    share = sheet.width / len(rows[0])
    size = fitting_size(words, face, share - 8, 18, SMALLEST)
    pitch = sheet.height / len(rows)
    for index, cells_of_row in enumerate(rows):
        if index:
            sheet.pen.line((3, index * pitch, sheet.width - 3, index * pitch), fill=(150, 150, 150))
        for place, cell in enumerate(cells_of_row):
            sheet.text(place * share + 5, (index + 0.5) * pitch + size * 0.36, cell, face, size, ink)
    lines = [", ".join(f"{c} {n}" for c, n in zip(columns, numbers, strict=True)) for numbers in cells]
    facts = Facts(caption=f"A table: {'; '.join(f'{name} {line}' for name, line in zip(names, lines, strict=True))}.")
    facts.detail = f"The picture shows a table of {listing(columns)} for {listing(names)}. " + " ".join(
        f"{name} has {line}." for name, line in zip(names, lines, strict=True)
    )
    for name, numbers in zip(names, cells, strict=True):
        for column, value in zip(columns, numbers, strict=True):
            wordings = [f"What is the {column} of {name}?", f"Which {column} does {name} have?"]
            facts.ask(rng, "table", wordings, str(value), f"The {column} of {name} is {value}.")
    a, b = cells[0][0], cells[1][0]
    if a != b:
        question = f"Which has the larger {columns[0]}, {names[0]} or {names[1]}?"
        larger = names[0] if a > b else names[1]
        answer = f"The {columns[0]} of {names[0]} is {a} and that of {names[1]} is {b}, so {larger}."
        facts.reasoning.append((question, answer))
    return sheet, facts


def draw_chart(rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    """A bar chart with three or four labelled bars, their values above them."""
    subject = _words(rng, split, "subject", 1)[0]
    names = _words(rng, split, rng.choice(("good", "place")), rng.choice((2, 3)), longest=5)
    values = rng.sample(range(10, 100, 5), len(names))
    sheet = Sheet(rng.randint(130, 170), rng.randint(140, 180), rng.choice(PAPERS))
    face, ink, colour = rng.choice(FACES), rng.choice(INKS), rng.choice(list(RGB))
    share = sheet.width / len(names)
    size = fitting_size([*names, "100"], face, share - 4, 14, SMALLEST)
    sheet.text((sheet.width - text_width(subject, face, 14)) / 2, 17, subject, face, 14, ink)
    floor, tallest = sheet.height - size - 8, sheet.height - 2 * size - 42
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        middle, top = (index + 0.5) * share, floor - tallest * value / max(values)
        sheet.pen.rectangle((middle - share * 0.28, top, middle + share * 0.28, floor), fill=RGB[colour])
        sheet.text(middle - text_width(name, face, size) / 2, sheet.height - 5, name, face, size, ink)
        sheet.text(middle - text_width(str(value), face, size) / 2, top - 3, str(value), face, size, ink)
    bars = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
    facts = Facts(
        caption=f"A bar chart of {subject}: {', '.join(bars)}.",
        detail=(
            f"The picture shows a bar chart of {subject} with {len(names)} {colour} bars. The bars are {listing(bars)}."
        ),
    )
    high, low = names[values.index(max(values))], names[values.index(min(values))]
    facts.ask(rng, "chart", ["Which bar is the highest?"], high, f"The highest bar is {high}.")
    facts.ask(rng, "chart", ["Which bar is the lowest?"], low, f"The lowest bar is {low}.")
    for name, value in zip(names, values, strict=True):
        wordings = [f"What is the value of {name}?", f"How high is {name}?"]
        facts.ask(rng, "chart", wordings, str(value), f"The value of {name} is {value}.")
    question = f"How much higher is {high} than {low}?"
    answer = f"{high} is {max(values)} and {low} is {min(values)}, so the difference is {max(values) - min(values)}."
    facts.reasoning.append((question, answer))
    return sheet, facts


def draw_page(rng: random.Random, split: Split) -> tuple[Sheet, Facts]:
    """A title over two to four short lines of text."""
    title = " ".join(_words(rng, split, "plain", rng.choice((1, 2))))
    lines = [" ".join(_words(rng, split, "plain", rng.choice((1, 2)))) for _ in range(rng.randint(2, 4))]
    sheet = Sheet(rng.randint(130, 190), rng.randint(130, 190), rng.choice(PAPERS))
    face, ink = rng.choice(FACES), rng.choice(INKS)
    head = fitting_size([title], face, sheet.width - 12, 24, SMALLEST)
    size = fitting_size(lines, face, sheet.width - 12, min(head, 16), SMALLEST)
    pitch = (sheet.height - 8) / (len(lines) + 1.6)
    sheet.text(6, 4 + pitch * 0.5 + head * 0.36, title, face, head, ink)
    sheet.pen.line((6, pitch * 1.15, sheet.width - 6, pitch * 1.15), fill=ink)
    for index, line in enumerate(lines):
        sheet.text(6, 4 + pitch * (index + 1.8) + size * 0.36, line, face, size, ink)
    facts = Facts(
        caption=f"A page with the title {title}: {', '.join(lines)}.",
        detail=f"The picture shows a page of text. Its title is {title}. Below it stand {listing(lines)}.",
    )
    facts.ask(rng, "page", ["What is the title?", "What is the title of the page?"], title, f"The title is {title}.")
    facts.ask(rng, "page", ["What is the last line?"], lines[-1], f"The last line is {lines[-1]}.")
    facts.ask(
        rng,
        "page",
        ["What is the line below the title?"],
        lines[0],
        f"The line below the title is {lines[0]}.",
    )
    answer = f"Below the title stand {listing(lines)}, so there are {len(lines)} lines."
    facts.reasoning.append(("How many lines are below the title?", answer))
    return sheet, facts


def _words(rng: random.Random, split: Split, group: str, count: int, longest: int = 8) -> list[str]:
    """Different words of a group; a held-out picture takes a held-out word with even odds for each."""
    known = [word for word in words_of(group, split) if len(word) <= longest]
    words = rng.sample([word for word in known if word not in HELDOUT_WORDS], count)
    unseen = [word for word in known if word in HELDOUT_WORDS]
    for index in range(count):
        if unseen and rng.random() < 0.5:
            words[index] = unseen.pop(rng.randrange(len(unseen)))
    return words


def _money(cents: int) -> str:
    return f"${cents // 100}.{cents % 100:02d}"
