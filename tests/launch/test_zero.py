"""ZeRO presets and users' own JSON: completed, contradicted, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch.test_recipe import LEAST

from galley.contract.errors import UserError
from galley_launch.base import assets
from galley_launch.base.devices import Devices
from galley_launch.base.options import read
from galley_launch.deepspeed import complete, settle
from galley_launch.recipe.model_facts import Facts
from galley_launch.recipe.schema import build, override
from launch import deepspeed_keys

PRESETS = ["zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload_cpu", "zero3_offload_nvme"]
FACTS = Facts(hidden_size=576)

# transformers' own example of a ZeRO-3 configuration, as its documentation has it.
HUGGING_FACE: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def finish(
    config: dict[str, Any], *words: str, device: str = "cpu", ranks: int = 2, known: Facts = FACTS, nodes: int = 1
) -> Any:
    recipe = build(override(LEAST, read(words).overrides), "x.yaml")
    source = settle.Source(config, "x.json")
    return settle.settle(source, recipe, Devices(device, ranks, None, nodes=nodes), known).config


def refusal(config: dict[str, Any], *words: str, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        finish(config, *words, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def preset(name: str) -> dict[str, Any]:
    return complete.find(name, None)[0]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_preset_is_finished(name: str, device: str, dtype: str) -> None:
    done = finish(preset(name), f"dtype={dtype}", device=device)
    assert '"auto"' not in json.dumps(done)
    assert done["train_batch_size"] == 16
    assert done["gradient_accumulation_steps"] == 8
    assert done["gradient_clipping"] == 1.0
    stage = done["zero_optimization"]["stage"]
    half = dtype == "bfloat16"
    assert done.get("bf16") == ({"enabled": True} if half and stage else None)
    assert done.get("data_types") == ({"grad_accum_dtype": "fp32"} if half and stage else None)
    autocast = {"enabled": True, "dtype": "bfloat16"}
    assert done.get("torch_autocast") == (autocast if half and stage == 0 else None)
    assert "fp16" not in done
    assert done["zero_optimization"].get("overlap_comm") in (None, device == "cuda")


def test_the_presets_are_all_there() -> None:
    assert sorted(path.stem for path in assets.folder("ds_configs").glob("*.json")) == PRESETS


def test_sizes_follow_the_hidden_size() -> None:
    block = finish(preset("zero3"))["zero_optimization"]
    assert block["reduce_bucket_size"] == 576 * 576
    assert block["stage3_prefetch_bucket_size"] == int(0.9 * 576 * 576)
    assert block["stage3_param_persistence_threshold"] == 5760


def test_an_unknown_hidden_size_is_an_error() -> None:
    line = refusal(preset("zero3"), known=Facts())
    assert 'zero_optimization.reduce_bucket_size "auto" needs the hidden size of org/model' in line
    assert finish(preset("zero2"), known=Facts())["zero_optimization"]["stage"] == 2


def test_a_real_users_json_is_completed() -> None:
    done = finish(HUGGING_FACE, "schedule.kind=constant", device="cuda")
    assert '"auto"' not in json.dumps(done)
    assert "optimizer" not in done
    assert "scheduler" not in done
    assert done["steps_per_print"] == 2000
    assert done["bf16"] == {"enabled": True}
    assert HUGGING_FACE["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4, but 16 samples a step / (micro_batch 1"),
        ({"train_batch_size": 32}, "train_batch_size 32, but batch.samples 16 makes it 16"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu 4, but micro_batch 1 makes it 1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, but optimizer.clip 1.0 makes it 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled false, but model.dtype bfloat16 makes it true"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "but optimizer.grad_dtype float32 makes it"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, "params.lr 0.001, but the recipe has 0.0002"),
        (
            {"optimizer": {"type": "AdamW", "parms": {}}},
            "DeepSpeed has no key 'optimizer.parms'; did you mean 'params'?",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"leraning_rate": 1}}}, "no parameter 'leraning_rate'"),
        (
            {"optimizer": {"type": "Lamb"}},
            'optimizer.type "Lamb", but the recipe has optimizer.name adamw; there is no such optimizer here: use',
        ),
        ({"scheduler": {"params": {"warmup_num_steps": 9}}}, "set schedule.warmup in the recipe"),
        ({"gradient_cliping": 1.0}, "DeepSpeed has no key 'gradient_cliping'; did you mean 'gradient_clipping'?"),
        ({"zero_optimisation": {}}, "DeepSpeed has no key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        ({"activation_checkpointing": {"partition_activation": True}}, "did you mean 'partition_activations'?"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}, "did you mean 'device'?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage 4 is not one of 0, 1, 2, 3"),
        ({"zero_optimization": "on"}, 'zero_optimization "on" is not an object; its keys: stage, '),
        ({"fp16": {"enabled": True}}, "fp16.enabled true, but model.dtype bfloat16 makes it false"),
        ({"fp16": {"loss_scale": 128}}, "with a fixed loss_scale every overflow would end the run; remove"),
        ({"amp": {"enabled": True}}, "NVIDIA Apex AMP integration has been removed"),
        ({"elasticity": {"enabled": True}}, "Elastic training has been removed"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "in ZeRO-3; set zero_optimization"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "in ZeRO-1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "only the optimizer's state, six"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "to NVMe in ZeRO-3; use deep"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "pipeline_read": True}}},
            "no access to state that a checkpoint needs; remove pipeline_read",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "not implemented for the CPU"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism is not supported yet"),
        ({"sequence_parallel_size": 2}, "sequence parallelism is not supported yet"),
        ({"tensor_parallel": {"autotp_size": "two"}}, 'autotp_size "two" is not a whole number'),
        ({"bfloat16": {"enabled": False}}, "bf16.enabled false, but model.dtype bfloat16 makes it true"),
        ({"bf16": {"enabled": "auto"}, "bfloat16": {"enabled": True}}, "are two names of one block; keep bf16"),
        ({"bfloat16": {"bf16_master_weights_and_grads": True}}, "bf16 master weights lose small updates"),
        ({"gradient_allreduce_op": "SUM"}, "scaled for gradients that are averaged over the ranks; remove"),
        ({"managed_gradient_accumulation": False}, "where a step's last micro-batch is; remove"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "hpZ) only where weights are sharded"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "partition_size 3 does not divide 2 ranks"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "second optimizer"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "ZenFlow steps most parameters with old gradients"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "nothing is clipped, and none is logged"),
        ({"optimizer": {"params": [1]}}, "optimizer: params [1] is not an object; its keys: lr, betas"),
        ({"scheduler": {"params": 3}}, "scheduler: params 3 is not an object; its keys: "),
    ],
)
def test_a_contradiction_or_a_typo_is_one_line(change: dict[str, Any], message: str) -> None:
    assert message in refusal({"zero_optimization": {"stage": 2}} | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_accumulation_steps": 8, "train_batch_size": 16}, []),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "torch_adam": True}}}, []),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "cos_min_ratio": 0}}}, ["steps=9"]),
        ({"gradient_clipping": 0}, ["clip=0"]),
        ({"bf16": {"enabled": False}}, ["dtype=float32"]),
        ({"bfloat16": {"enabled": False}}, ["dtype=float32"]),
        ({"bf16": "auto", "fp16": None, "optimizer": "auto", "scheduler": {"params": "auto"}}, []),
        ({"bfloat16": {"enabled": True}, "bf16": {"enabled": True}, "gradient_allreduce_op": "mean"}, []),
        ({"managed_gradient_accumulation": True, "tensor_parallel": {"autotp_size": 1}}, []),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto", "stage3_max_live_parameters": "auto"}}, []),
    ],
)
def test_what_agrees_with_the_recipe_is_fine(change: dict[str, Any], words: list[str]) -> None:
    done = finish({"zero_optimization": {"stage": 2}} | change, *words)
    assert done["zero_optimization"] == {"stage": 2}
    assert "optimizer" not in done
    assert "scheduler" not in done
    assert "bfloat16" not in done
    assert done.get("bf16") == (None if "dtype=float32" in words else {"enabled": True})


@pytest.mark.parametrize("block", [{"ratio": 1.0}, {"device": "cpu", "ratio": 1}])
def test_offloading_the_whole_optimizer_is_fine(block: dict[str, Any]) -> None:
    words = {"zero_hpz_partition_size": 1, "compute_grad_norm": True, "elastic_checkpoint": False, "zenflow": None}
    done = finish({"zero_optimization": {"stage": 3, "offload_optimizer": block} | words})
    assert done["zero_optimization"]["offload_optimizer"] == block


@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_takes_packed_documents_one_row_at_a_time_in_bfloat16(kind: str) -> None:
    words = [f"attention={kind}", "packing=true"]
    line = refusal(preset("zero2"), *words, "micro_batch=2", device="cuda")
    assert "only at micro_batch 1: they would see each other; use micro_batch=1 (a packed sample is full" in line
    assert line.endswith("or model.attention=varlen or sdpa")
    line = refusal(preset("zero2"), *words, "dtype=float32", device="cuda")
    assert line.endswith("do not compute in float32; use model.dtype=bfloat16, or model.attention=sdpa")
    for more in (["micro_batch=1"], ["micro_batch=2", "packing=false"], ["micro_batch=2", "attention=sdpa"]):
        settled = [word for word in words if word.partition("=")[0] not in "".join(more)]
        assert finish(preset("zero2"), *settled, *more, device="cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grad_dtype=bfloat16", "dtype=float32"], "lose the precision that float32 is used for"),
        (["attention=flash_attention_2"], "flash attention and varlen need a GPU"),
        (["attention=varlen"], "flash attention and varlen need a GPU"),
        (["held_out=0.1", "held_out_path=x.jsonl"], "two answers to one question"),
        (["patience=2"], "no rows are held out"),
        (["patience=2", "held_out=0.1"], "needs evaluations along the way; set cadence.eval_every"),
        (
            ["freeze=[lm_head.*]"],
            "an adapter's base is frozen already; remove method.freeze",
        ),
        (["method.kind=full", "full_modules=[lm_head]"], "every module is trained in full; remove method.full_modules"),
        (["method.kind=full", "dora=true"], "has no adapter for rslora or dora to change"),
        (["targets=all-linear+experts", "dropout=0.1"], "peft knows neither DoRA nor dropout; use method.dora=false"),
        (
            ["overlong=split"],
            "split cuts plain text; half a conversation would be trained on without its beginning; use",
        ),
        (["format=text", "chat_template=chatml"], "plain text goes through no template; remove it"),
        (["schedule.kind=wsd", "warmup=0.5", "decay=0.6"], "together are longer than the run; make schedule.warmup"),
        (["model.revision=main", "model.path=./x"], "a revision is for hub models"),
        (["data.revision=main", "data.path=/x.jsonl"], "a revision is for hub data sets"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(words: list[str], message: str) -> None:
    assert message in refusal(preset("zero2"), *words)


def test_zero_0_cannot_accumulate_in_bfloat16() -> None:
    assert "ZeRO-0 always accumulates gradients in float32" in refusal(preset("zero0"), "grad_dtype=bfloat16")
    assert finish(preset("zero1"), "grad_dtype=bfloat16")["data_types"] == {"grad_accum_dtype": "bf16"}


def test_compiling_is_refused_under_zero_3() -> None:
    assert "weights inside what would be compiled; use deepspeed=zero2" in refusal(preset("zero3"), "compile=true")
    assert finish(preset("zero2"), "compile=true")


def test_nvme_is_the_nodes_own_disk() -> None:
    config = preset("zero3_offload_nvme")
    assert "nvme_path" not in finish(config)["zero_optimization"]["offload_optimizer"], "only its ranks know"
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = "/nvme"
    assert finish(config)["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/nvme"
    config["zero_optimization"]["offload_optimizer"]["buffer_count"] = 3
    assert "takes four buffers; set buffer_count 4" in refusal(config)


def test_liger_is_for_gpus() -> None:
    assert "Liger's kernels are Triton's, which are for GPUs; use liger=false" in refusal(preset("zero2"), "liger=true")
    assert finish(preset("zero2"), "liger=true", device="cuda")


def test_dora_is_refused_under_zero_3() -> None:
    assert "which ZeRO-3 has sharded; use deepspeed=zero2" in refusal(preset("zero3"), "dora=true")
    assert finish(preset("zero2"), "dora=true")


def test_optimizers_are_refused_where_they_do_not_work() -> None:
    for name in ("lion", "adamw_8bit"):
        assert finish(preset("zero2"), f"optimizer.name={name}")
        assert "with AdamW only; use optimizer.name" in refusal(preset("zero3_offload_cpu"), f"optimizer.name={name}")
    paged = ["optimizer.name=paged_adamw_8bit"]
    assert "paging is between a GPU and its host; use optimizer.name=adamw_8bit" in refusal(preset("zero2"), *paged)
    assert finish(preset("zero2"), *paged, device="cuda")
    for name in ("muon", "adafactor"):
        line = refusal(preset("zero2"), f"optimizer.name={name}")
        assert f"{name} steps whole matrices, and ZeRO keeps flat slices of them; use adamw or lion" in line
    block = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Lion", "params": {"lr": "auto"}}}
    assert finish(block, "optimizer.name=lion")
    assert "but the recipe has optimizer.name adamw_8bit" in refusal(block, "optimizer.name=adamw_8bit")


def test_int8_weights_are_refused_under_zero_3() -> None:
    words = ["method.kind=lora_int8"]
    assert "training silently goes wrong; use deepspeed=zero2, or method.kind=qlora" in refusal(preset("zero3"), *words)
    assert "loses the scales of int8 weights" in refusal(preset("zero2"), *words, "dora=true")
    assert finish(preset("zero2"), *words)


@settings(max_examples=60)
@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_the_batch_is_the_product_or_an_error_that_helps(samples: int, micro: int, ranks: int) -> None:
    recipe = build(override(LEAST, read([f"samples={samples}", f"micro_batch={micro}"]).overrides), "x.yaml")
    if samples % (micro * ranks) == 0:
        assert complete.accumulation(recipe, ranks) * micro * ranks == samples
        return
    with pytest.raises(UserError) as error:
        complete.accumulation(recipe, ranks)
    assert f"{samples} samples a step / (micro_batch {micro} x ranks {ranks})" in str(error.value)
    for word in error.value.todo.removeprefix("try ").split(" or "):
        better = build(override(recipe.model_dump(exclude_none=True), read([word]).overrides), "x.yaml")
        assert complete.accumulation(better, ranks) > 0


def test_a_repeated_key_in_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"bf16": {}, "bf16": {"enabled": true}}')
    with pytest.raises(UserError, match="'bf16' is given twice"):
        complete.read(path)


def test_json_that_is_not_there_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no preset 'zreo3'; did you mean 'zero3'\?"):
        complete.find("zreo3", None)
    with pytest.raises(UserError, match=r"no file x/y\.json"):
        complete.find("x/y.json", None)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        complete.find(str(tmp_path / "x.json"), None)


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    code = "import deepspeed_keys, sys; sys.stdout.write('\\n==\\n' + deepspeed_keys.generate())"
    folder = str(Path(deepspeed_keys.__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True
    )
    now = done.stdout.partition("\n==\n")[2]
    assert now == deepspeed_keys.TARGET.read_text(), "run: DS_ACCELERATOR=cpu python tests/launch/deepspeed_keys.py"


def test_fp16() -> None:
    done = finish(preset("zero2"), "model.dtype=float16", device="cuda")
    assert done["fp16"] == {"enabled": True}
    assert done["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in done
    peers = {"fp16": {"enabled": "auto", "initial_scale_power": 12}, "zero_optimization": {"stage": 3}}
    assert finish(peers, "model.dtype=float16", device="cuda")["fp16"] == {"enabled": True, "initial_scale_power": 12}


@pytest.mark.parametrize(
    ("config", "words", "device", "says"),
    [
        ({"zero_optimization": {"stage": 2}}, [], "cpu", "fp16 does not train on the CPU"),
        ({"zero_optimization": {"stage": 0}}, [], "cuda", "set zero_optimization.stage 1 (deepspeed=zero1)"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, [], "cuda", "float16 makes it false"),
        ({"zero_optimization": {"stage": 2}}, ["optimizer.grad_dtype=bfloat16"], "cuda", "lose half of its digits"),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}},
            [], "cuda", "fp16 master weights lose small updates",
        ),
    ],
)  # fmt: skip
def test_what_fp16_cannot_do(config: dict[str, Any], words: list[str], device: str, says: str) -> None:
    assert says in refusal(config, "model.dtype=float16", *words, device=device)


def test_the_second_partition_is_a_node() -> None:
    done = finish(preset("zero3_hpz"), "batch.samples=32", nodes=2, ranks=8)
    assert done["zero_optimization"]["zero_hpz_partition_size"] == 8
    moved = finish(complete.reopen(done, other_device=False), "batch.samples=32", nodes=4, ranks=4)
    assert moved["zero_optimization"]["zero_hpz_partition_size"] == 4


def test_a_finished_configuration_can_move(tmp_path: Path) -> None:
    on_gpu = finish(preset("zero3_offload_cpu"), device="cuda", ranks=2)
    moved = finish(complete.reopen(on_gpu, other_device=True), device="cpu", ranks=4)
    assert moved == finish(preset("zero3_offload_cpu"), device="cpu", ranks=4)
    assert complete.reopen(on_gpu, other_device=False)["zero_optimization"] == on_gpu["zero_optimization"]
