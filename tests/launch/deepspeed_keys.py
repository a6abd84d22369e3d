"""Write ``launch/galley_launch/deepspeed_keys.json`` from the DeepSpeed that is installed.

    DS_ACCELERATOR=cpu python tests/launch/deepspeed_keys.py

Part of DeepSpeed's configuration is pydantic models: their fields, types and bounds are listed. The rest it reads by
hand: there, a dictionary that remembers what it was asked for, and with which default, is read instead of a real one.

A block is an object; a value is ``[type, limits]``, with the limits of pydantic's fields and ``of`` (the values of an
enumeration), ``null`` (null is one of its values), ``strict`` (read by hand, so nothing is converted) and ``case``
(upper and lower case are the same).
"""

import enum
import importlib
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[2] / "launch" / "galley_launch" / "deepspeed" / "deepspeed_keys.json"

# Read outside DeepSpeedConfig: by the engine, by transformers (the other half of the HF integration), or by AutoTP.
_ELSEWHERE = {"sequence_parallel_size": ["int", {"gt": 0}]}
# Blocks that Galley refuses when they are on or leaves out, and whose inside is read far from the configuration.
_ANYTHING = ("autotuning", "data_efficiency", "datastates_ckpt", "expert_parallel", "pipeline")
# Their parameters depend on the type; galley_launch.deepspeed.blocks knows those that a recipe can say.
_TYPED = {"optimizer": ("type", "legacy_fusion"), "scheduler": ("type",)}

_COUNT = ["int", {"gt": 0, "strict": True}]
_DTYPES = ["enum", {"of": ["fp32", "fp16", "bf16"], "case": True, "null": True}]  # get_communication_data_type
# What is read by hand and has no default that tells its type, or fewer values than its type: each from the source.
_BY_HAND: dict[str, Any] = {
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "steps_per_print": _COUNT,  # DeepSpeedEngine.step takes a remainder by it
    "gradient_clipping": ["float", {"ge": 0, "strict": True}],
    "gradient_predivide_factor": ["float", {"gt": 0, "strict": True}],
    "gradient_allreduce_op": ["enum", {"of": ["mean", "sum"], "case": True}],
    "communication_data_type": _DTYPES,
    "seq_parallel_communication_data_type": _DTYPES,
    "vocabulary_size": ["int", {"gt": 0, "strict": True, "null": True}],
    "log_level": ["enum", {"of": ["debug", "info", "warning", "error", "critical"], "null": True}],  # utils.logging
    "activation_checkpointing.number_checkpoints": ["int", {"gt": 0, "strict": True, "null": True}],
    "flops_profiler.module_depth": ["int", {"strict": True}],
    "flops_profiler.output_file": ["str", {"strict": True, "null": True}],
    "checkpoint.tag_validation": ["enum", {"of": ["Warn", "Ignore", "Fail"], "case": True}],
    "checkpoint.writer": ["any", {}],
    "checkpoint.parallel_write": ["any", {}],
    "data_types.keep_in_fp32_modules": ["any", {}],
    "torch_autocast.lower_precision_safe_modules": ["list", {"strict": True, "null": True}],
    "optimizer.type": ["str", {"strict": True}],
    "scheduler.type": ["str", {"strict": True}],
}
# Bounds that a validator of DeepSpeed's states, not a field.
_VALIDATED = {"fp16.loss_scale": {"ge": 0}, "fp16.loss_scale_window": {"gt": 0}, "fp16.min_loss_scale": {"gt": 0}}
# The first release that refuses a removed key by name: found in the releases' runtime/config.py.
_SINCE = dict.fromkeys(("nebula", "compression_training", "quantize_training", "sparse_attention"), "0.19.7") | (
    dict.fromkeys(("zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather"), "0.19.7")
)


class Asked(dict[str, Any]):
    """A configuration that has every block but no value, and remembers each key it was asked for, with its default."""

    def __init__(self, seen: dict[str, Any], removed: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.seen, self.removed = seen, removed

    def __copy__(self) -> "Asked":
        return self

    def __contains__(self, key: object) -> bool:
        if key in self.removed:
            return False
        self.seen.setdefault(str(key), {})
        return key in ("activation_checkpointing", "aio", "flops_profiler", "torch_autocast", "optimizer", "scheduler")

    def keys(self) -> "Asked":  # type: ignore[override]
        return self

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self.removed and not self.seen.get(key):
            self.seen[key] = _by_default(default)
        if key == "train_micro_batch_size_per_gpu":
            return 1
        if key in ("checkpoint", "data_types"):
            self.seen[key] = self.seen[key] if isinstance(self.seen[key], dict) else {}
            return Asked(self.seen[key])
        return default

    def __getitem__(self, key: str) -> Any:
        return {"dtype": "bfloat16", "type": "Adam", "lower_precision_safe_modules": []}.get(
            key, Asked(self.seen.setdefault(key, {}))
        )


def _by_default(default: Any) -> Any:
    """The type of a key that is read by hand, as its default has it."""
    for kind in (bool, int, float, str):
        if isinstance(default, kind):
            return [kind.__name__, {"ge": 0, "strict": True} if kind in (int, float) else {"strict": True}]
    return {}


def asked_keys() -> dict[str, Any]:
    """Top-level keys, and those of blocks that are read by hand."""
    from deepspeed.runtime import config

    seen: dict[str, Any] = {}
    config.DeepSpeedConfig(Asked(seen, frozenset(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)))
    for path, spec in _BY_HAND.items():
        block, _, leaf = path.rpartition(".")
        inside = seen[block] if block else seen
        assert leaf in inside, f"DeepSpeed no longer reads {path}"
        inside[leaf] = spec
    return seen


def _names(dtype: type[enum.Enum]) -> list[str]:
    return sorted({name for member in dtype for name in member._all_values[1:]})  # type: ignore[attr-defined]


def parts(annotation: Any) -> list[Any]:
    """The members of a union; the annotation itself where it is none."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if is_union else [annotation]


def _field(annotation: Any, metadata: list[Any]) -> Any:
    """``[type, limits]`` of a field, or the keys of the model that it is."""
    null = type(None) in parts(annotation)
    rest = [part for part in parts(annotation) if part is not type(None)]
    limits: dict[str, Any] = {"null": True} if null else {}
    for each in metadata:
        limits |= {name: getattr(each, name) for name in ("gt", "ge", "lt", "le") if hasattr(each, name)}
    kind = rest[0] if len(rest) == 1 else None
    if isinstance(kind, type) and hasattr(kind, "model_fields"):
        return model_keys(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ["enum", limits | {"of": [member.value for member in kind]}]
    if typing.get_origin(kind) is typing.Literal:
        return ["enum", limits | {"of": list(typing.get_args(kind))}]
    if kind in (bool, int, float, str, Path):
        return ["str" if kind is Path else kind.__name__, limits]
    if (typing.get_origin(kind) or kind) in (list, dict):
        return [(typing.get_origin(kind) or kind).__name__, limits]
    return ["any", {}]


def model_keys(model: type) -> dict[str, Any]:
    """Fields of a pydantic model, nested ones too."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not (field.json_schema_extra or {}).get("deprecated"):
            found[field.alias or name] = _field(field.annotation, field.metadata)
    return found


def other_names(model: type, prefix: str) -> dict[str, str]:
    """A field's own name beside its alias, and deprecated names: dotted path to the name that it has here."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra or {}
        if extra.get("deprecated"):
            new = extra["new_param"]
            found[prefix + name] = getattr(model.model_fields.get(new), "alias", None) or new
        elif field.alias and field.alias != name:
            found[prefix + name] = field.alias
    return found


def models() -> dict[str, type]:
    """Blocks that a pydantic model describes."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "bfloat16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
        "compile": CompileConfig,
        "weight_quantization": WeightQuantConfig,
        "tensor_parallel": TPTrainingConfig,
        "tensorboard": monitor.TensorBoardConfig,
        "wandb": monitor.WandbConfig,
        "csv_monitor": monitor.CSVConfig,
        "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
        "hybrid_engine": config.HybridEngineConfig,
    }


def removed() -> dict[str, list[str]]:
    """Keys that DeepSpeed refuses by name: the release that began to, and its own sentence, without an address."""
    from deepspeed.runtime import config

    inside = {f"zero_optimization.{key}": text for key, text in config._REMOVED_ZERO_CONFIG_KEYS.items()}
    sentences = config._REMOVED_TOP_LEVEL_CONFIG_KEYS | inside
    return {
        key: [_SINCE.get(key, "0.19.8"), text.partition(" See http")[0].strip().removesuffix(".")]
        for key, text in sentences.items()
    }


def schedulers() -> dict[str, list[str]]:
    """Each scheduler of DeepSpeed's and its parameters."""
    from deepspeed.runtime import lr_schedules

    return {
        name: [word for word in inspect.signature(getattr(lr_schedules, name)).parameters if word != "optimizer"]
        for name in lr_schedules.VALID_LR_SCHEDULES
    }


def optimizers() -> list[str]:
    """Optimizers that DeepSpeed makes by name: its own in any case, torch's as torch writes them."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    torchs = [name for name, each in vars(torch.optim).items() if inspect.isclass(each) and name != "Optimizer"]
    return sorted({*DEEPSPEED_OPTIMIZERS, *torchs})


def generate() -> str:
    """The bytes of the data file."""
    import deepspeed
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    dtypes = _names(importlib.import_module("deepspeed.runtime.config").DtypeEnum)
    keys = asked_keys() | _ELSEWHERE
    others: dict[str, str] = {"bfloat16": "bf16"}
    for name, model in models().items():
        keys[name] = model_keys(model)
        others |= other_names(model, f"{name}.")
    for path, limits in _VALIDATED.items():
        block, _, leaf = path.partition(".")
        keys[block][leaf][1].update(limits)
    for leaf in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        keys["data_types"][leaf] = ["enum", {"of": dtypes, "null": True}]
    keys["torch_autocast"]["dtype"] = ["enum", {"of": dtypes}]
    keys["timers"] = {"throughput": model_keys(DeepSpeedThroughputTimerConfig)}
    for name, words in _TYPED.items():
        keys[name] = {word: keys[name][word] or ["any", {}] for word in words} | {"params": ["any", {}]}
    keys |= {name: ["any", {}] for name in _ANYTHING}
    del keys["bfloat16"]
    body = {
        "deepspeed": deepspeed.__version__,
        "keys": {name: spec or ["any", {}] for name, spec in keys.items()},
        "other_names": others,
        "removed": removed(),
        "optimizers": optimizers(),
        "schedulers": schedulers(),
    }
    return _short(json.dumps(body, indent=1, sort_keys=True)) + "\n"


def _short(text: str) -> str:
    """Innermost lists and objects on one line each: a key, a line."""
    return re.sub(r"\[\s+\"(\w+)\",\s+(\{[^{}]*\})\s+\]", lambda m: f'["{m[1]}", {" ".join(m[2].split())}]', text)


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="utf-8")
    print(f"wrote {TARGET}", file=sys.stderr)
