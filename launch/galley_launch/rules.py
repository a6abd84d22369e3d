"""The one table of combinations that are known to be wrong, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galley.errors import UserError
from galley_launch.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """What the rules look at: the recipe, the device, and the DeepSpeed configuration as the user wrote it."""

    recipe: Recipe
    device: str
    deepspeed: dict[str, Any]

    def zero(self, key: str) -> Any:
        """A value of the ``zero_optimization`` block."""
        return self.block("zero_optimization").get(key)

    @property
    def stage(self) -> Any:
        """ZeRO stage."""
        return self.zero("stage") or 0

    def offload(self, what: str) -> str:
        """Where ``param`` or ``optimizer`` is offloaded to: ``none``, ``cpu`` or ``nvme``."""
        return str(self.option(f"offload_{what}", "device") or "none")

    def option(self, block: str, key: str) -> Any:
        """A value of a block inside ``zero_optimization``; None where there is none."""
        inside = self.zero(block)
        return inside.get(key) if isinstance(inside, dict) else None

    def on(self, block: str) -> bool:
        """Whether a top-level block of the configuration is switched on."""
        return self.block(block).get("enabled") is True

    def block(self, name: str) -> dict[str, Any]:
        """A top-level block of the configuration; empty where there is none."""
        block = self.deepspeed.get(name)
        return block if isinstance(block, dict) else {}


@dataclass(frozen=True)
class Rule:
    """A combination that is refused."""

    where: str
    broken: Callable[[Case], bool]
    what: str
    todo: str


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).expanduser().exists()


RULES = (
    # Precision
    Rule(
        "deepspeed fp16",
        lambda case: case.on("fp16") and case.device == "cpu",
        "fp16 does not train on the CPU (DeepSpeed refuses it)",
        "use model.dtype=bfloat16 or float32",
    ),
    Rule(
        "deepspeed fp16",
        lambda case: case.on("fp16"),
        "fp16 is not trained in: its range needs loss scaling, which changes results from run to run",
        "use model.dtype=bfloat16 or float32",
    ),
    Rule(
        "optimizer.grad_dtype",
        lambda case: case.recipe.optimizer.grad_dtype == "bfloat16" and case.recipe.model.dtype == "float32",
        "bfloat16 gradients of a float32 model lose what float32 is there for",
        "use optimizer.grad_dtype=float32, or model.dtype=bfloat16",
    ),
    Rule(
        "optimizer.grad_dtype",
        lambda case: case.recipe.optimizer.grad_dtype == "bfloat16" and case.stage == 0,
        "ZeRO-0 always accumulates gradients in float32",
        "use optimizer.grad_dtype=float32, or deepspeed=zero1",
    ),
    Rule(
        "deepspeed bf16",
        lambda case: bool(case.block("bf16").get("bf16_master_weights_and_grads")),
        "bf16 master weights lose small updates; optimizer state is always float32 here",
        "take bf16_master_weights_and_grads out",
    ),
    Rule(
        "deepspeed amp",
        lambda case: case.on("amp"),
        "apex amp is not used",
        "take the amp block out; model.dtype says the precision",
    ),
    # ZeRO and offload
    Rule(
        "deepspeed offload_param",
        lambda case: case.offload("param") != "none" and case.stage != 3,
        "parameters can only be offloaded where they are sharded: in ZeRO-3",
        "set zero_optimization.stage 3, or take offload_param out",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: case.offload("optimizer") != "none" and case.stage == 0,
        "optimizer state can only be offloaded where it is sharded: in ZeRO-1, 2 or 3",
        "set zero_optimization.stage 2, or take offload_optimizer out",
    ),
    Rule(
        "deepspeed offload",
        lambda case: "nvme" in (case.offload("param"), case.offload("optimizer")),
        "offloading to NVMe is not supported yet",
        "use device cpu (deepspeed=zero3_offload_cpu)",
    ),
    Rule(
        "deepspeed zero_quantized",
        lambda case: (
            case.device == "cpu"
            and any(case.zero(f"zero_quantized_{what}") for what in ("weights", "gradients", "nontrainable_weights"))
        ),
        "ZeRO++ quantisation is not implemented for the CPU",
        "take zero_quantized_* out, or train on GPUs",
    ),
    Rule(
        "method.kind qlora",
        lambda case: (
            case.recipe.method.kind == "qlora"
            and any(case.zero(f"zero_quantized_{what}") for what in ("weights", "nontrainable_weights"))
        ),
        "the base is NF4 already, and ZeRO++ would quantise its packed bytes as if they were numbers",
        "take zero_quantized_weights out, or use method.kind=lora",
    ),
    Rule(
        "deepspeed zero_hpz_partition_size",
        lambda case: case.zero("zero_hpz_partition_size") not in (None, 0, 1, "auto"),
        "a second partition inside each node (ZeRO++ hpZ) is not supported yet",
        "take zero_hpz_partition_size out",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: case.option("offload_optimizer", "ratio") not in (None, 1, "auto"),
        "with a ratio below 1 DeepSpeed makes a second optimizer, whose state no checkpoint would hold",
        "take ratio out",
    ),
    Rule(
        "deepspeed zenflow",
        lambda case: case.zero("zenflow") is not None,
        "ZenFlow steps most parameters with old gradients, and keeps state that no checkpoint would hold",
        "take the zenflow block out",
    ),
    Rule(
        "deepspeed compute_grad_norm",
        lambda case: case.zero("compute_grad_norm") not in (None, True, "auto"),
        "without the norm of the gradients nothing is clipped, and none is logged",
        "take compute_grad_norm out",
    ),
    # Parts of DeepSpeed that another part of Galley does, or that its loop does not drive
    Rule(
        "deepspeed gradient_allreduce_op",
        lambda case: str(case.deepspeed.get("gradient_allreduce_op") or "mean").lower() not in ("mean", "auto"),
        "the loss is scaled for gradients that are averaged over the ranks",
        'take gradient_allreduce_op out, or write "mean"',
    ),
    Rule(
        "deepspeed managed_gradient_accumulation",
        lambda case: case.deepspeed.get("managed_gradient_accumulation") not in (None, True, "auto"),
        "the loop leaves it to DeepSpeed to tell where a step's last micro-batch is",
        "take managed_gradient_accumulation out",
    ),
    Rule(
        "deepspeed tensor_parallel",
        lambda case: case.block("tensor_parallel").get("autotp_size") not in (None, 0, 1, "auto"),
        "tensor parallelism is not supported yet",
        "take the tensor_parallel block out",
    ),
    Rule(
        "deepspeed sequence_parallel_size",
        lambda case: case.deepspeed.get("sequence_parallel_size") not in (None, 1, "auto"),
        "sequence parallelism is not supported yet",
        "take sequence_parallel_size out",
    ),
    Rule(
        "deepspeed data_efficiency",
        lambda case: case.on("data_efficiency"),
        "the order of data is settled by the recipe's seed, not by DeepSpeed",
        "take data_efficiency out",
    ),
    Rule(
        "deepspeed autotuning",
        lambda case: case.on("autotuning") or case.on("hybrid_engine") or case.on("expert_parallel"),
        "autotuning, hybrid_engine and expert_parallel are not driven by this loop",
        "take those blocks out",
    ),
    Rule(
        "deepspeed compression_training",
        lambda case: bool(case.deepspeed.get("compression_training") or case.deepspeed.get("weight_quantization")),
        "DeepSpeed's compression is not driven by this loop",
        "take the block out; method.kind=qlora trains on quantised weights",
    ),
    # The recipe with itself
    Rule(
        "model.attention",
        lambda case: case.device == "cpu" and case.recipe.model.attention.startswith("flash"),
        "flash attention needs a GPU",
        "use model.attention=sdpa",
    ),
    Rule(
        "model.attention",
        lambda case: case.recipe.model.attention.startswith("flash") and case.recipe.model.dtype == "float32",
        "flash attention does not compute in float32",
        "use model.dtype=bfloat16, or model.attention=sdpa",
    ),
    # transformers reads flash attention's document borders off position_ids, and only of one row: _is_packed_sequence.
    Rule(
        "model.attention",
        lambda case: (
            case.recipe.model.attention.startswith("flash") and case.recipe.data.packing and case.recipe.micro_batch > 1
        ),
        "transformers' flash attention tells packed documents apart only at micro_batch 1: they would see each other",
        "use micro_batch=1 (a packed sample is full already), or model.attention=sdpa",
    ),
    Rule(
        "data.held_out",
        lambda case: case.recipe.data.held_out > 0 and case.recipe.data.held_out_path is not None,
        "held_out and held_out_path are two answers to one question",
        "keep one of them",
    ),
    Rule(
        "duration.patience",
        lambda case: (
            bool(case.recipe.duration.patience) and not (case.recipe.data.held_out or case.recipe.data.held_out_path)
        ),
        "stopping early needs a held-out loss, and no rows are held out",
        "set data.held_out=0.05, or data.held_out_path",
    ),
    Rule(
        "duration.patience",
        lambda case: bool(case.recipe.duration.patience) and case.recipe.cadence.eval_every is None,
        "stopping early needs evaluations along the way",
        "set cadence.eval_every",
    ),
    Rule(
        "model.revision",
        lambda case: case.recipe.model.revision is not None and _is_local(case.recipe.model.path),
        "a revision is for hub models, and model.path is a local one",
        "take it out",
    ),
    Rule(
        "data.revision",
        lambda case: case.recipe.data.revision is not None and _is_local(case.recipe.data.path),
        "a revision is for hub data sets, and data.path is a local file",
        "take it out",
    ),
)


def check(case: Case) -> None:
    """Raise ``UserError`` with the reason for the first rule that ``case`` breaks."""
    for rule in RULES:
        if rule.broken(case):
            raise UserError(rule.where, rule.what, rule.todo)
