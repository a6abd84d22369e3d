"""A hundred DeepSpeed JSONs in the style of those that people have, each with its right outcome.

Written for these tests, after the habits of trainers' examples, of DeepSpeed's own and of files that were passed on for
years. All are planned with a recipe of 16 samples a step, micro-batch 2, AdamW 5e-4 with betas 0.9 and 0.95, no decay,
clip 1, cosine with 3 % warm-up, two epochs, bfloat16, on one GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

ACCEPTED, DIFFERS, OFF, REFUSED = "accepted", "differs", "off", "refused"


@dataclass(frozen=True)
class World:
    """One file."""

    name: str
    text: str
    outcome: str
    """``accepted`` at the first plan; ``differs``: told at once, and accepted with ``take=``; ``off``: removed features
    that are off, accepted with ``take=`` too; ``refused`` until the file is changed."""
    says: tuple[str, ...] = ()
    """What the plan says: in notes where it is accepted, else in the refusal."""
    words: tuple[str, ...] = ()
    """Words of the command line."""


def _z(stage: Any, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def _adamw(kind: str = "AdamW", **params: Any) -> dict[str, Any]:
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    return {"optimizer": {"type": kind, "params": auto | params}}


def _schedule(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


AUTOS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1}  # fmt: skip
BF16 = {"bf16": {"enabled": "auto"}}
WARM = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
Z3 = {
    "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
CPU = {"device": "cpu", "pin_memory": True}
TRAINER2 = (
    AUTOS
    | {"fp16": FP16}
    | BF16
    | _z(
        2,
        allgather_partitions=True,
        allgather_bucket_size=2e8,
        overlap_comm=True,
        reduce_scatter=True,
        reduce_bucket_size=2e8,
        contiguous_gradients=True,
    )
)
TRAINER3 = AUTOS | {"fp16": FP16} | BF16 | _z(3, **Z3)


def _w(name: str, config: dict[str, Any] | str, outcome: str, *says: str, words: tuple[str, ...] = ()) -> World:
    return World(name, config if isinstance(config, str) else json.dumps(config, indent=2), outcome, says, words)


_PLAIN = [
    _w("trainer zero2", TRAINER2, ACCEPTED),
    _w("trainer zero3", TRAINER3, ACCEPTED),
    _w(
        "trainer zero3, everything offloaded",
        TRAINER3 | _z(3, **Z3, offload_optimizer=CPU, offload_param=CPU),
        ACCEPTED,
    ),
    _w(
        "trainer zero2, optimizer offloaded",
        TRAINER2 | _z(2, offload_optimizer=CPU, round_robin_gradients=True),
        ACCEPTED,
    ),
    _w("trainer zero1", AUTOS | BF16 | _z(1, reduce_bucket_size=5e8, overlap_comm=False), ACCEPTED),
    _w("trainer zero0", AUTOS | BF16 | _z(0, allgather_partitions=True, round_robin_gradients=True), ACCEPTED),
    _w(
        "stages on, as first releases had it",
        AUTOS | BF16 | {"zero_optimization": True},
        ACCEPTED,
        "true is read as stage 1",
    ),
    _w("stages off", AUTOS | {"zero_optimization": False}, ACCEPTED, "false is read as stage 0"),
    _w("AdamW all auto", TRAINER2 | _adamw(), ACCEPTED),
    _w("AdamW with torch_adam", TRAINER2 | _adamw(torch_adam=True, adam_w_mode=True), ACCEPTED),
    _w("Adam is AdamW", TRAINER2 | _adamw("Adam"), ACCEPTED),
    _w("untested optimizers allowed", TRAINER2 | {"zero_allow_untested_optimizer": True}, ACCEPTED),
    _w("cpu optimizer not forced", TRAINER2 | {"zero_force_ds_cpu_optimizer": False}, ACCEPTED),
    _w("steps_per_print and breakdown", TRAINER2 | {"steps_per_print": 2000, "wall_clock_breakdown": False}, ACCEPTED),
    _w("steps_per_print infinite", json.dumps(TRAINER2 | {"steps_per_print": float("inf")}), ACCEPTED),
    _w("steps_per_print auto", TRAINER2 | {"steps_per_print": "auto"}, ACCEPTED),
    _w(
        "bfloat16",
        AUTOS | {"bfloat16": {"enabled": True}} | _z(2),
        ACCEPTED,
        "read under today's names: bfloat16 as bf16",
    ),
    _w(
        "cpu_offload", AUTOS | BF16 | _z(2, cpu_offload=True), ACCEPTED, "cpu_offload true is read as offload_optimizer"
    ),
    _w("cpu_offload off", AUTOS | BF16 | _z(2, cpu_offload=False), ACCEPTED),
    _w(
        "cpu_offload of everything",
        AUTOS | BF16 | _z(3, cpu_offload=True, cpu_offload_params=True),
        ACCEPTED,
        "cpu_offload true is read as offload_optimizer",
        "cpu_offload_params true is read as offload_param",
    ),
    _w(
        "cpu_offload pinned",
        AUTOS | BF16 | _z(2, cpu_offload=True, cpu_offload_use_pin_memory=True),
        ACCEPTED,
        "cpu_offload_use_pin_memory is ignored",
    ),
    _w(
        "names of fields",
        AUTOS
        | BF16
        | _z(
            3,
            max_live_parameters=1e9,
            max_reuse_distance=1e9,
            prefetch_bucket_size=5e7,
            param_persistence_threshold=1e5,
            gather_16bit_weights_on_model_save=True,
        ),
        ACCEPTED,
        "max_live_parameters as stage3_max_live_parameters",
    ),
    _w(
        "gather_fp16",
        AUTOS | BF16 | _z(3, stage3_gather_fp16_weights_on_model_save=True),
        ACCEPTED,
        "stage3_gather_fp16_weights_on_model_save as stage3_gather_16bit_weights_on_model_save",
    ),
    _w("gather auto", AUTOS | BF16 | _z(3, stage3_gather_16bit_weights_on_model_save="auto"), ACCEPTED),
    _w(
        "stage 3 sizes auto under stage 2",
        AUTOS
        | BF16
        | _z(
            2,
            stage3_prefetch_bucket_size="auto",
            sub_group_size="auto",
            stage3_max_live_parameters="auto",
            allgather_bucket_size="auto",
            zero_hpz_partition_size="auto",
        ),
        ACCEPTED,
    ),
    _w("sizes as strings of digits", AUTOS | BF16 | _z(2, reduce_bucket_size="500000000"), ACCEPTED),
    _w(
        "offload to none",
        AUTOS | BF16 | _z(2, offload_optimizer={"device": "none"}, offload_param={"device": "none"}),
        ACCEPTED,
    ),
    _w("offload null", AUTOS | BF16 | _z(3, offload_optimizer=None, offload_param=None), ACCEPTED),
    _w("ZeRO++ hpZ", AUTOS | BF16 | _z(3, zero_hpz_partition_size="auto", **Z3), ACCEPTED),
    _w(
        "aio",
        AUTOS | BF16 | _z(3) | {"aio": {"block_size": 262144, "queue_depth": 32, "single_submit": False}},
        ACCEPTED,
    ),
    _w("communication in fp32", AUTOS | BF16 | _z(2) | {"communication_data_type": "fp32"}, ACCEPTED),
    _w("communication auto", AUTOS | BF16 | _z(2) | {"communication_data_type": "auto"}, ACCEPTED),
    _w("gradients in fp32", AUTOS | BF16 | _z(2) | {"data_types": {"grad_accum_dtype": "fp32"}}, ACCEPTED),
    _w(
        "not prescaled",
        AUTOS | BF16 | _z(2) | {"prescale_gradients": False, "gradient_predivide_factor": 1.0},
        ACCEPTED,
    ),
    _w(
        "activation checkpointing",
        TRAINER2
        | {
            "activation_checkpointing": {
                "partition_activations": True,
                "cpu_checkpointing": True,
                "number_checkpoints": None,
            }
        },
        ACCEPTED,
        "activation_checkpointing is left out: only",
    ),
    _w(
        "activation checkpointing off",
        TRAINER2 | {"activation_checkpointing": {"partition_activations": False}},
        ACCEPTED,
    ),
    _w(
        "flops profiler",
        TRAINER2 | {"flops_profiler": {"enabled": True, "profile_step": 10}},
        ACCEPTED,
        "flops_profiler is left out: profile=3",
    ),
    _w("flops profiler off", TRAINER2 | {"flops_profiler": {"enabled": False, "detailed": True}}, ACCEPTED),
    _w(
        "monitors",
        TRAINER2
        | {
            "tensorboard": {"enabled": True, "output_path": "tb", "job_name": "x"},
            "wandb": {"enabled": True, "project": "p"},
            "csv_monitor": {"enabled": False},
        },
        ACCEPTED,
        "tensorboard is left out: TensorBoard files",
        "wandb is left out: set tracking.wandb.project",
    ),
    _w("checkpoint block", TRAINER2 | {"checkpoint": {"load_universal": True}}, ACCEPTED, "checkpoint is left out"),
    _w("comms logger", TRAINER2 | {"comms_logger": {"enabled": False, "verbose": False}}, ACCEPTED),
    _w("tensor parallel of one", TRAINER2 | {"tensor_parallel": {"autotp_size": 1}}, ACCEPTED),
    _w("hybrid engine off", TRAINER2 | {"hybrid_engine": {"enabled": False, "max_out_tokens": 512}}, ACCEPTED),
    _w("data efficiency off", TRAINER2 | {"data_efficiency": {"enabled": False}}, ACCEPTED),
    _w(
        "nulls at the top",
        TRAINER2 | {"optimizer": None, "scheduler": None, "fp16": None, "dump_state": None},
        ACCEPTED,
    ),
    _w(
        "comment keys",
        {"_comment": "ours", "//": "see wiki", **TRAINER2, "bf16": {"_note": "A100", "enabled": True}},
        ACCEPTED,
    ),
    _w("the batch as it is", {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2} | BF16 | _z(2), ACCEPTED),
    _w(
        "the batch, and other ranks' steps",
        {"train_batch_size": 16, "gradient_accumulation_steps": 1} | BF16 | _z(2),
        ACCEPTED,
        "gradient_accumulation_steps 1 is not used",
    ),
    _w(
        "cosine that agrees",
        TRAINER2
        | _schedule(
            "WarmupCosineLR", total_num_steps=1000, warmup_num_steps=100, warmup_min_ratio=0, warmup_type="linear"
        ),
        ACCEPTED,
        words=("steps=1000", "schedule.warmup=0.1"),
    ),
    _w(
        "decay that agrees",
        TRAINER2
        | _schedule(
            "WarmupDecayLR",
            total_num_steps="auto",
            warmup_num_steps=100,
            warmup_min_lr=0,
            warmup_max_lr=5e-4,
            last_batch_iteration=-1,
        ),
        ACCEPTED,
        words=("steps=1000", "schedule.warmup=0.1", "schedule.kind=linear"),
    ),
    _w(
        "constant, warm-up in logarithms",
        TRAINER2 | _schedule("WarmupLR", **WARM, warmup_type="log"),
        ACCEPTED,
        "warmup_type log is not used",
        words=("schedule.kind=constant",),
    ),
    _w("max_grad_norm that agrees", TRAINER2 | _adamw(max_grad_norm=1.0), ACCEPTED, "max_grad_norm is ignored"),
]

_HJSON = [
    _w("trailing comma", '{"bf16": {"enabled": true,}, "zero_optimization": {"stage": 2,},}', ACCEPTED),
    _w(
        "comments",
        '{\n  // for A100\n  "bf16": {"enabled": true}, /* not fp16 */\n  # sharded\n  "zero_optimization": '
        '{\n    "stage": 2\n  }\n}',
        ACCEPTED,
    ),
    _w("no commas", "{\n  bf16: {\n    enabled: true\n  }\n  zero_optimization: {\n    stage: 2\n  }\n}", ACCEPTED),
    _w("byte order mark", '\ufeff{"zero_optimization": {"stage": 2}}', ACCEPTED),
    _w(
        "repeated key", '{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}', REFUSED, "given twice"
    ),
    _w("repeated key beside a comment", '{"bf16": {}, // a\n "bf16": {"enabled": true}}', REFUSED, "given twice"),
    _w("cut off", '{"zero_optimization": {"stage": 2', REFUSED, "not readable as JSON"),
    _w("a list", '[{"zero_optimization": {"stage": 2}}]', REFUSED, "holds no JSON object"),
    _w("three thousand levels", '{"a":' * 3000 + "1" + "}" * 3000, REFUSED, "levels deep"),
    _w("lone surrogate", '{"zero_optimization": {"stage": 2}, "wandb": {"project": "\\ud800"}}', REFUSED, "surrogate"),
]

_DIFFERENT = [
    _w(
        "WarmupLR all auto",
        TRAINER2 | _schedule("WarmupLR", **WARM),
        DIFFERS,
        'scheduler.type "WarmupLR"',
        "schedule.kind=constant",
    ),
    _w(
        "WarmupDecayLR all auto",
        TRAINER3 | _adamw() | _schedule("WarmupDecayLR", **WARM, total_num_steps="auto"),
        DIFFERS,
        "schedule.kind=linear",
    ),
    _w("another rate", TRAINER2 | _adamw(lr=2e-5), DIFFERS, "params.lr 2e-05", "optimizer.lr=2e-05"),
    _w(
        "another rate and decay",
        TRAINER2 | _adamw(lr=3e-5, betas=[0.9, 0.999], weight_decay=0.01),
        DIFFERS,
        "3 values differ",
        "optimizer.lr=3e-05",
        "optimizer.betas=[0.9,0.999]",
        "optimizer.weight_decay=0.01",
    ),
    _w(
        "DeepSpeed's own example",
        {
            "train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
            "fp16": {"enabled": True},
        }
        | _z(2),
        DIFFERS,
        "batch.samples=8",
        "model.dtype=float16",
    ),
    _w(
        "everything said",
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.3,
            "bf16": {"enabled": True},
        }
        | _adamw(lr=1e-4)
        | _schedule("WarmupLR", warmup_min_lr=0, warmup_max_lr=1e-4, warmup_num_steps=100)
        | _z(3),
        DIFFERS,
        "7 values differ",
        "take=deepspeed",
    ),
    _w("a micro-batch", {"train_micro_batch_size_per_gpu": 1} | BF16 | _z(2), DIFFERS, "micro_batch=1"),
    _w("accumulation alone", {"gradient_accumulation_steps": 4} | BF16 | _z(2), DIFFERS, "batch.samples=8"),
    _w(
        "eight GPUs' batch",
        {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4} | BF16 | _z(2),
        DIFFERS,
        "batch.samples=256 micro_batch=8",
    ),
    _w("a batch of one", {"train_batch_size": 1} | BF16 | _z(2), DIFFERS, "batch.samples=1", "micro_batch=1"),
    _w("clipping", AUTOS | BF16 | _z(2) | {"gradient_clipping": 0.5}, DIFFERS, "optimizer.clip=0.5"),
    _w("max_grad_norm alone", BF16 | _z(2) | _adamw(max_grad_norm=0.3), DIFFERS, "optimizer.clip=0.3"),
    _w("fp16 on", AUTOS | {"fp16": FP16 | {"enabled": True}} | _z(2), DIFFERS, "model.dtype=float16"),
    _w(
        "neither half",
        AUTOS | {"fp16": {"enabled": False}, "bf16": {"enabled": False}} | _z(2),
        DIFFERS,
        "model.dtype=float32",
    ),
    _w("bf16 off", AUTOS | {"bf16": {"enabled": False}} | _z(2), DIFFERS, "model.dtype=float32"),
    _w(
        "gradients in bf16",
        AUTOS | BF16 | _z(2) | {"data_types": {"grad_accum_dtype": "bf16"}},
        DIFFERS,
        "optimizer.grad_dtype=bfloat16",
    ),
    _w("Lion", TRAINER2 | _adamw("Lion", lr=1e-4), DIFFERS, "optimizer.name=lion"),
    _w(
        "a scheduler with its length",
        TRAINER2
        | _schedule("WarmupDecayLR", total_num_steps=2000, warmup_num_steps=60, warmup_min_lr=0, warmup_max_lr=5e-4),
        DIFFERS,
        "duration.steps=2000",
        "schedule.kind=linear",
    ),
    _w(
        "a cosine with its warm-up",
        TRAINER2 | _schedule("WarmupCosineLR", total_num_steps=500, warmup_num_steps=50, cos_min_ratio=0.1),
        DIFFERS,
        "schedule.warmup=0.1",
        "schedule.min_lr_ratio=0.1",
    ),
    _w(
        "rate of the scheduler",
        TRAINER2 | _adamw(lr=1e-3) | _schedule("WarmupLR", warmup_max_lr=2e-4),
        DIFFERS,
        "optimizer.lr=0.0002",
    ),
    _w(
        "warm-up of no known length",
        TRAINER2 | _schedule("WarmupLR", warmup_num_steps=1000),
        DIFFERS,
        "cannot take scheduler.params.warmup_num_steps",
    ),
    _w(
        "amp off",
        TRAINER2 | {"amp": {"enabled": False, "opt_level": "O1"}},
        OFF,
        "Apex AMP integration has been removed",
    ),
    _w("amp auto", TRAINER2 | {"amp": {"enabled": "auto"}}, OFF, "since DeepSpeed 0.19.8"),
    _w("elasticity off", TRAINER2 | {"elasticity": {"enabled": False}}, OFF, "Elastic training has been removed"),
    _w("sparse gradients off", TRAINER2 | {"sparse_gradients": False}, OFF, "has been removed"),
]

_WRONG = [
    _w("numbers in strings", AUTOS | BF16 | _z(2, reduce_bucket_size="5e8"), REFUSED, "write 500000000 without quotes"),
    _w("CPU", AUTOS | BF16 | _z(2, offload_optimizer={"device": "CPU"}), REFUSED, 'did you mean "cpu"?'),
    _w("Auto", AUTOS | BF16 | _z(3, stage3_prefetch_bucket_size="Auto"), REFUSED, 'write "auto"'),
    _w("steps_per_print 0", TRAINER2 | {"steps_per_print": 0}, REFUSED, "steps_per_print 0 is not", "leave it out"),
    _w("null stage", AUTOS | BF16 | _z(None), REFUSED, "stage null is not one of 0, 1, 2, 3"),
    _w("true for a stage", AUTOS | BF16 | _z(True), REFUSED, "stage true is not one of 0, 1, 2, 3"),
    _w(
        "not a number", '{"zero_optimization": {"stage": 2, "reduce_bucket_size": NaN}}', REFUSED, "NaN is not a number"
    ),
    _w("amp on", TRAINER2 | {"amp": {"enabled": True}}, REFUSED, "Use DeepSpeed 'fp16', 'bf16', or 'torch_autocast'"),
    _w(
        "a typo in the scheduler",
        TRAINER2 | _schedule("WarmupDecyLR", **WARM),
        REFUSED,
        "did you mean 'WarmupDecayLR'?",
    ),
    _w("a typo in the optimizer", TRAINER2 | _adamw("AdmW"), REFUSED, "did you mean 'AdamW'?"),
    _w("plain Adam", TRAINER2 | _adamw("Adam", adam_w_mode=False), REFUSED, "means another optimizer"),
    _w("no bias correction", TRAINER2 | _adamw(bias_correction=False), REFUSED, "means another optimizer"),
    _w(
        "autocast under stage 2",
        _z(2) | {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        REFUSED,
        "torch_autocast.enabled true, but under ZeRO-2",
    ),
    _w("deepcompile", TRAINER2 | {"compile": {"deepcompile": True}}, REFUSED, "DeepCompile is not driven"),
    _w("a mixture's block", TRAINER2 | {"moe": {"enabled": True}}, REFUSED, "no key 'moe'; remove it"),
    _w("the wrong level", AUTOS | BF16 | {"stage": 2}, REFUSED, "it belongs as zero_optimization.stage"),
    _w("clipping at the wrong level", BF16 | _z(2, gradient_clipping=1.0), REFUSED, "it belongs at the top level"),
    _w("fp16 without stages", AUTOS | {"fp16": {"enabled": True}}, REFUSED, "set zero_optimization.stage 1"),
    _w(
        "several at once",
        AUTOS | {"gradient_cliping": 1} | _z(2, reduce_bucket_size="5e8") | _adamw(lr=2e-5),
        REFUSED,
        "3 things: (1)",
        "did you mean 'gradient_clipping'?",
        "(2)",
        "(3)",
        "optimizer.lr=2e-05",
    ),
]

WORLD = [*_PLAIN, *_HJSON, *_DIFFERENT, *_WRONG]
