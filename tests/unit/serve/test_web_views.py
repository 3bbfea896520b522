"""What the web page shows, without a browser, and what the command says without gradio."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from anyres_vlm.cli.main import main
from anyres_vlm.geometry import Grid, Tiling
from anyres_vlm.schema import ImageRef
from anyres_vlm.serve.views import Alternatives, alternatives_view, tiles_view


def test_images_have_pictures_bills_and_reasons(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((640, 480)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    images = [ImageRef("<b>a</b>.png", tmp_path / "a.png"), ImageRef("<i>.png", tmp_path / "b.png")]
    shown = tiles_view(images, Tiling.from_grid(Grid(2, 2)), candidates=True)
    assert (
        "&lt;b&gt;a&lt;/b&gt;.png: 640x480 -&gt; 2x2 grid, 5 tiles, 2,304 visual + 36 newline = 2,340 tokens" in shown
    )
    assert '<p class="error">&lt;i&gt;.png: broken image' in shown
    assert not re.search("<b>|<i>", shown)
    assert re.findall(r'<tr class="chosen"><td>(\w+)</td>', shown) == ["672x672"]
    assert shown.count("<tr") == 1 + 5
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    with Image.open(BytesIO(base64.b64decode(picture))) as drawn:
        assert drawn.width > 560


def test_alternatives_are_the_softmax_of_each_step(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    star, less, newline = (tiny_tokenizer.convert_tokens_to_ids(token) for token in ("Ġstar", "<", "Ċ"))
    half_id = next(i for i in range(len(tiny_tokenizer)) if tiny_tokenizer.decode([i]) == "\ufffd")
    alternatives = Alternatives(tiny_tokenizer, count=3)
    for said in (less, newline, half_id):
        logits = torch.full((1, len(tiny_tokenizer)), -50.0)
        logits[0, [star, less, newline, half_id]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        alternatives([said], logits)
    shown = alternatives_view(alternatives)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in shown.split("<tr")[2:]]
    plain = [[re.sub("<.*?>", "", cell) for cell in row] for row in cells]
    assert plain[0] == ["&lt; 30.0%", " star 40.0%", "↵ 20.0%"]
    assert plain[1] == ["↵ 20.0%", " star 40.0%", "&lt; 30.0%"]
    name = tiny_tokenizer.convert_ids_to_tokens(half_id)
    assert plain[2] == [f"{name} 10.0%", " star 40.0%", "&lt; 30.0%", "↵ 20.0%"], (
        "said though it was not among the first"
    )


def test_without_gradio_the_command_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("anyres_vlm.cli.web.find_spec", lambda name: None)
    assert main(["web", "model"]) == 2
    assert capsys.readouterr().err == (
        "error: the web page needs gradio: pip install 'anyres-vlm[web]', or use anyres chat\n"
    )
