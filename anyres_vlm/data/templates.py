"""Chat templates as data: one description gives the training text, the prompt and the Jinja template that is saved.

Text and Jinja render the same string, so a checkpoint is served with the format it was trained with. Sources: LLaVA's
training code for `vicuna_v1` (its `--version v1`), `llama_2` (`llava_llama_2`, in Meta's own format), `chatml_direct`
and the system text of `llama_3`; the published formats of the models for `mistral`, `llama_3` and `chatml`. There are
two deliberate differences from LLaVA: its `plain` ends a caption with a line break, this one with the end token; and it
writes a space before Mistral's `</s>`, which Mistral itself does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from anyres_vlm.config import TemplateName
from anyres_vlm.errors import DataError
from anyres_vlm.schema import IMAGE_TOKEN, Turn

BOS, EOS = "{bos}", "{eos}"  # stand for the tokenizer's own tokens
SYSTEM = "{system}"  # stands for the system text

Span = tuple[int, int]  # first character, end

LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Template:
    """The pieces of text around the turns, in the order in which they are written.

    The supervised text is `lead`, the answer and `end`.

    `opening` and `system_part` come before the first turn. `{system}` in `system_part` is replaced by the system text
    of the conversation, or else by `system`; without either, the part is left out. `again` comes before every user turn
    but the first. With `user_text=False`, only the images of a user turn are kept and a system text is left out, as in
    stage 1 of LLaVA. `begins` means that the published format starts with the begin token, which the tokenizer may add
    or not. `past` replaces `user_suffix`, `assistant_prefix` and `lead` before every answer but the last, for chat
    templates that write earlier answers without a thinking block.
    """

    opening: str = ""
    system_part: str = ""
    system: str = ""
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
    def prompt_suffix(self) -> str:
        """The text between a question and its answer."""
        return self.user_suffix + self.assistant_prefix

    def head(self, system: str = "") -> str:
        """Return the opening of a conversation with its own system text, or else the template's.

        Raises `DataError` if the template keeps text but has no system part for it.
        """
        if not self.user_text:
            return self.opening
        if system and not self.system_part:
            raise DataError(
                "it has a system text, which this template cannot write: use vicuna_v1, llama_2, llama_3 or chatml, or "
                "leave the text out",
                kind="system",
            )
        text = system or self.system
        return self.opening + (self.system_part.replace(SYSTEM, text) if text else "")

    def render(self, turns: Sequence[Turn], prompt: bool = False, system: str = "") -> tuple[str, list[Span]]:
        """Return the conversation as text and the supervised spans of its characters; `prompt` opens the next answer.

        Raises `DataError` for a system text that the template cannot write.
        """
        head = self.head(system)
        pieces, length, spans = [head], len(head), []
        for number, turn in enumerate(turns):
            is_past = self.past is not None and number + 1 + (turn.role == "user") < len(turns)
            if turn.role == "user":
                words = turn.text if self.user_text else IMAGE_TOKEN * turn.text.count(IMAGE_TOKEN)
                piece = (self.again if number else "") + self.user_prefix + words
                piece += "" if is_past else self.user_suffix
            else:
                before, prompted = self.assistant_prefix + self.lead, self.assistant_prefix
                if is_past and self.past is not None:
                    before = self.past
                    prompted = self.prompt_suffix if self.past.startswith(self.prompt_suffix) else self.past
                piece = f"{before}{turn.text}{self.end}"
                spans.append((length + len(prompted), length + len(piece)))
                piece += self.between
            pieces.append(piece)
            length += len(piece)
        return "".join(pieces) + self.assistant_prefix * prompt, spans

    @property
    def jinja(self) -> str:
        """The template as Jinja for `apply_chat_template`; an image part is written as `<image>` and a line break."""
        image = json.dumps(f"{IMAGE_TOKEN}\n")
        answer = _expression(self.assistant_prefix + self.lead), _expression(self.end + self.between)
        return (
            "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
            f"{{%- for part in content -%}}{{{{ {image} if part.type == 'image' else part.text }}}}{{%- endfor -%}}"
            "{%- endif -%}{%- endmacro -%}"
            f"{{{{ {_expression(self.opening)} }}}}{self._jinja_system}"
            f"{{%- for message in {'turns' if self._jinja_system else 'messages'} -%}}"
            "{%- if message.role == 'user' -%}"
            f"{{%- if not loop.first -%}}{{{{ {_expression(self.again)} }}}}{{%- endif -%}}"
            f"{{{{ {_expression(self.user_prefix)} + words(message.content) + {_expression(self.user_suffix)} }}}}"
            "{%- elif message.role == 'assistant' -%}"
            f"{{{{ {answer[0]} + words(message.content) + {answer[1]} }}}}"
            "{%- else -%}{{ raise_exception('this template knows user and assistant, not ' + message.role) }}"
            "{%- endif -%}{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ {_expression(self.assistant_prefix)} }}}}{{%- endif -%}}"
        )

    @property
    def _jinja_system(self) -> str:
        """The Jinja source of the system part, whose text a first message may replace; it sets `turns`, the rest."""
        if not self.user_text:
            return "{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages -%}"
        if not self.system_part:
            return ""
        before, after = map(_expression, self.system_part.split(SYSTEM))
        return (
            "{%- if messages and messages[0].role == 'system' -%}"
            "{%- set system = words(messages[0].content) | trim -%}{%- set turns = messages[1:] -%}"
            "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
            f"{{%- set system = system or {json.dumps(self.system)} -%}}"
            f"{{%- if system -%}}{{{{ {before} + system + {after} }}}}{{%- endif -%}}"
        )


def _expression(text: str) -> str:
    """Return a piece as a Jinja expression."""
    tokens = {BOS: "bos_token", EOS: "eos_token"}
    parts = [part for part in re.split(f"({BOS}|{EOS})", text) if part] or [""]
    return " + ".join(tokens.get(part) or json.dumps(part) for part in parts)


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(user_text=False),
    "tiny": Template(user_prefix="User: ", user_suffix=" ", assistant_prefix="Assistant:", lead=" "),
    "vicuna_v1": Template(
        system_part=f"{SYSTEM} ",
        system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions."
        ),
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        lead=" ",
    ),
    "llama_2": Template(
        begins=True,
        system_part=f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n",
        system=LLAVA_SYSTEM,
        again=f"{BOS}[INST] ",
        user_suffix=" [/INST]",
        lead=" ",
        end=f" {EOS}",
    ),
    "mistral": Template(begins=True, user_prefix="[INST] ", user_suffix=" [/INST]", lead=" "),
    "llama_3": Template(
        begins=True,
        system_part=f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>",
        system=LLAVA_SYSTEM,
        user_prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        user_suffix="<|eot_id|>",
        assistant_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    "chatml": Template(
        system_part=f"<|im_start|>system\n{SYSTEM}<|im_end|>\n",
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>\n",
        assistant_prefix="<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
    ),
    "chatml_direct": Template(
        system_part=f"<|im_start|>system\n{SYSTEM}<|im_end|>",
        system="Answer the questions.",
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>",
        assistant_prefix="<|im_start|>assistant\n",
        end="<|im_end|>",
    ),
}
