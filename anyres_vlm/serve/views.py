"""HTML of the web page: images as tiles, and the most likely tokens at each step of an answer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO

from jinja2 import Environment
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from anyres_vlm.data.blobs import blob_name
from anyres_vlm.data.headers import plan_image
from anyres_vlm.data.images import open_image
from anyres_vlm.data.tile_picture import CANDIDATE_COLUMNS, candidate_rows, describe_plan, draw_tiling, explain_choice
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Tiling
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
        text = str(self.tokenizer.decode([token])).replace("\n", "\u21b5")
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


HTML = Environment(autoescape=True, trim_blocks=True).from_string(
    """<div class="anyres">
{% macro table(names, rows) %}
<div class="scroll"><table><tr>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for kind, cells in rows %}
<tr class="{{ kind }}">{% for cell in cells %}<td>{% if cell is string %}{{ cell }}{% else %}
<span class="token">{{ cell[0] }}</span> {{ "{:.1%}".format(cell[1]) }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
{% for image in images %}
{% if image.error %}
<p class="error">{{ image.error }}</p>
{% else %}
<figure><img alt="{{ image.line }}" src="{{ image.source }}"><p class="bill">{{ image.line }}</p>
{% if image.reason %}<p>{{ image.reason }}</p>{{ table(columns, image.candidates) }}{% endif %}</figure>
{% endif %}
{% endfor %}
{% for paragraph in paragraphs %}<p>{{ paragraph }}</p>{% endfor %}
{% if steps %}{{ table(columns, steps) }}{% endif %}
</div>"""
)


def tiles_view(images: Sequence[ImageRef], tiling: Tiling, candidates: bool) -> str:
    """Return the tiles and token counts of every image, or its error; optionally with all candidate canvases."""
    shown: list[dict[str, object]] = []
    total = 0
    for image in images:
        try:
            plan = plan_image(image, tiling)
            picture = BytesIO()
            draw_tiling(open_image(image), tiling).save(picture, format="PNG")
        except DataError as error:
            shown.append({"error": str(error)})
            continue
        total += plan.total_tokens
        source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        shown.append({"line": f"{blob_name(image)}: {describe_plan(plan)}", "source": source})
        if candidates:
            rows = [(row[-1], row) for row in candidate_rows(plan.image, tiling)]
            shown[-1] |= {"reason": explain_choice(plan.image, tiling), "candidates": rows}
    paragraphs = [f"{len(images)} images: {total:,} tokens"] if len(images) > 1 else []
    if not images:
        paragraphs = ["Drop an image above to see its tiles and token counts."]
    return HTML.render(images=shown, paragraphs=paragraphs, columns=CANDIDATE_COLUMNS)


def alternatives_view(alternatives: Alternatives) -> str:
    """Return a table with a row per token: the chosen token, and the most likely others, with probabilities."""
    rows = [("", [chosen, *(other for other in likely if other != chosen)]) for chosen, likely in alternatives.steps]
    if not rows:
        return ""
    columns = ["token"] + ["or"] * (max(len(cells) for _, cells in rows) - 1)
    return HTML.render(paragraphs=["Probabilities before temperature."], steps=rows, columns=columns)
