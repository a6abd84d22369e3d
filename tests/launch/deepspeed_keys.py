"""Write ``launch/galley_launch/deepspeed_keys.json`` from the DeepSpeed that is installed.

    DS_ACCELERATOR=cpu python tests/launch/deepspeed_keys.py

Part of DeepSpeed's configuration is pydantic models: their fields are listed. The rest it reads by hand: there, a
dictionary that remembers what it was asked for is read instead of a real one.
"""

import json
import sys
import typing
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[2] / "launch" / "galley_launch" / "deepspeed_keys.json"

# Read outside DeepSpeedConfig: by the engine, by transformers (the other half of the HF integration), or by AutoTP.
_ELSEWHERE = ("sequence_parallel_size",)
# Blocks that Galley refuses when they are on, and whose inside is read far from the configuration.
_ANYTHING = (
    "amp",
    "autotuning",
    "compression_training",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "pipeline",
    "quantize_training",
)
# Their parameters depend on the type; galley_launch.ds_blocks knows those that a recipe can say.
_TYPED = {"optimizer": ("type", "legacy_fusion"), "scheduler": ("type",)}


class Asked(dict[str, Any]):
    """A configuration that has every block but no value, and remembers each key it was asked for."""

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
        if key not in self.removed:
            self.seen.setdefault(key, {})
        if key == "train_micro_batch_size_per_gpu":
            return 1
        return Asked(self.seen[key]) if key in ("checkpoint", "data_types") else default

    def __getitem__(self, key: str) -> Any:
        return {"dtype": "bfloat16", "type": "Adam", "lower_precision_safe_modules": []}.get(
            key, Asked(self.seen.setdefault(key, {}))
        )


def asked_keys() -> dict[str, Any]:
    """Top-level keys, and those of blocks that are read by hand."""
    from deepspeed.runtime import config

    seen: dict[str, Any] = {}
    config.DeepSpeedConfig(Asked(seen, frozenset(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)))
    return seen


def model_keys(model: type) -> dict[str, Any]:
    """Fields of a pydantic model, nested ones too."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if (field.json_schema_extra or {}).get("deprecated"):
            continue
        parts = [field.annotation, *typing.get_args(field.annotation)]
        inner = [part for part in parts if isinstance(part, type) and hasattr(part, "model_fields")]
        found[field.alias or name] = model_keys(inner[0]) if inner else None
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


def generate() -> str:
    """The bytes of the data file."""
    import deepspeed
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    keys = {name: inner or None for name, inner in asked_keys().items()} | dict.fromkeys(_ELSEWHERE)
    for name, model in models().items():
        keys[name] = model_keys(model)
    keys["timers"] = {"throughput": model_keys(DeepSpeedThroughputTimerConfig)}
    keys |= {name: dict.fromkeys(words) | {"params": "*"} for name, words in _TYPED.items()}
    keys |= dict.fromkeys(_ANYTHING, "*")
    body = {"deepspeed": deepspeed.__version__, "keys": keys}
    return json.dumps(_none_below(body), indent=1, sort_keys=True) + "\n"


def _none_below(tree: Any) -> Any:
    return {key: _none_below(value) or None for key, value in tree.items()} if isinstance(tree, dict) else tree


if __name__ == "__main__":
    TARGET.write_text(generate(), encoding="utf-8")
    print(f"wrote {TARGET}", file=sys.stderr)
