"""`transformers serve` on a checkpoint of ours: the same text and the same prompt as from our own chat."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from PIL import Image

from anyres_vlm.checkpoints.bases import build_model
from anyres_vlm.checkpoints.load_save import save_pretrained
from anyres_vlm.config import ModelConfig
from anyres_vlm.data.templates import TEMPLATES
from anyres_vlm.inference.assistant import Assistant
from anyres_vlm.inference.generation import Decoding
from anyres_vlm.schema import Turn

pytestmark = pytest.mark.browser  # for the extra `web`, whose gradio brings the server that transformers needs, too
QUESTION = "What does the sign say?"
START_S = 180


def test_a_chat_completion_with_an_image(tiny_bases: Path, tmp_path: Path) -> None:
    bases = {"llm": str(tiny_bases / "llm"), "encoder": {"name": str(tiny_bases / "vit")}, "template": "tiny"}
    model, tokenizer = build_model(ModelConfig.model_validate(bases), seed=0)
    save_pretrained(model, model.state_dict(), tokenizer, TEMPLATES["tiny"].jinja, tmp_path)
    Image.linear_gradient("L").resize((400, 90)).save(tmp_path / "wide.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", tmp_path, "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        image = base64.b64encode((tmp_path / "wide.png").read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": QUESTION},
        ]
        reply = client.chat.completions.create(
            model=str(tmp_path), max_tokens=12, temperature=0, messages=[{"role": "user", "content": content}]
        )
    finally:
        server.terminate()
        server.wait(60)
    expected = Assistant.load(tmp_path).answer(
        [Turn("user", f"<image>\n{QUESTION}")], [Image.open(tmp_path / "wide.png").convert("RGB")], Decoding(12)
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert (reply.choices[0].message.content or "").strip() == expected.text
