"""The demo's examiner: the same code before and after. Needs plain torch and transformers, nothing of Galley.

python demo/score.py MODEL_FOLDER HELD_OUT.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MAX_NEW_TOKENS = 80
"""The longest right answer has 55 tokens; the rest is room to be wrong in."""

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Sample:
    """One message, the answer wanted, the answer given."""

    message: str
    wanted: str
    given: str

    @property
    def right(self) -> bool:
        """Exact match after parsing."""
        return matches(self.given, self.wanted)


@dataclass(frozen=True)
class Report:
    """What a model scored."""

    samples: list[Sample]
    seconds: float

    @property
    def score(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(sample.right for sample in self.samples) / len(self.samples)


def matches(given: str, wanted: str) -> bool:
    """Whether ``given`` is JSON, as a whole, and equal to ``wanted`` in every key, value and type."""
    try:
        answer = json.loads(given)
    except ValueError:
        return False
    # json.dumps tells 3 from 3.0 and true from 1, which == does not.
    return json.dumps(answer, sort_keys=True) == json.dumps(json.loads(wanted), sort_keys=True)


def read(path: Path) -> list[Turns]:
    """Conversations of a JSON lines file."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def load(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, in bf16, on the GPU where there is one."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def render(tokenizer: Any, turns: Turns) -> str:
    """The prompt that ``turns`` make, up to where the assistant begins."""
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers to one batch of rendered prompts, each ending where the model ends its turn."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    tokens = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True,
                            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    texts: list[str] = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(path: str, rows: list[Turns], batch_size: int = 60) -> Report:
    """Let the model at ``path`` answer every row's last turn from the turns before it."""
    start = time.monotonic()
    model, tokenizer = load(path)
    prompts = [render(tokenizer, row[:-1]) for row in rows]
    given: list[str] = []
    for at in range(0, len(prompts), batch_size):
        given += answer(model, tokenizer, prompts[at : at + batch_size])
        print(f"  {len(given)}/{len(prompts)} answered", flush=True)
    samples = [Sample(row[-2]["content"], row[-1]["content"], text) for row, text in zip(rows, given, strict=True)]
    return Report(samples, time.monotonic() - start)


if __name__ == "__main__":
    report = score(sys.argv[1], read(Path(sys.argv[2])))
    for sample in report.samples[:8]:
        print(f"{sample.message}\n  {sample.given}\n  {'right' if sample.right else f'wanted {sample.wanted}'}")
    print(f"{report.score:.1%} of {len(report.samples)} right, {report.seconds:.0f} s")
