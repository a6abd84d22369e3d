"""The one table of combinations that are known to be wrong, each with its reason.

Every rule that is broken is reported, so their order only decides the order in the message.
"""

from __future__ import annotations

from galley_launch.base.problems import Problem
from galley_launch.recipe.recipe_rules import RECIPE_RULES
from galley_launch.recipe.rule import Case, Rule

__all__ = ["Case", "broken"]

RULES = (
    # Precision
    Rule(
        "model.dtype",
        lambda case: case.recipe.model.dtype == "float16" and case.device == "cpu",
        "fp16 does not train on the CPU (DeepSpeed refuses it)",
        "use model.dtype=bfloat16 or float32",
    ),
    Rule(
        "model.dtype",
        lambda case: case.recipe.model.dtype == "float16" and case.stage == 0,
        "fp16 needs fp32 copies of the weights and scaled losses, which ZeRO-0 has not",
        "set zero_optimization.stage 1 (deepspeed=zero1), or model.dtype=bfloat16",
    ),
    Rule(
        "optimizer.grad_dtype",
        lambda case: case.recipe.optimizer.grad_dtype == "bfloat16" and case.recipe.model.dtype == "float16",
        "bfloat16 gradients of a float16 model lose half of its digits",
        "use optimizer.grad_dtype=float32",
    ),
    Rule(
        "deepspeed fp16",
        lambda case: bool(case.block("fp16").get("fp16_master_weights_and_grads")),
        "fp16 master weights lose small updates; optimizer state is always float32 here",
        "remove fp16_master_weights_and_grads",
    ),
    Rule(
        "deepspeed fp16",
        lambda case: case.block("fp16").get("loss_scale") not in (None, 0, "auto"),
        "with a fixed loss_scale every overflow would end the run",
        "remove loss_scale: it adapts",
    ),
    Rule(
        "optimizer.grad_dtype",
        lambda case: case.recipe.optimizer.grad_dtype == "bfloat16" and case.recipe.model.dtype == "float32",
        "bfloat16 gradients of a float32 model lose the precision that float32 is used for",
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
        "remove bf16_master_weights_and_grads",
    ),
    # ZeRO and offload. Stages: 1 shards optimizer state, 2 gradients too, 3 parameters too.
    Rule(
        "deepspeed offload_param",
        lambda case: case.offload("param") != "none" and case.stage != 3,
        "parameters can only be offloaded where they are sharded: in ZeRO-3",
        "set zero_optimization.stage 3, or remove offload_param",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: case.offload("optimizer") != "none" and case.stage == 0,
        "optimizer state can only be offloaded where it is sharded: in ZeRO-1, 2 or 3",
        "set zero_optimization.stage 2, or remove offload_optimizer",
    ),
    Rule(
        "deepspeed offload_param",
        lambda case: case.offload("param") == "nvme",
        # For bf16 weights (2 bytes each): fp32 copy and two moments, 3 x 4 bytes, are six times as much.
        "only the optimizer's state, six times their size, can be offloaded to NVMe",
        "use device cpu there (deepspeed=zero3_offload_nvme)",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: case.offload("optimizer") == "nvme" and case.stage != 3,
        "optimizer state can only be offloaded to NVMe in ZeRO-3",
        "use deepspeed=zero3_offload_nvme, or device cpu",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: (
            # 4 is DeepSpeed's default (runtime/zero/offload_config.py), and what AdamW needs.
            case.offload("optimizer") == "nvme" and (case.option("offload_optimizer", "buffer_count") or 4) < 4
        ),
        "swapping a weight, its two moments and its gradient takes four buffers",
        "set buffer_count 4",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: any(
            case.option("offload_optimizer", f"pipeline_{way}") not in (None, False, "auto")
            for way in ("read", "write")
        ),
        "pipelined swapping gives no access to state that a checkpoint needs",
        "remove pipeline_read and pipeline_write",
    ),
    Rule(
        "deepspeed zero_quantized",
        lambda case: (
            case.device == "cpu"
            and any(case.zero(f"zero_quantized_{what}") for what in ("weights", "gradients", "nontrainable_weights"))
        ),
        "ZeRO++ quantisation is not implemented for the CPU",
        "remove zero_quantized_*, or train on GPUs",
    ),
    Rule(
        "method.kind qlora",
        lambda case: (
            case.recipe.method.kind == "qlora"
            and any(case.zero(f"zero_quantized_{what}") for what in ("weights", "nontrainable_weights"))
        ),
        "the base is NF4 already, and ZeRO++ would quantise its packed bytes as if they were numbers",
        "remove zero_quantized_weights, or use method.kind=lora",
    ),
    Rule(
        "deepspeed zero_hpz_partition_size",
        lambda case: case.zero("zero_hpz_partition_size") not in (None, 0, 1) and case.stage != 3,
        "there is a second partition inside each node (ZeRO++ hpZ) only where weights are sharded: in ZeRO-3",
        "set zero_optimization.stage 3, or remove zero_hpz_partition_size",
    ),
    Rule(
        "deepspeed offload_optimizer",
        lambda case: case.option("offload_optimizer", "ratio") not in (None, 1, "auto"),
        "with a ratio below 1 DeepSpeed makes a second optimizer, whose state no checkpoint would hold",
        "remove ratio",
    ),
    Rule(
        "deepspeed zenflow",
        lambda case: case.zero("zenflow") is not None,
        "ZenFlow steps most parameters with old gradients, and keeps state that no checkpoint would hold",
        "remove the zenflow block",
    ),
    Rule(
        "deepspeed compute_grad_norm",
        lambda case: case.zero("compute_grad_norm") not in (None, True, "auto"),
        "without the norm of the gradients nothing is clipped, and none is logged",
        "remove compute_grad_norm",
    ),
    Rule(
        "deepspeed super_offload",
        lambda case: case.option("offload_optimizer", "super_offload") is True,
        "SuperOffload keeps its state in another process, out of a checkpoint's reach",
        "remove super_offload",
    ),
    Rule(
        "deepspeed legacy_stage1",
        lambda case: case.zero("legacy_stage1") is True,
        "DeepSpeed has had no such stage since 0.5.9",
        "remove legacy_stage1",
    ),
    # Combinations at which every rank would stop, by an assertion in DeepSpeed's stage_1_and_2.py or stage3.py.
    Rule(
        "deepspeed prescale_gradients",
        lambda case: (
            case.stage in (2, 3)
            and case.zero("reduce_scatter") is not False
            and (case.deepspeed.get("prescale_gradients") is True or case.predivides)
        ),
        "gradients are not scaled before they are reduced where ZeRO-2 and 3 scatter them",
        "remove prescale_gradients and gradient_predivide_factor, or set zero_optimization.reduce_scatter false",
    ),
    Rule(
        "deepspeed zero_quantized_gradients",
        lambda case: bool(case.zero("zero_quantized_gradients")) and case.zero("reduce_scatter") is False,
        "quantised gradients are only reduced by scattering them",
        "remove reduce_scatter",
    ),
    Rule(
        "deepspeed communication_data_type",
        lambda case: case.deepspeed.get("communication_data_type") == "fp16" and case.recipe.model.dtype != "float16",
        "gradients that fp16 cannot hold would be reduced as infinities",
        "write fp32 or bf16, or remove communication_data_type",
    ),
    Rule(
        "deepspeed aio",
        lambda case: case.block("aio").get("use_gds") is True and case.device == "cpu",
        "GPUDirect Storage is between a disk and a GPU",
        "remove use_gds",
    ),
    *RECIPE_RULES,
)


def broken(case: Case) -> list[Problem]:
    """Every rule that ``case`` breaks, with its reason."""
    return [Problem(rule.what, rule.todo, rule.where) for rule in RULES if rule.broken(case)]
