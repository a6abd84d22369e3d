"""Each top-level key of DeepSpeed's has its outcome, and none of them is silent where it is switched on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch.test_recipe import LEAST

from galley.contract.errors import UserError
from galley_launch.base.devices import Devices
from galley_launch.base.options import read
from galley_launch.deepspeed import settle
from galley_launch.deepspeed.keys import table
from galley_launch.deepspeed.table import OUTCOMES
from galley_launch.recipe.model_facts import Facts
from galley_launch.recipe.schema import build, override

# For each key that is not kept as it stands: a value that switches it on, and one that does not.
ON_AND_OFF: dict[str, tuple[Any, Any]] = {
    "activation_checkpointing": ({"cpu_checkpointing": True}, {"cpu_checkpointing": False, "profile": "auto"}),
    "autotuning": ({"enabled": True}, {"enabled": False, "fast": True}),
    "checkpoint": ({"use_node_local_storage": True}, {"tag_validation": "Warn", "load_universal": False}),
    "comet": ({"enabled": True, "api_key": "s3cret"}, {"enabled": False}),
    "compile": ({"offload_activation": True}, {"deepcompile": False, "double_buffer": True}),
    "csv_monitor": ({"enabled": True}, {"enabled": False, "output_path": "x"}),
    "data_efficiency": ({"enabled": True}, {"enabled": False, "seed": 1}),
    "dataloader_drop_last": (True, False),
    "datastates_ckpt": ({"host_cache_size": 1}, False),
    "disable_allgather": (True, False),
    "expert_parallel": ({"enabled": True}, {"enabled": False, "autoep_size": 2}),
    "flops_profiler": ({"enabled": True}, {"enabled": False, "top_modules": 3}),
    "gradient_allreduce_op": ("sum", "mean"),
    "hybrid_engine": ({"enabled": True}, {"enabled": False}),
    "managed_gradient_accumulation": (False, True),
    "pipeline": ({"stages": 2}, {}),
    "sequence_parallel_size": (2, 1),
    "tensor_parallel": ({"tp": {"tp_size": 2}}, {"autotp_size": 0}),
    "tensorboard": ({"enabled": True}, {"enabled": False}),
    "use_data_before_expert_parallelism": (True, False),
    "wandb": ({"enabled": True}, {"enabled": False, "project": "p"}),
    "weight_quantization": ({"num_bits": 4}, {"enabled": False}),
}
# They change nothing here, whatever they hold, and it would mislead to speak of them.
NEVER_SAID = {
    "seq_parallel_communication_data_type",
    "vocabulary_size",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}


def settled(config: dict[str, Any], *words: str, take: str = "", device: str = "cuda") -> settle.Settled:
    recipe = build(override(LEAST, read(words).overrides), "x.yaml")
    source = settle.Source({"zero_optimization": {"stage": 2}} | config, "x.json", take)
    return settle.settle(source, recipe, Devices(device, 2, None), Facts(hidden_size=64))


def refused(config: dict[str, Any], *words: str, device: str = "cuda") -> str:
    with pytest.raises(UserError) as error:
        settled(config, *words, device=device)
    return str(error.value)


def test_each_key_of_deepspeed_has_a_fate() -> None:
    assert set(OUTCOMES) == set(table()["keys"]), "a new DeepSpeed: decide what becomes of the key"
    spoken = {key for key, outcome in OUTCOMES.items() if outcome.what in ("left out", "refused")}
    assert spoken == set(ON_AND_OFF) | NEVER_SAID


@pytest.mark.parametrize("key", ON_AND_OFF)
def test_what_is_switched_on_and_not_honoured_is_said(key: str) -> None:
    on, off = ON_AND_OFF[key]
    if OUTCOMES[key].what == "refused":
        line = refused({key: on})
        assert key in line
        assert OUTCOMES[key].reason in line
    else:
        done = settled({key: on})
        assert f"deepspeed x.json: {key} is left out: {OUTCOMES[key].reason}" in done.notes
        assert key not in done.config
        assert "s3cret" not in json.dumps(done.config) + " ".join(done.notes)
    quiet = settled({key: off})
    assert quiet.notes == ()
    assert key not in quiet.config


def test_a_pipeline_of_one_stage_is_said_to_be_left_out() -> None:
    assert "pipeline is left out" in " ".join(settled({"pipeline": {"stages": "auto", "partition": "best"}}).notes)


@pytest.mark.parametrize("key", sorted(key for key, outcome in OUTCOMES.items() if outcome.what == "kept"))
def test_what_is_kept_reaches_deepspeed_as_it_stands(key: str) -> None:
    values: dict[str, Any] = {
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "aio": {"queue_depth": 8},
        "communication_data_type": "fp32",
        "gradient_predivide_factor": 1.0,
        "log_level": "info",
        "steps_per_print": 7,
        "timers": {"throughput": {"enabled": False}},
        "comms_logger": {"enabled": True, "verbose": False},
    }
    value = values.get(key, key != "prescale_gradients")
    done = settled({key: value})
    assert done.config[key] == value
    assert done.notes == ()


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({"prescale_gradients": True}, [], "set zero_optimization.reduce_scatter false"),
        ({"gradient_predivide_factor": 2.0}, [], "gradients are not scaled before they are reduced"),
        ({"communication_data_type": "fp16"}, [], "would be reduced as infinities; write fp32 or bf16"),
        ({"aio": {"use_gds": True}}, [], "GPUDirect Storage is between a disk and a GPU; remove use_gds"),
        ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, [], "has had no such stage since 0.5.9"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            [], "out of a checkpoint's reach; remove super_offload",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, [], "are both true; keep one of them"),
        ({"data_types": {"buffer_dtype": "bf16"}}, [], "would round rotary frequencies; remove it"),
        ({"data_types": {"param_dtype": "fp16"}}, [], "but the weights are bfloat16; remove it"),
        ({"zero_optimization": {"stage": "auto"}}, [], 'stage "auto" is not a stage: DeepSpeed takes it for 0'),
        ({"optimizer": {"params": {"lr": "2e-5"}}}, [], "is not a number above 0; write 2e-05 without quotes"),
        ({"scheduler": {"type": "OneCycle"}}, [], "there is no such schedule here: use WarmupCosineLR"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1}}}, [], "takes no parameter"),
        ({"scheduler": {"params": {"warmup_type": "exp"}}}, [], "is not one of log, linear"),
        ({"scheduler": {"params": {"warmup_min_lr": 1e-4}}}, [], "but the warm-up begins at 0 here; set schedule.war"),
        ({"torch_autocast": {"enabled": True}, "zero_optimization": {"stage": 1}}, [], "under ZeRO-1 weights have"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}, "zero_optimization": {"stage": 0}}, [], "only bf"),
    ],
)  # fmt: skip
def test_what_ranks_would_stop_at_or_get_wrong_is_refused(
    config: dict[str, Any], words: list[str], message: str
) -> None:
    assert message in refused(config, *words, device="cpu")


def test_autocast_is_settled_under_every_stage() -> None:
    for stage in (0, 1, 2, 3):
        zero = {"zero_optimization": {"stage": stage}}
        for block in ({"enabled": False}, {"enabled": "auto", "dtype": "auto"}, "auto"):
            done = settled(zero | {"torch_autocast": block}).config
            assert ("torch_autocast" in done) == (stage == 0)
        dropped = settled(zero | {"torch_autocast": {"enabled": True, "dtype": "float16"}}, take="recipe")
        assert dropped.config.get("torch_autocast") == ({"enabled": True, "dtype": "bfloat16"} if stage == 0 else None)
        assert "torch_autocast" in " ".join(dropped.notes)
    float32 = settled({"zero_optimization": {"stage": 0}, "torch_autocast": {"enabled": True, "dtype": "bf16"}},
                      "dtype=float32", take="deepspeed")  # fmt: skip
    assert float32.recipe.model.dtype == "bfloat16"


def test_the_command_line_wins_over_take() -> None:
    recipe = build(override(LEAST, read(["lr=1e-4", "clip=0.5"]).overrides), "x.yaml")
    config = {"gradient_clipping": 2.0, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-6}}}
    source = settle.Source(config, "x.json", "deepspeed", ("optimizer.lr",))
    done = settle.settle(source, recipe, Devices("cuda", 1, None), Facts())
    assert (done.recipe.optimizer.lr, done.recipe.optimizer.clip, done.recipe.optimizer.eps) == (1e-4, 2.0, 1e-6)
    assert done.config["gradient_clipping"] == 2.0
    assert done.notes == (
        "deepspeed x.json: taken over the recipe's: optimizer.clip=2.0 optimizer.eps=1e-06",
        "deepspeed x.json: not taken: optimizer.params.lr 0.001, but the recipe has 0.0001",
    )


def test_comments_are_passed_over_and_misspelt_keys_are_not() -> None:
    comments = {"_comment": "a", "//": "b", "#note": "c", "__why__": "d"}
    done = settled(comments | {"bf16": {"enabled": True, "_see": "wiki"}})
    assert done.notes == ("deepspeed x.json: ignored as comments: _comment, //, #note, __why__",)
    for key in table()["keys"]:
        for typo in (f"_{key[1:]}", f"_{key}", f"#{key[1:]}"):
            assert f"DeepSpeed has no key {typo!r}" in refused({typo: {}})
    assert "no parameter '_r'" in refused({"optimizer": {"params": {"_r": 1e-3}}})


def test_what_scales_losses_is_looked_at_only_with_fp16() -> None:
    assert "fp16" not in settled({"fp16": {"enabled": False, "min_loss_scale": 0}}).config
    assert "fp16.min_loss_scale 0 is not" in refused({"fp16": {"enabled": True, "min_loss_scale": 0}}, "dtype=float16")


def test_take_is_one_of_two() -> None:
    with pytest.raises(UserError, match="'both' is neither deepspeed nor recipe; write take=deepspeed or take=recipe"):
        settled({}, take="both")


_COMPARE = """
import json, logging, sys
logging.disable(logging.CRITICAL)
import deepspeed_keys
from galley_launch.deepspeed import values
from galley_launch.deepspeed.keys import table

VALUES = [None, True, False, 0, 1, 2, 3, -1, 0.5, 1.0, 5e8, 1e-3, "auto", "Auto", "5e8", "500", "true", "x", "cpu",
          "CPU", "nvme", [], ["a"], {}, {"a": 1}, float("nan"), float("inf")]

def takes(model, field, value):
    try:
        model(**{field: value})
    except Exception:
        return False
    return True

def compare(model, keys, path):
    for field, spec in keys.items():
        for value in VALUES if isinstance(spec, list) and spec[0] not in ("any", "list", "dict") else ():
            if value == "auto" or (field in ("loss_scale_window", "min_loss_scale") and value in (0, -1)):
                continue  # dropped before; bounded only where fp16 is on
            if field == "compute_grad_norm" or path.endswith("zenflow"):
                continue  # refused by a rule
            ours = values.check(field, value, spec)[1] is None
            real = takes(model, field, value)
            number = isinstance(value, bool) and spec[0] in ("int", "float", "enum")
            infinite = isinstance(value, float) and (value != value or value == float("inf"))
            if ours and not real:
                yield f"{path}.{field} {value!r}: DeepSpeed refuses it"
            if real and not ours and not number and not infinite:
                yield f"{path}.{field} {value!r}: DeepSpeed takes it"

found, count = [], 0
for name, model in deepspeed_keys.models().items():
    if name != "bfloat16":
        found += compare(model, table()["keys"][name], name)
        for field, inner in model.model_fields.items():
            key = inner.alias or field
            keys = table()["keys"][name].get(key)
            kinds = [part for part in deepspeed_keys.parts(inner.annotation) if hasattr(part, "model_fields")]
            if isinstance(keys, dict) and kinds:
                found += compare(kinds[0], keys, f"{name}.{key}")
print("\\n".join(["COMPARED", *found]))
"""


@pytest.mark.slow
def test_values_are_taken_and_refused_as_deepspeeds_own_models_do() -> None:
    """Both ways, but for truth values as numbers and infinite ones, which nobody means."""
    here = Path(__file__).parent
    paths = [str(here), *(str(here.parents[1] / name) for name in ("launch", "src"))]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", _COMPARE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.partition("COMPARED")[2].strip() == ""
