"""TRL's SFTTrainer on the benchmark's rows; runs under torchrun in an environment with TRL (see README.md).

Conversations become prompt and completion, so that the loss is on the assistant's tokens, as Galley's is; of plain text
every token is trained on. Each step appends ``{"step", "tokens"}`` to ``--steps-file``: tokens but for padding, over
all ranks, as TRL itself counts them; on a GPU also ``peak_memory_gb``, the most that was allocated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

ZERO = {
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"packing": True, "packing_strategy": "bfd", "gradient_checkpointing": False},
    "split": {
        "packing": True,
        "packing_strategy": "bfd",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
    "unpadded": {"padding_free": True, "gradient_checkpointing": False, "max_length": None},
}
"""As it comes (padded, activations recomputed), and what makes it faster: README.md says why these."""


class StepLog(TrainerCallback):  # type: ignore[misc]
    """Appends a line when TRL logs a step."""

    def __init__(self, path: Path) -> None:
        self.path, self.before = path, 0.0

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "num_tokens" not in logs or "loss" not in logs:
            return
        row = {"step": state.global_step, "tokens": logs["num_tokens"] - self.before, "loss": float(logs["loss"])}
        if torch.cuda.is_available():
            row["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        self.before = logs["num_tokens"]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--method", choices=("lora", "qlora", "full"), required=True)
    parser.add_argument("--setting", choices=tuple(SETTINGS), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--zero", type=int, default=2, help="ZeRO stage; 0: without DeepSpeed")
    parser.add_argument("--optimizer", default="adamw_torch_fused")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps-file", type=Path, required=True)
    return parser.parse_args()


def read_rows(path: Path) -> Dataset:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if "text" in rows[0]:
        return Dataset.from_list(rows)
    turns = [row["messages"] for row in rows]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in turns])


def zero(stage: int) -> dict[str, Any] | None:
    """DeepSpeed's configuration; gradients accumulate in fp32 under ZeRO-3, as in Galley's presets."""
    if stage == 0:
        return None
    exact = {"data_types": {"grad_accum_dtype": "fp32"}} if stage == 3 else {}
    return ZERO | exact | {"zero_optimization": {"stage": stage}}


def settings(given: argparse.Namespace) -> SFTConfig:
    common = {
        "output_dir": str(given.out),
        "max_steps": given.steps,
        "max_length": given.length,
        "per_device_train_batch_size": given.micro,
        "gradient_accumulation_steps": given.accumulation,
        "optim": given.optimizer,
        "learning_rate": 2e-5 if given.method == "full" else 2e-4,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "deepspeed": zero(given.zero),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
    }
    return SFTConfig(**(common | SETTINGS[given.setting]))


def load(given: argparse.Namespace) -> Any:
    """The model in bf16, for QLoRA in NF4 as Galley quantises it."""
    how: dict[str, Any] = {"dtype": torch.bfloat16}
    if given.method == "qlora":
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16, **four
        )
    return AutoModelForCausalLM.from_pretrained(given.model, **how)


def main() -> None:
    given = arguments()
    config = settings(given)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=load(given),
        args=config,
        train_dataset=read_rows(given.rows),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        peft_config=None if given.method == "full" else adapter,
        callbacks=[StepLog(given.steps_file)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
