"""The one table of combinations that are known to be wrong, each with its reason."""

from __future__ import annotations

from galley.errors import UserError
from galley_launch.recipe_rules import RECIPE_RULES
from galley_launch.rule import Case, Rule

__all__ = ["Case", "check"]

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
        "use deepspeed=zero1, or model.dtype=bfloat16",
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
        "take fp16_master_weights_and_grads out",
    ),
    Rule(
        "deepspeed fp16",
        lambda case: case.block("fp16").get("loss_scale") not in (None, 0, "auto"),
        "with a fixed loss_scale every overflow would be the run's end",
        "take loss_scale out: it adapts",
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
        "deepspeed offload_param",
        lambda case: case.offload("param") == "nvme",
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
        "take pipeline_read and pipeline_write out",
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
        lambda case: case.zero("zero_hpz_partition_size") not in (None, 0, 1) and case.stage != 3,
        "there is a second partition inside each node (ZeRO++ hpZ) only where weights are sharded: in ZeRO-3",
        "set zero_optimization.stage 3, or take zero_hpz_partition_size out",
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
    *RECIPE_RULES,
)


def check(case: Case) -> None:
    """Raise ``UserError`` with the reason for the first rule that ``case`` breaks."""
    for rule in RULES:
        if rule.broken(case):
            raise UserError(rule.where, rule.what, rule.todo)
