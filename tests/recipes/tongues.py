# ruff: noqa: E501 (templates are kept in the lines that they are read in)
"""What each family's tokenizer knows: its control tokens and its chat template, shortened as in ``prepare.families``."""

from __future__ import annotations

from dataclasses import dataclass

from prepare.conftest import CHATML
from prepare.families import GEMMA, LLAMA3, QWEN3, SMOLLM2

SMOLLM3 = (
    "{{- '<|im_start|>system\nReasoning Mode: /no_think\n<|im_end|>\n' }}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{% generation %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% endgeneration %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n' }}{%- endif %}"
)
MISTRAL_V7 = (
    "{{- bos_token }}{{- '[SYSTEM_PROMPT]You are Mistral Small 3.[/SYSTEM_PROMPT]' }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}"
    "{%- elif message['role'] == 'assistant' %}{{- message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
PHI4_MINI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THINK = ("<think>", "</think>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]")


@dataclass(frozen=True)
class Tongue:
    """A tokenizer in words."""

    template: str | None
    """None: a base model's, which has none."""
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None


_TONGUES = {
    "HuggingFaceTB/SmolLM2-360M": Tongue(None, IM, "<|endoftext|>", "<|endoftext|>"),
    "HuggingFaceTB/SmolLM2-": Tongue(SMOLLM2, IM, "<|im_end|>", "<|im_start|>"),
    "HuggingFaceTB/SmolLM3-3B-Base": Tongue(None, (*LLAMA, *IM, *THINK), "<|end_of_text|>"),
    "HuggingFaceTB/SmolLM3-3B": Tongue(SMOLLM3, (*LLAMA, *IM, *THINK), "<|im_end|>"),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Tongue(CHATML, (*IM, *THINK), "<|im_end|>"),
    "Qwen/Qwen3-14B-Base": Tongue(QWEN3, (*IM, *THINK), "<|endoftext|>"),
    "Qwen/Qwen3-": Tongue(QWEN3, (*IM, *THINK), "<|im_end|>"),
    "meta-llama/Llama-3.1-8B-Instruct": Tongue(LLAMA3, LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "meta-llama/Llama-3.1-": Tongue(None, LLAMA, "<|end_of_text|>", "<|begin_of_text|>"),
    "meta-llama/Llama-3": Tongue(LLAMA3, LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "mistralai/Mistral-7B-v0.3": Tongue(None, MISTRAL, "</s>", "<s>"),
    "mistralai/Mistral-Small-": Tongue(
        MISTRAL_V7, (*MISTRAL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>"
    ),
    "google/gemma-3-": Tongue(
        GEMMA, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"
    ),
    "microsoft/Phi-4-mini-": Tongue(
        PHI4_MINI, ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", "<|endoftext|>"
    ),
    "microsoft/phi-4": Tongue(PHI4, (*IM, "<|im_sep|>"), "<|im_end|>", "<|endoftext|>"),
    "allenai/": Tongue(None, IM, "<|endoftext|>"),
}  # fmt: skip
"""By the beginning of the hub id; the first that fits."""


def tongue(model: str) -> Tongue:
    """What the tokenizer of ``model`` knows."""
    return next(speaks for beginning, speaks in _TONGUES.items() if model == beginning or model.startswith(beginning))
