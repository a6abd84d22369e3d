"""What becomes of each top-level key of a DeepSpeed JSON: one table, so that no key is ignored in silence.

``recipe``: the recipe has a key for it, and the two are compared. ``kept``: DeepSpeed gets the value unchanged.
``left out``: it does nothing here, or another part of Galley does it; a note tells the user where it is switched on.
``refused``: an error where it is switched on, for training would differ from what the file asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from galley_launch.base.problems import Findings, Problem, shown
from galley_launch.deepspeed.keys import is_on


@dataclass(frozen=True)
class Outcome:
    """What becomes of one key."""

    what: Literal["recipe", "kept", "left out", "refused"]
    reason: str = ""
    todo: str = "remove it"
    on: Callable[[Any], bool] = is_on
    """Whether a value switches the key on."""
    quiet: bool = True
    """Whether there is no note about a block that is not switched on."""


def _never(_: Any) -> bool:
    return False


def _above_one(value: Any) -> bool:
    return value not in (None, 0, 1, "auto")


def _inside(key: str, on: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and on(value.get(key))


def _unlike(**defaults: Any) -> Callable[[Any], bool]:
    """A test that holds for a block in which anything has another value than these, which are DeepSpeed's defaults."""
    return lambda block: (
        isinstance(block, dict)
        and any(value not in (defaults.get(key), None, "auto") and is_on(value) for key, value in block.items())
    )


_RECIPE = Outcome("recipe")
_KEPT = Outcome("kept")
_TRACKERS = "TensorBoard files are always written to the run's tensorboard/"

OUTCOMES: dict[str, Outcome] = {
    "train_batch_size": _RECIPE,
    "train_micro_batch_size_per_gpu": _RECIPE,
    "gradient_accumulation_steps": _RECIPE,
    "gradient_clipping": _RECIPE,
    "optimizer": _RECIPE,
    "scheduler": _RECIPE,
    "fp16": _RECIPE,
    "bf16": _RECIPE,
    "torch_autocast": _RECIPE,
    "data_types": _RECIPE,
    "zero_optimization": _KEPT,
    "aio": _KEPT,
    "communication_data_type": _KEPT,
    "prescale_gradients": _KEPT,
    "gradient_predivide_factor": _KEPT,
    "disable_python_gc": _KEPT,
    "dump_state": _KEPT,
    "log_level": _KEPT,
    "memory_breakdown": _KEPT,
    "steps_per_print": _KEPT,
    "timers": _KEPT,
    "wall_clock_breakdown": _KEPT,
    "comms_logger": _KEPT,
    "zero_force_ds_cpu_optimizer": Outcome("left out", on=_never),  # the loop uses DeepSpeed's own CPU optimizer
    "zero_allow_untested_optimizer": Outcome("left out", on=_never),  # settled by the optimizer's name
    "vocabulary_size": Outcome("left out", on=_never),  # DeepSpeed warns of it, and does no more
    "activation_checkpointing": Outcome(
        "left out",
        "only models that call DeepSpeed's own checkpointing use it; activation_checkpointing=true recomputes here",
    ),
    "autotuning": Outcome("refused", "no tuner drives this loop"),
    "checkpoint": Outcome(
        "left out",
        "a run's checkpoints are Galley's own",
        on=_unlike(checkpoint_serialization=True, tag_validation="Warn"),
    ),
    "comet": Outcome("left out", "Comet is not written to; tracking.wandb and tracking.mlflow are"),
    "compile": Outcome(
        "refused",
        "DeepCompile is not driven by this loop",
        "remove it; compile=true compiles each layer",
        on=_unlike(
            double_buffer=True,
            keep_int_input_tensors=True,
            offload_activation_pin_memory=True,
            free_activation_threshold=10 << 20,  # bytes
        ),
    ),
    "csv_monitor": Outcome("left out", "metrics.jsonl has every step"),
    "data_efficiency": Outcome(
        "refused",
        "the order of data is settled by the recipe's seed, not by DeepSpeed",
    ),
    "dataloader_drop_last": Outcome("left out", "the recipe's batches are dealt by Galley"),
    "datastates_ckpt": Outcome("left out", "a run's checkpoints are Galley's own", on=lambda value: value is not False),
    "disable_allgather": Outcome("left out", "DeepSpeed reads it, and uses it nowhere"),
    "expert_parallel": Outcome("refused", "expert parallelism is not driven by this loop"),
    "flops_profiler": Outcome("left out", "profile=3 writes a trace, and a table of where time and memory went"),
    "gradient_allreduce_op": Outcome(
        "refused",
        "the loss is scaled for gradients that are averaged over the ranks",
        'remove it, or write "mean"',
        on=lambda value: str(value or "mean").lower() not in ("mean", "auto"),
    ),
    "hybrid_engine": Outcome("refused", "generation between steps is not driven by this loop"),
    "managed_gradient_accumulation": Outcome(
        "refused",
        "the loop leaves it to DeepSpeed to tell where a step's last micro-batch is",
        on=lambda value: value is False,
    ),
    "pipeline": Outcome(
        "refused",
        "pipeline parallelism is not supported",
        on=_inside("stages", lambda value: isinstance(value, int) and value > 1),
        quiet=False,
    ),
    "seq_parallel_communication_data_type": Outcome("left out", on=_never),
    "sequence_parallel_size": Outcome("refused", "sequence parallelism is not supported yet", on=_above_one),
    "tensor_parallel": Outcome(
        "refused",
        "tensor parallelism is not supported yet",
        on=lambda block: (
            _inside("autotp_size", _above_one)(block) or _inside("tp", _inside("tp_size", _above_one))(block)
        ),
    ),
    "tensorboard": Outcome("left out", _TRACKERS),
    "use_data_before_expert_parallelism": Outcome("left out", "there is no expert parallelism"),
    "wandb": Outcome("left out", "set tracking.wandb.project=NAME, which survives what ends an attempt"),
    "weight_quantization": Outcome(
        "refused",
        "DeepSpeed's compression is not driven by this loop",
        "remove it; method.kind=qlora trains on quantised weights",
        on=lambda value: isinstance(value, dict) and value.get("enabled") is not False,
    ),
}


def sort_out(config: dict[str, Any], findings: Findings) -> dict[str, Any]:
    """``config`` without what is left out or refused; notes and problems go to ``findings``."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        outcome = OUTCOMES[key]  # there is one for each key that DeepSpeed knows; a test holds the two lists together
        if outcome.what in ("recipe", "kept"):
            kept[key] = value
        elif outcome.on(value) and outcome.what == "left out":
            findings.notes.append(f"{key} is left out: {outcome.reason}")
        elif outcome.on(value):
            brief = f"{key} {shown(value)}" if not isinstance(value, dict) else key
            findings.problems.append(Problem(f"{brief}: {outcome.reason}", outcome.todo))
        elif not outcome.quiet and is_on(value):
            findings.notes.append(f"{key} is left out: {outcome.reason}")
    return kept
