"""The page of Markdown that ``gpu.py`` writes."""

from __future__ import annotations

import statistics
from typing import Any

NAMES = {"galley": "Galley", "trl": "TRL", "unsloth": "Unsloth"}
COLUMNS = ("method", "contestant", "tokens/s", "of TRL's", "MFU", "of the measured rate", "step, s (shortest, longest)",
           "first step, s", "peak GB", "target", "reached")  # fmt: skip
FORMULA = """\
MFU = tokens/s x FLOP a token / peak. FLOP a token = 6 N (every weight learns) or 4 N (an adapter: frozen weights have
no gradient) + 6 x layers x hidden size x tokens of a document (attention sees half of it on average; Chowdhery et al.,
2022, appendix B). N: all weights but the input embedding. Nothing that is computed twice counts twice."""


def page(record: dict[str, Any]) -> str:
    """All results, with what they were measured on and how."""
    results = record["results"]
    head = f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}\n"
    body = "\n".join(_row(each, record) for each in results)
    failed = "".join(f"- {_name(each)}: {each['failed']}\n" for each in results if "failed" in each)
    return f"{_setting(record)}\n{head}{body}\n\n{failed}{_versions(record)}\n{FORMULA}\n"


def line(result: dict[str, Any]) -> str:
    """One result in words."""
    speed = result.get("failed") or f"{result['tokens_per_s']:,.0f} tokens/s, {result['peak_memory_gb']:.1f} GB"
    return f"{_name(result)}: {speed}"


def _name(result: dict[str, Any]) -> str:
    return f"{result['method']}, {NAMES[result['contestant']]}"


def _setting(record: dict[str, Any]) -> str:
    setting, box, rates = record["setting"], record["hardware"], record["rates"]
    shape = setting["shape"]
    title = "# On a CPU, to try the script: two small layers" if record["toy"] else "# On a GPU: an 8B model"
    sheet = f"{rates['sheet'] / 1e12:,.0f} TFLOP/s (its maker's, dense bf16)" if rates["sheet"] else "the measured rate"
    devices = "; ".join(box["gpus"]) or box["cpu"]
    return (
        f"{title}, {record['date']}\n\n"
        f"A Llama of {shape['num_hidden_layers']} layers of {shape['hidden_size']}, vocabulary {shape['vocab_size']}, "
        f"random weights; {setting['samples']} packed samples of {setting['length']} tokens a step, one at a time, "
        f"four documents in each, every token trained on; {setting['measured']} steps after {setting['warmup']}.\n"
        f"{devices}; {box['cores']} cores, {box['memory_gb']} GB, {box['system']}; "
        f"load before: {box['load_before']}.\n"
        f"Peak: {sheet}. Measured: {rates['measured'] / 1e12:,.4g} TFLOP/s, products of two {rates['size']} x "
        f"{rates['size']} bf16 matrices.\n"
    )


def _versions(record: dict[str, Any]) -> str:
    sides = record["versions"].items()
    return "".join(f"- {name}: {', '.join(f'{k} {v}' for k, v in side.items())}\n" for name, side in sides)


def _row(result: dict[str, Any], record: dict[str, Any]) -> str:
    method, who, results = result["method"], result["contestant"], record["results"]
    if "failed" in result:
        cells = [method, NAMES[who], "failed", *["–"] * 6]
    else:
        times = result["step_s"]
        step = f"{statistics.median(times):.2f} ({min(times):.2f}, {max(times):.2f})"
        cells = [method, NAMES[who], f"{result['tokens_per_s']:,.0f}", _ratio(result, speed_of(results, method, "trl")),
                 f"{result['mfu']:.1%}", f"{result['of_measured']:.1%}", step, f"{result['first_step_s']:.1f}",
                 f"{result['peak_memory_gb']:.1f}"]  # fmt: skip
    aim, reached = target(result, results) if who == "galley" else ("", "")
    return f"| {' | '.join([*cells, aim, '–' if record['toy'] and reached else reached])} |"


def speed_of(results: list[dict[str, Any]], method: str, who: str) -> float | None:
    """Tokens a second of a contestant; None where it has none."""
    found = [each for each in results if (each["method"], each["contestant"]) == (method, who)]
    return found[0].get("tokens_per_s") if found else None


def _ratio(result: dict[str, Any], other: float | None) -> str:
    return f"{result['tokens_per_s'] / other:.2f}" if other else "–"


def target(result: dict[str, Any], results: list[dict[str, Any]]) -> tuple[str, str]:
    """What Galley wants to reach with an 8B model on an H200, and whether it did."""
    lora = speed_of(results, "lora", "galley")
    words, least, have = {
        "full": ("MFU 55 %", 0.55, result.get("mfu")),
        "lora": ("15,000 tokens/s", 15_000, result.get("tokens_per_s")),
        "qlora": ("0.8 of LoRA's tokens/s", 0.8, result["tokens_per_s"] / lora if lora and "mfu" in result else None),
    }[result["method"]]
    return words, "–" if have is None else "yes" if have >= least else "no"
