"""Write the model card, `README.md` of a checkpoint folder: what the model is, how it was made and how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from anyres_vlm.checkpoints.folders import HUB_ID, read_json
from anyres_vlm.checkpoints.stock import stock_obstacle
from anyres_vlm.errors import DataError
from anyres_vlm.geometry import Grid, Tiling
from anyres_vlm.model.vlm import VisionLanguageModel

CARD_FILE = "README.md"
EVALUATION = "## Evaluation"
NOT_EVALUATED = "No results are recorded. Run `anyres eval`, then `anyres export`, which writes them here."
STOCK_USE = """With transformers:

```python
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

processor = AutoProcessor.from_pretrained(FOLDER)
model = LlavaNextForConditionalGeneration.from_pretrained(FOLDER)
```
"""


def write_card(folder: Path, model: VisionLanguageModel, sections: Sequence[str]) -> None:
    """Write the card into a checkpoint folder; the Markdown `sections` describe how the model was trained."""
    config, tiling, obstacle = model.config, model.tiling, stock_obstacle(model)
    named = (config.llm, config.encoder.name)
    bases = [name for name in named if HUB_ID.fullmatch(name) and not Path(name).exists()]
    front = {"pipeline_tag": "image-text-to-text", "library_name": "transformers" if obstacle is None else "anyres_vlm"}
    hub = {"base_model": bases} if bases else {}
    grids = ", ".join(str(Grid(rows=c.height // tiling.tile, cols=c.width // tiling.tile)) for c in tiling.canvases)
    facts = {
        "language model": config.llm,
        "vision encoder": f"{config.encoder.name}, features of layer {config.encoder.layer}",
        "projector": config.projector,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.1f} M",
        "tiles": f"{tiling.tile} pixels, {tiling.patches} tokens",
        "grids": f"{grids} (rows x columns) in addition to the thumbnail" if grids else "none, thumbnail only",
        "layout, dialect": f"{tiling.layout}, {tiling.dialect}",
        "chat template": config.template,
    }
    stock = STOCK_USE if obstacle is None else f"Stock transformers cannot load it: {obstacle}.\n"
    text = [
        f"---\n{yaml.safe_dump(front | hub, sort_keys=False)}---\n",
        "# An AnyRes vision-language model\n",
        table(("", ""), facts.items()),
        *(section.rstrip() + "\n" for section in sections),
        f"## How to load it\n\n{stock}\nIn the terminal: `anyres chat FOLDER --image IMAGE --prompt QUESTION`\n",
        f"## Limitations\n\n{_limitations(tiling)}",
        f"## Licence\n\nThe weights derive from {' and '.join(named)} and from the data; all of their licences "
        "apply. The header of this file states no licence: add `license:` before you publish.\n",
        f"{EVALUATION}\n\n{NOT_EVALUATED}\n",  # last, because an export replaces it
    ]
    (folder / CARD_FILE).write_text("\n".join(text), encoding="utf-8")


def carry_card(source: Path, target: Path, model: VisionLanguageModel) -> None:
    """Write the source's card, or a new one, to an exported folder, with the results found next to the source.

    Benchmark results are read from the `eval` folder that `anyres eval` writes there; accuracies on held-out questions
    from any JSON file next to the model's folder that has them.
    """
    if (source / CARD_FILE).exists():
        (target / CARD_FILE).write_bytes((source / CARD_FILE).read_bytes())
    else:
        write_card(target, model, [])
    path = target / CARD_FILE
    beside = source.resolve().parent
    if found := "\n".join(filter(None, (_scores(beside / "eval"), _accuracies(beside)))):
        text = path.read_text(encoding="utf-8").split(f"\n{EVALUATION}\n")[0].rstrip()
        path.write_text(f"{text}\n\n{EVALUATION}\n\n{found}", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table that ends with a newline."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _limitations(tiling: Tiling) -> str:
    largest = max(tiling.canvases, key=lambda canvas: canvas.height * canvas.width, default=None)
    side = f"{tiling.tile}x{tiling.tile}" if largest is None else f"{largest.width}x{largest.height}"
    return (
        f"- Images are scaled down to at most {side} pixels: text that is a few pixels high after that is illegible.\n"
        "- The model may name objects that are not in the image, miscount, confuse left and right or misread text, in "
        "fluent language. `anyres probe` measures how often.\n"
        "- It inherits the biases of its base models and training data, and knows only their languages.\n"
    )


def _scores(folder: Path) -> str:
    """Return the benchmark results as a table, or an empty string."""
    results = [read_json(path) for path in sorted(folder.glob("*.json")) if path.with_suffix(".answers.jsonl").exists()]
    rows = [
        (one["benchmark"], one["score"], f"{one['questions']:,}") for one in results if one.get("score") is not None
    ]
    return table(("benchmark", "score", "questions"), rows) if rows else ""


def _accuracies(folder: Path) -> str:
    """Return the accuracies on held-out questions as a table, or an empty string."""
    results: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path)
        except DataError:  # the folder may hold other JSON files
            continue
        accuracy = content.get("scores" if content.get("benchmark") == "heldout" else "accuracy")
        if isinstance(accuracy, dict):
            results[path.stem] = accuracy
    tasks = sorted({task for accuracy in results.values() for task in accuracy}, key=lambda task: (task == "all", task))
    rows = [
        [task, *(f"{accuracy[task]:.1%}" if task in accuracy else "" for accuracy in results.values())]
        for task in tasks
    ]
    return table(["task", *results], rows) if rows else ""
