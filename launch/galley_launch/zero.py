"""Finish a DeepSpeed configuration: a preset, or the user's own JSON full of ``"auto"``, becomes a complete dict.

The recipe rules. Where the JSON repeats what the recipe says, the two must agree; where it says ``"auto"``, it gets the
recipe's value; where it says something else, both are named and nothing starts.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from galley.errors import UserError
from galley_launch import assets
from galley_launch.arguments import nearest
from galley_launch.devices import Devices
from galley_launch.ds_blocks import drop_optimizer_and_scheduler
from galley_launch.facts import Facts
from galley_launch.recipe import Recipe

Config = dict[str, Any]
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_HPZ = "zero_optimization.zero_hpz_partition_size"
_NVME = "zero_optimization.offload_optimizer.nvme_path"
_NEVER = 10**9  # steps_per_print: DeepSpeed's own lines would only repeat the loop's.


def find(name: str, beside: Path | None) -> tuple[Config, str]:
    """The configuration ``name`` and where it is: a path, else a name in ``./ds_configs``, else a shipped one."""
    paths = [Path(name)] if beside is None else [Path(name), beside / name]
    looks_like_path = name.endswith(".json") or "/" in name
    if not looks_like_path:
        paths = [Path("ds_configs", f"{name}.json"), assets.folder("ds_configs") / f"{name}.json"]
    for path in paths:
        if path.is_file():
            return read(path), str(path) if looks_like_path else name
    if looks_like_path:
        raise UserError("deepspeed", f"no file {name}", "give a path to a JSON file, or a preset's name")
    presets = [path.stem for path in assets.folder("ds_configs").glob("*.json")]
    raise UserError("deepspeed", f"no preset {name!r}", nearest(name, presets))


def read(path: Path) -> Config:
    """The object in a JSON file; a repeated key is refused, where ``json`` alone would let the last one win."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_repeats)
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"not readable as JSON: {error}", "mend it") from None
    if not isinstance(config, dict):
        raise UserError(str(path), "holds no JSON object", 'write {"zero_optimization": {"stage": 2}} or the like')
    return config


def _no_repeats(pairs: list[tuple[str, Any]]) -> Config:
    keys = [key for key, _ in pairs]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def accumulation(recipe: Recipe, ranks: int) -> int:
    """Micro-batches a step. Raises ``UserError`` with the whole product where the batch cannot be split so."""
    samples, step = recipe.samples_per_step, recipe.micro_batch * ranks
    if samples % step == 0:
        return samples // step
    unit, factor = ("samples", 1) if recipe.batch.samples else ("tokens", recipe.data.max_length)
    below, above = samples // step * step * factor, -(-samples // step) * step * factor
    near = [f"batch.{unit}={value}" for value in (below, above) if value]
    fits = [size for size in range(1, recipe.micro_batch) if samples % (size * ranks) == 0]
    near += [f"micro_batch={fits[-1]}"] if fits else []
    what = (
        f"{samples} samples a step / (micro_batch {recipe.micro_batch} x ranks {ranks}) = {samples / step:.4g}, "
        "which is not a whole number of micro-batches"
    )
    raise UserError("batch", what, f"try {' or '.join(near)}")


def reopen(config: Config, other_device: bool) -> Config:
    """A finished configuration with everything ``"auto"`` that another placement may change."""
    config = copy.deepcopy(config)
    device_keys = tuple(_autos(Facts(), "cpu")) if other_device else ()
    ranks_keys = (*_BATCH_KEYS, _HPZ) if _at(config, _HPZ) else _BATCH_KEYS
    for path in (*ranks_keys, *(path for path in device_keys if isinstance(_at(config, path), bool))):
        _put(config, path, "auto")
    return config


def _at(config: Config, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key, {}) if isinstance(config, dict) else {}
    return None if config == {} else config


def _put(config: Config, path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[leaf] = value


def _settle(config: Config, path: str, value: Any, because: str, label: str) -> None:
    """Make ``path`` hold ``value``, which the recipe gives; refuse a different one."""
    said = _at(config, path)
    if said not in (None, "auto", value) or (isinstance(said, bool) != isinstance(value, bool) and said == value):
        raise UserError(
            f"deepspeed {label}",
            f"{path} {json.dumps(said)}, but {because} makes it {json.dumps(value)}",
            'write "auto" there, or change the recipe',
        )
    _put(config, path, value)


def _settle_batch(config: Config, recipe: Recipe, ranks: int, label: str) -> None:
    micro, steps = recipe.micro_batch, accumulation(recipe, ranks)
    samples = recipe.samples_per_step
    unit = f"batch.samples {samples}" if recipe.batch.samples else f"batch.tokens {recipe.batch.tokens}"
    _settle(config, "train_batch_size", samples, unit, label)
    _settle(config, "train_micro_batch_size_per_gpu", micro, f"micro_batch {micro}", label)
    product = f"{samples} samples a step / (micro_batch {micro} x ranks {ranks})"
    _settle(config, "gradient_accumulation_steps", steps, product, label)
    _settle(config, "gradient_clipping", recipe.optimizer.clip, f"optimizer.clip {recipe.optimizer.clip}", label)


def _settle_precision(config: Config, recipe: Recipe, stage: int, label: str) -> None:
    dtype = recipe.model.dtype
    half = dtype != "float32"
    _settle(config, "fp16.enabled", dtype == "float16", f"model.dtype {dtype}", label)
    _settle(config, "bf16.enabled", dtype == "bfloat16", f"model.dtype {dtype}", label)
    grads = {"float32": "fp32", "bfloat16": "bf16"}[recipe.optimizer.grad_dtype]
    _settle(config, "data_types.grad_accum_dtype", grads, f"optimizer.grad_dtype {recipe.optimizer.grad_dtype}", label)
    del config["bf16" if dtype == "float16" else "fp16"]
    if not half or stage == 0:
        # Plain fp32 weights accumulate in fp32 by nature, and ZeRO-0 in bf16 cannot accumulate in fp32 at all
        # (DeepSpeed 0.19: NotImplementedError). There the weights that train stay fp32, and autocast computes in bf16.
        del config["bf16"], config["data_types"]["grad_accum_dtype"]
        if not config["data_types"]:
            del config["data_types"]
    if half and stage == 0:
        _settle(config, "torch_autocast.enabled", True, "ZeRO stage 0 with model.dtype bfloat16", label)
        _settle(config, "torch_autocast.dtype", "bfloat16", f"model.dtype {dtype}", label)


def _autos(facts: Facts, device: str, per_node: int = 1) -> dict[str, Any]:
    """What "auto" stands for, where neither the recipe nor the batch says it. None: needs an unknown fact.

    The bucket sizes are those of transformers' DeepSpeed integration, so that its JSON files mean the same here.
    """
    hidden, cuda = facts.hidden_size, device == "cuda"
    return {
        "zero_optimization.reduce_bucket_size": hidden and hidden * hidden,
        "zero_optimization.stage3_prefetch_bucket_size": hidden and hidden * hidden * 9 // 10,
        "zero_optimization.stage3_param_persistence_threshold": hidden and hidden * 10,
        _HPZ: per_node,
        "zero_optimization.overlap_comm": cuda,
        "zero_optimization.offload_optimizer.pin_memory": cuda,
        "zero_optimization.offload_param.pin_memory": cuda,
    }


def _fill_autos(config: Config, values: dict[str, Any], model: str, label: str) -> None:
    for path in _auto_paths(config):
        if path not in values:
            raise UserError(f"deepspeed {label}", f'{path} "auto" has no rule', "write the value itself")
        if values[path] is None:
            what = f'{path} "auto" needs the hidden size of {model}, which is not known here'
            raise UserError(f"deepspeed {label}", what, "write a number there, or give the model as a local folder")
        _put(config, path, values[path])


def _auto_paths(config: Config, prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        if value == "auto":
            found.append(prefix + key)
        elif isinstance(value, dict):
            found += _auto_paths(value, f"{prefix}{key}.")
    return found


def _check_hpz(config: Config, ranks: int, label: str) -> None:
    size = _at(config, _HPZ) or 1
    if not isinstance(size, int) or ranks % size:
        what = f"{_HPZ} {json.dumps(size)} does not divide {ranks} ranks"
        raise UserError(f"deepspeed {label}", what, 'write "auto" there: the ranks of a node')


def complete(config: Config, label: str, recipe: Recipe, where: Devices, facts: Facts) -> Config:
    """The finished DeepSpeed dict for ``recipe`` on all ranks of all nodes. ``label`` names ``config`` in messages.

    ``config`` is what ``ds_keys.read_keys`` gave. Raises ``UserError`` for contradictions with the recipe, batches
    that do not split, and any ``"auto"`` that cannot be settled.
    """
    config = copy.deepcopy(config)
    drop_optimizer_and_scheduler(config, label, recipe)
    stage = _at(config, "zero_optimization.stage") or 0
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed {label}", f"zero_optimization.stage {stage!r} is none of 0, 1, 2, 3", "choose one")
    if _at(config, _NVME) == "auto":  # each node's own scratch directory, which only its ranks know
        del config["zero_optimization"]["offload_optimizer"]["nvme_path"]
    ranks = where.nodes * where.ranks
    _settle_batch(config, recipe, ranks, label)
    _settle_precision(config, recipe, int(stage), label)
    _fill_autos(config, _autos(facts, where.kind, where.ranks), recipe.model.path, label)
    _check_hpz(config, ranks, label)
    config.setdefault("steps_per_print", _NEVER)
    config.setdefault("wall_clock_breakdown", False)
    return config
