"""Where the turns of the assistant stand in what each chat template writes: its headers and ends, written down by hand.

The second judge beside the planted words of :mod:`prepare.oracle`: it knows nothing of generation prompts or of what a
conversation holds, so that a mask is compared with what a reader of the text would mark.
"""

from __future__ import annotations

import re

CHATML = (r"<\|im_start\|>assistant\n", r"<\|im_end\|>")
LLAMA3 = (r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>")
GEMMA = (r"<start_of_turn>model\n", "<end_of_turn>")
# After a tool's result the model goes on in the same turn, and it leaves off where the next result begins.
GEMMA4 = (r"(?:<\|turn>model\n|<tool_response\|>(?!<\|tool_response>))", r"(?:<turn\|>|<\|tool_response>)")
DIFFUSION = (r"(?:(?<!<tool_response\|>)<\|turn>model\n|<tool_response\|>(?!<\|tool_response>))", GEMMA4[1])
DEEPSEEK = (r"(?:<｜Assistant｜>(?:<think>\n)?|<｜tool▁outputs▁end｜>|<｜tool▁output▁end｜>(?=\n<｜tool▁call▁begin))",
            "<｜end▁of▁sentence｜>")  # fmt: skip
# No token of its own ends a turn, but the header of the next: the model that is never taught one is reported.
GLM4 = (r"<\|assistant\|>", r"(?=<\|user\|>|<\|observation\|>|<\|assistant\|>|$)")
# History ends in <|end|>, at which no server stops, so that only calls and the last answer are taught to end.
GPTOSS = (r"<\|start\|>assistant(?=[ <])", r"(?:(?=<\|end\|><\|start\|>(?!assistant))|<\|return\|>|<\|call\|>)")
MUSE = (r"<\|start\|>assistant(?= to)", r"<\|eot\|>")
NEMOTRON = (r"<\|im_start\|>assistant\n<think>\n?", r"<\|im_end\|>")
THINKING = (r"<\|im_start\|>assistant\n(?:<think>\n)?", r"<\|im_end\|>")
PHI3 = (r"<\|assistant\|>\n", r"<\|end\|>")
UTTERANCE = ("Assistant:", "<end_of_utterance>")
COHERE = (r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>")
COHERE2 = (COHERE[0] + r"<\|START_RESPONSE\|>", r"<\|END_RESPONSE\|><\|END_OF_TURN_TOKEN\|>")

TURNS = {
    "cohere": COHERE, "cohere2": COHERE2, "deepseek_r1_distill": DEEPSEEK, "deepseekv3": DEEPSEEK,
    "diffusion_gemma": DIFFUSION, "gemma": GEMMA, "gemma3": GEMMA, "gemma4": GEMMA4, "glm4moe": GLM4, "gptoss": GPTOSS,
    "idefics3": UTTERANCE, "smolvlm": UTTERANCE, "lfm2": CHATML, "llama3": LLAMA3, "galley-llama3": LLAMA3,
    "llava_next": (r"\[/INST\]", "</s>"), "muse_glimmer": MUSE, "nemotron": NEMOTRON, "phi3": PHI3,
    "qwen2_5": CHATML, "qwen3": CHATML, "qwen3_5_nothink": (CHATML[0] + r"(?:<think>\n\n</think>\n\n)?", CHATML[1]),
    "qwen3_5_think": THINKING, "qwen3_6": THINKING, "qwen3_8": THINKING, "galley-chatml": CHATML,
}  # fmt: skip
"""Header and end by the beginning of a template's name, as regular expressions; what the generation prompt gives beyond
a header (``<think>``) belongs to it."""
# What trl's own marks, which are used as they stand, have before or behind these: parts of the header, line breaks.
MARKED = {
    "deepseek": (r"<｜Assistant｜>(?:<think>\n)?|<｜tool▁outputs▁end｜>", ""),
    "diffusion_gemma": (r"<\|turn>model\n", r"<\|tool_response>"),
    "gptoss": (r"<\|start\|>assistant", r"<\|end\|>"),
    "muse_glimmer": (r"<\|start\|>assistant", ""),
    "glm4moe": ("", r"<\|user\|>|<\|observation\|>"),
    "nemotron": (r"<think>\n?", ""),
    "qwen3": (r"(?:<think>\n+)?</think>\n+|<think>\n", ""),
    "phi3": ("", r"\n</s>"),
}


def of(name: str) -> tuple[str, str]:
    """Header and end of the template ``name``."""
    return TURNS[max((key for key in TURNS if name.startswith(key)), key=len)]


def written(name: str, text: str) -> list[str]:
    """Every turn of the assistant in ``text``, from behind its header through its end."""
    header, end = of(name)
    return re.findall(f"(?s){header}(.*?{end})", text)


def faults(name: str, text: str, trained: list[str], masked: int, marked: bool) -> list[str]:
    """What is trained on though no turn is, or only in part, or is not though it is neither masked nor counted."""
    before, behind = next((extra for key, extra in MARKED.items() if marked and name.startswith(key)), ("", ""))
    turns = written(name, text)
    if marked:
        trained, turns = ([_core(part, before, behind) for part in parts] for parts in (trained, turns))
    left = iter(turns)
    wrong = [part for part in trained if not any(_same(part, turn) for turn in left)]
    missing = len(turns) - len(trained)
    if wrong:
        return [f"{wrong!r} trained on, of {turns!r}"]
    return [f"{missing} of {turns!r} not trained on, {masked} counted"] if missing != masked else []


def _same(part: str, turn: str) -> bool:
    """A tokenizer may join the header's last line break and the blanks that a turn begins with into one token."""
    return part == turn or (turn[:1].isspace() and part.endswith(turn) and part.removesuffix(turn).isspace())


def _core(part: str, before: str, behind: str) -> str:
    """``part`` without what a template's own marks may have around it."""
    return re.sub(f"^(?:{before})|(?:{behind})$", "", part.strip()).strip()
