"""Chat templates as data: one description gives the training text, the prompt and the Jinja template that is saved.

Text and Jinja render the same string, so a checkpoint is served with the words it was trained with. Sources: LLaVA's
training code for `vicuna_v1` (its `--version v1`), `llama_2` (`llava_llama_2`, in Meta's own format), `chatml_direct`
and the words of `llama_3`; the models' published formats for `mistral`, `llama_3` and `chatml`. Two places are on
purpose not LLaVA's: its `plain` ends a caption with a line end, this one with the end token; and it writes a space
before Mistral's `</s>`, which Mistral itself does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from anyres_vlm.config import TemplateName
from anyres_vlm.schema import IMAGE_TOKEN, Turn

BOS, EOS = "{bos}", "{eos}"  # stand for the tokenizer's own tokens

Span = tuple[int, int]  # first character, end

LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Template:
    """The pieces around the turns, in the order in which they are written. Supervised is `lead`, the answer and `end`.

    `again` stands before every user turn but the first. `user_text=False` keeps only the user's images, as LLaVA's
    stage 1 does. `begins` says that the published format starts with the begin token, whether or not the tokenizer adds
    it. `past` replaces `user_suffix`, `assistant_prefix` and `lead` before every answer but the last, for chat
    templates that write earlier answers without the thinking block of the last one.
    """

    opening: str = ""
    again: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    assistant_prefix: str = ""
    lead: str = ""
    end: str = EOS
    between: str = ""
    user_text: bool = True
    begins: bool = False
    past: str | None = None

    @property
    def asks(self) -> str:
        """What a prompt writes after the question."""
        return self.user_suffix + self.assistant_prefix

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> tuple[str, list[Span]]:
        """The conversation as text and the supervised spans of its characters; `prompt` opens the next answer."""
        pieces, length, spans = [self.opening], len(self.opening), []
        for number, turn in enumerate(turns):
            is_past = self.past is not None and number + 1 + (turn.role == "user") < len(turns)
            if turn.role == "user":
                words = turn.text if self.user_text else IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
                piece = (self.again if number else "") + self.user_prefix + words
                piece += "" if is_past else self.user_suffix
            else:
                before, asked = self.assistant_prefix + self.lead, self.assistant_prefix
                if is_past and self.past is not None:
                    before, asked = self.past, self.asks if self.past.startswith(self.asks) else self.past
                piece = f"{before}{turn.text}{self.end}"
                spans.append((length + len(asked), length + len(piece)))
                piece += self.between
            pieces.append(piece)
            length += len(piece)
        return "".join(pieces) + self.assistant_prefix * prompt, spans

    @property
    def jinja(self) -> str:
        """The same template for `apply_chat_template`; images of a content list stand as `<image>` and a line end."""
        image = json.dumps(f"{IMAGE_TOKEN}\n")
        answer = _expression(self.assistant_prefix + self.lead), _expression(self.end + self.between)
        return (
            "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
            f"{{%- for part in content -%}}{{{{ {image} if part.type == 'image' else part.text }}}}{{%- endfor -%}}"
            "{%- endif -%}{%- endmacro -%}"
            f"{{{{ {_expression(self.opening)} }}}}"
            "{%- for message in messages -%}{%- if message.role == 'user' -%}"
            f"{{%- if not loop.first -%}}{{{{ {_expression(self.again)} }}}}{{%- endif -%}}"
            f"{{{{ {_expression(self.user_prefix)} + words(message.content) + {_expression(self.user_suffix)} }}}}"
            "{%- elif message.role == 'assistant' -%}"
            f"{{{{ {answer[0]} + words(message.content) + {answer[1]} }}}}"
            "{%- else -%}{{ raise_exception('this template knows user and assistant, not ' + message.role) }}"
            "{%- endif -%}{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ {_expression(self.assistant_prefix)} }}}}{{%- endif -%}}"
        )


def _expression(text: str) -> str:
    """A piece as a Jinja expression."""
    tokens = {BOS: "bos_token", EOS: "eos_token"}
    parts = [part for part in re.split(f"({BOS}|{EOS})", text) if part] or [""]
    return " + ".join(tokens.get(part) or json.dumps(part) for part in parts)


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(user_text=False),
    "tiny": Template(user_prefix="User: ", user_suffix=" ", assistant_prefix="Assistant:", lead=" "),
    "vicuna_v1": Template(
        opening=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. "
        ),
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        lead=" ",
    ),
    "llama_2": Template(
        begins=True,
        opening=f"[INST] <<SYS>>\n{LLAVA_SYSTEM}\n<</SYS>>\n\n",
        again=f"{BOS}[INST] ",
        user_suffix=" [/INST]",
        lead=" ",
        end=f" {EOS}",
    ),
    "mistral": Template(begins=True, user_prefix="[INST] ", user_suffix=" [/INST]", lead=" "),
    "llama_3": Template(
        begins=True,
        opening=f"<|start_header_id|>system<|end_header_id|>\n\n{LLAVA_SYSTEM}<|eot_id|>",
        user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        user_suffix="<|eot_id|>",
        assistant_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    "chatml": Template(
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>\n",
        assistant_prefix="<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
    ),
    "chatml_direct": Template(
        opening="<|im_start|>system\nAnswer the questions.<|im_end|>",
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>",
        assistant_prefix="<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
}
