"""Combinations of a recipe with itself, and with the device and ZeRO stage, that are known to be wrong."""

from __future__ import annotations

from pathlib import Path

from galley_launch.recipe.rule import Rule

_EXPERTS = "all-linear+experts"
_GPU_ATTENTION = ("flash", "varlen")


def _is_local(path: str) -> bool:
    """Whether ``path`` is a file or a folder of this machine, or is written as one; else it is a hub id."""
    return path.startswith((".", "/", "~")) or Path(path).expanduser().exists()


RECIPE_RULES = (
    # The optimizer
    Rule(
        "optimizer.name",
        lambda case: case.recipe.optimizer.name != "adamw" and case.offload("optimizer") != "none",
        "DeepSpeed steps offloaded state with AdamW only",
        "use optimizer.name=adamw, or remove offload_optimizer",
    ),
    Rule(
        "optimizer.name",
        lambda case: case.recipe.optimizer.name.startswith("paged") and case.device == "cpu",
        "paging is between a GPU and its host",
        "use optimizer.name=adamw_8bit",
    ),
    # The method. An adapter is added to frozen weights of the base; with method.kind=full there is none.
    Rule(
        "method.dora",
        lambda case: case.recipe.method.dora and case.stage == 3,
        "peft's DoRA reads whole weights of the base in each forward pass, which ZeRO-3 has sharded",
        "use deepspeed=zero2, or method.dora=false",
    ),
    Rule(
        "method.kind lora_int8",
        lambda case: case.recipe.method.kind == "lora_int8" and case.stage == 3,
        "ZeRO-3 shards int8 weights without their scales, and training silently goes wrong",
        "use deepspeed=zero2, or method.kind=qlora",
    ),
    Rule(
        "method.dora",
        lambda case: case.recipe.method.dora and case.recipe.method.kind == "lora_int8",
        "peft's DoRA loses the scales of int8 weights",
        "use method.kind=qlora, or method.dora=false",
    ),
    Rule(
        "method.init",
        lambda case: (
            case.recipe.method.init == "pissa"
            and (case.recipe.method.kind != "lora" or case.recipe.method.dora or case.recipe.method.targets == _EXPERTS)
        ),
        "PiSSA takes the adapter's beginning out of linear layers' own weights: not of quantised ones, nor with DoRA, "
        "nor of fused experts",
        "use method.init=zero, or method.kind=lora with targets=all-linear",
    ),
    Rule(
        "method.targets",
        lambda case: (
            case.recipe.method.targets == _EXPERTS and (case.recipe.method.dora or case.recipe.method.dropout > 0)
        ),
        "on the experts' weights peft knows neither DoRA nor dropout",
        "use method.dora=false method.dropout=0, or method.targets=all-linear",
    ),
    Rule(
        "method.freeze",
        lambda case: bool(case.recipe.method.freeze) and case.recipe.method.kind != "full",
        "an adapter's base is frozen already",
        "remove method.freeze, or use method.kind=full",
    ),
    Rule(
        "method.full_modules",
        lambda case: bool(case.recipe.method.full_modules) and case.recipe.method.kind == "full",
        "with method.kind=full every module is trained in full",
        "remove method.full_modules",
    ),
    Rule(
        "method.kind full",
        lambda case: case.recipe.method.kind == "full" and (case.recipe.method.rslora or case.recipe.method.dora),
        "has no adapter for rslora or dora to change",
        "remove them, or use method.kind=lora",
    ),
    Rule(
        "compile",
        lambda case: case.recipe.compile and case.stage == 3,
        "ZeRO-3 gathers and releases weights inside what would be compiled",
        "use deepspeed=zero2, or compile=false",
    ),
    Rule(
        "liger",
        lambda case: case.recipe.liger and case.device == "cpu",
        "Liger's kernels are Triton's, which are for GPUs",
        "use liger=false",
    ),
    # The recipe with itself
    Rule(
        "data.overlong",
        lambda case: case.recipe.data.overlong == "split" and case.recipe.data.format != "text",
        "split cuts plain text; half a conversation would be trained on without its beginning",
        "use data.overlong=drop, truncate or truncate_left",
    ),
    Rule(
        "data.learn",
        lambda case: case.recipe.data.learn not in ("assistant", "all") and case.recipe.data.format == "text",
        "plain text has no last answer and no roles; every token of it is trained on",
        "remove it",
    ),
    Rule(
        "model.chat_template",
        lambda case: case.recipe.data.format == "text" and case.recipe.model.chat_template is not None,
        "plain text goes through no template",
        "remove it, or use data.format=auto",
    ),
    Rule(
        "model.attention",
        lambda case: case.device == "cpu" and case.recipe.model.attention.startswith(_GPU_ATTENTION),
        "flash attention and varlen need a GPU",
        "use model.attention=sdpa",
    ),
    Rule(
        "model.attention",
        lambda case: case.recipe.model.attention.startswith(_GPU_ATTENTION) and case.recipe.model.dtype == "float32",
        "flash attention and varlen do not compute in float32",
        "use model.dtype=bfloat16, or model.attention=sdpa",
    ),
    # transformers takes the borders of packed documents from position_ids (they begin again at 0), but only for a batch
    # of one row: _is_packed_sequence in its modeling_flash_attention_utils.py.
    Rule(
        "model.attention",
        lambda case: (
            case.recipe.model.attention.startswith("flash") and case.recipe.data.packing and case.recipe.micro_batch > 1
        ),
        "transformers' flash attention tells packed documents apart only at micro_batch 1: they would see each other",
        "use micro_batch=1 (a packed sample is full already), or model.attention=varlen or sdpa",
    ),
    Rule(
        "schedule.decay",
        lambda case: (
            # warm-up, stable, decay: both are shares of the run
            case.recipe.schedule.kind == "wsd" and case.recipe.schedule.warmup + case.recipe.schedule.decay > 1
        ),
        "the warm-up and the decay together are longer than the run",
        "make schedule.warmup + schedule.decay at most 1",
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
        "remove it",
    ),
    Rule(
        "data.revision",
        lambda case: case.recipe.data.revision is not None and _is_local(case.recipe.data.path or ""),
        "a revision is for hub data sets, and data.path is a local file",
        "remove it",
    ),
)
