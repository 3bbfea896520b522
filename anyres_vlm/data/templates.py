"""Chat templates as data: one description gives the training text, the prompt and the Jinja template that is saved.

Text and Jinja render the same string, so a checkpoint is served with the words it was trained with. Sources: the
conversation formats of LLaVA (`plain`, `vicuna_v1`, `mistral`, `chatml_direct`), Llama 3's and OpenAI's ChatML.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from anyres_vlm.config import TemplateName
from anyres_vlm.schema import IMAGE_TOKEN

EOS = "{eos}"  # stands for the tokenizer's own end-of-sequence token


@dataclass(frozen=True)
class Template:
    """The pieces around the turns. Supervised is `lead`, the answer and `end`.

    `user_text=False` keeps only the user's images, as LLaVA's stage 1 does.
    """

    opening: str = ""
    user_prefix: str = ""
    user_suffix: str = ""
    assistant_prefix: str = ""
    lead: str = ""
    end: str = EOS
    between: str = ""
    user_text: bool = True

    @property
    def jinja(self) -> str:
        """The same template for `apply_chat_template`; images of a content list stand as `<image>` and a line end."""
        opening, user_prefix, user_suffix = map(json.dumps, (self.opening, self.user_prefix, self.user_suffix))
        assistant_prefix, lead, between = map(json.dumps, (self.assistant_prefix, self.lead, self.between))
        end = "eos_token" if self.end == EOS else json.dumps(self.end)
        image = json.dumps(f"{IMAGE_TOKEN}\n")
        return (
            "{%- macro words(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
            f"{{%- for part in content -%}}{{{{ {image} if part.type == 'image' else part.text }}}}{{%- endfor -%}}"
            "{%- endif -%}{%- endmacro -%}"
            f"{{{{ {opening} }}}}"
            "{%- for message in messages -%}{%- if message.role == 'user' -%}"
            f"{{{{ {user_prefix} + words(message.content) + {user_suffix} }}}}"
            "{%- elif message.role == 'assistant' -%}"
            f"{{{{ {assistant_prefix} + {lead} + words(message.content) + {end} + {between} }}}}"
            "{%- else -%}{{ raise_exception('this template knows user and assistant, not ' + message.role) }}"
            "{%- endif -%}{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ {assistant_prefix} }}}}{{%- endif -%}}"
        )


TEMPLATES: dict[TemplateName, Template] = {
    "plain": Template(user_text=False),
    "tiny": Template(user_prefix="User: ", user_suffix=" ", assistant_prefix="Assistant:", lead=" "),
    "vicuna_v1": Template(
        opening=(
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions. "
        ),
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        lead=" ",
    ),
    "mistral": Template(user_prefix="[INST] ", user_suffix=" [/INST]", lead=" "),
    "llama_3": Template(
        opening=(
            "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are "
            "able to understand the visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language.<|eot_id|>"
        ),
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
