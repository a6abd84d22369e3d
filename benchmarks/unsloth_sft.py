"""Unsloth on the benchmark's rows, with the arguments of ``trl_sft.py`` (its trainer is TRL's, patched).

Runs in an environment of its own with Unsloth (see README.md), on one GPU.
"""

from __future__ import annotations

from unsloth import FastLanguageModel  # isort: skip  # first: it patches what is imported after it

import argparse
from typing import Any

import torch
import trl_sft
from trl import SFTTrainer

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(given: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer, with an adapter unless everything learns."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=given.model,
        max_seq_length=given.length,
        dtype=torch.bfloat16,
        load_in_4bit=given.method == "qlora",
        full_finetuning=given.method == "full",
    )
    if given.method != "full":
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=LAYERS,
            use_gradient_checkpointing=False, random_state=7,
        )  # fmt: skip
    return model, tokenizer


def main() -> None:
    given = trl_sft.arguments()
    model, tokenizer = load(given)
    trainer = SFTTrainer(
        model=model,
        args=trl_sft.settings(given),
        train_dataset=trl_sft.read_rows(given.rows),
        processing_class=tokenizer,
        callbacks=[trl_sft.StepLog(given.steps_file)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
