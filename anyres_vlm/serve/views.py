"""HTML of the web page: images as tiles, and the most likely tokens at each step of an answer."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from itertools import zip_longest

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from anyres_vlm.data.blobs import blob_name
from anyres_vlm.data.headers import plan_image
from anyres_vlm.data.images import open_image
from anyres_vlm.data.tile_picture import CANDIDATE_COLUMNS, candidate_rows, describe_plan, draw_tiling, explain_choice
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Size, Tiling
from anyres_vlm.schema import ImageRef

Likely = tuple[str, float]  # a token's text and its probability


@dataclass
class Alternatives:
    """Record the most likely tokens while an answer is generated, before temperature and top-p."""

    tokenizer: PreTrainedTokenizerFast
    count: int = 5
    steps: list[tuple[Likely, list[Likely]]] = field(default_factory=list)  # chosen token, most likely ones

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> None:
        """Record a step of one conversation: its token and the logits from which it was chosen, (1, V)."""
        probabilities = logits[0].softmax(-1)
        top = probabilities.topk(min(self.count, len(probabilities)))
        likely = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        chosen = self._text(tokens[0]), float(probabilities[tokens[0]])
        self.steps.append((chosen, [(self._text(token), probability) for token, probability in likely]))

    def _text(self, token: int) -> str:
        text = str(self.tokenizer.decode([token]))
        # part of a character, or empty: show the tokenizer's name of the token
        return text if text and "\ufffd" not in text else str(self.tokenizer.convert_ids_to_tokens(token))


STYLE = """
.anyres img { max-width: 100%; border-radius: 6px; display: block; margin: 0 0 8px }
.anyres figure { margin: 0 0 20px }
.anyres p { margin: 0 0 8px }
.anyres .error { color: #b42318; background: #fef3f2; border: 1px solid #fda29b; border-radius: 6px; padding: 10px }
.anyres .scroll { overflow: auto; max-height: 380px }
.anyres table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
.anyres :is(table, tr, th, td) { border: 0 !important }
.anyres th, .anyres td { padding: 3px 14px 3px 0 !important; text-align: right !important; white-space: pre }
.anyres th { font-weight: 500; opacity: 0.7 }
.anyres :is(th, td):first-child { text-align: left !important }
.anyres tr.chosen td { font-weight: 600; color: #1e9646 }
.anyres .token { font-family: ui-monospace, monospace; background: rgba(47, 111, 183, 0.16); border-radius: 3px }
"""


def tiles_view(images: Sequence[ImageRef], tiling: Tiling, candidates: bool) -> str:
    """Return the tiles and token counts of every image, or its error; optionally with all candidate canvases."""
    figures, total = [], 0
    for image in images:
        try:
            plan = plan_image(image, tiling)
            picture = BytesIO()
            draw_tiling(open_image(image), tiling).save(picture, format="PNG")
        except DataError as error:
            figures.append(f'<p class="error">{escape(str(error))}</p>')
            continue
        total += plan.total_tokens
        source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        line = f"{blob_name(image)}: {describe_plan(plan)}"
        choice = _candidates(plan.image, tiling) if candidates else ""
        figures.append(
            f'<figure><img alt="{escape(line)}" src="{source}"><p class="bill">{escape(line)}</p>{choice}</figure>'
        )
    if len(images) > 1:
        figures.append(f"<p>{len(images)} images: {total:,} tokens</p>")
    return _page("".join(figures) or "<p>Drop an image above to see its tiles and token counts.</p>")


def alternatives_view(alternatives: Alternatives) -> str:
    """Return a table with a row per token: the chosen token, and the most likely others, with probabilities."""
    rows = [
        (_token(chosen), *(_token(other) for other in likely if other != chosen))
        for chosen, likely in alternatives.steps
    ]
    if not rows:
        return ""
    names = ["token"] + ["or"] * (max(map(len, rows)) - 1)
    return _page(f'<p>Probabilities before temperature.</p><div class="scroll">{_table(names, rows)}</div>')


def _candidates(size: Size, tiling: Tiling) -> str:
    rows = candidate_rows(size, tiling)
    table = _table(CANDIDATE_COLUMNS, [[escape(cell) for cell in row] for row in rows], [row[-1] for row in rows])
    return f'<p>{escape(explain_choice(size, tiling))}</p><div class="scroll">{table if rows else ""}</div>'


def _token(likely: Likely) -> str:
    text, probability = likely
    shown = escape(text.replace("\n", "\u21b5"))
    return f'<span class="token">{shown}</span> {probability:.1%}'


def _table(names: Iterable[str], rows: Iterable[Iterable[str]], classes: Iterable[str] = ()) -> str:
    """Return an HTML table; the cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row, kind in zip_longest(rows, classes, fillvalue="")
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _page(content: str) -> str:
    return f'<div class="anyres">{content}</div>'
