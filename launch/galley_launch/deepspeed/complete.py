"""Finish a DeepSpeed configuration: a preset, or the user's own JSON full of ``"auto"``, becomes a complete dict.

Where the JSON has ``"auto"`` or nothing, it gets the recipe's value. Values that it does have agree with the recipe:
:mod:`galley_launch.deepspeed.settle` has compared the two before.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley_launch.base import assets
from galley_launch.base.devices import Devices
from galley_launch.base.grammar import nearest
from galley_launch.base.problems import Problem
from galley_launch.deepspeed.batch import accumulation
from galley_launch.deepspeed.read import read
from galley_launch.recipe.model_facts import Facts
from galley_launch.recipe.schema import Recipe

Config = dict[str, Any]
_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_HPZ = "zero_optimization.zero_hpz_partition_size"
_NVME = "zero_optimization.offload_optimizer.nvme_path"
_NEVER = 10**9  # steps_per_print: the loop prints its own lines, and DeepSpeed's would repeat them.


def find(name: str, beside: Path | None) -> tuple[Config, str]:
    """The configuration ``name``, and what messages call it. Raises ``UserError`` where there is none.

    What looks like a path is looked for in the working directory, then ``beside`` (the folder of the recipe's file);
    any other name in ``./ds_configs``, then among the shipped presets.
    """
    paths = [Path(name)] if beside is None else [Path(name), beside / name]
    looks_like_path = "/" in name or bool(Path(name).suffix)
    if not looks_like_path:
        paths = [Path("ds_configs", f"{name}.json"), assets.folder("ds_configs") / f"{name}.json"]
    for path in paths:
        if path.is_file():
            return read(path), str(path) if looks_like_path else name
    if looks_like_path:
        raise UserError("deepspeed", f"no file {name}", "give a path to a JSON file, or a preset's name")
    presets = [path.stem for path in assets.folder("ds_configs").glob("*.json")]
    raise UserError("deepspeed", f"no preset {name!r}", nearest(name, presets))


def reopen(config: Config, other_device: bool) -> Config:
    """A finished configuration whose values that follow from the placement are ``"auto"`` again.

    ``other_device``: whether the run moves between GPUs and CPUs, so that what follows from the device is reopened too.
    """
    config = copy.deepcopy(config)
    # Only booleans follow from the device (overlap_comm, pin_memory); bucket sizes follow from the model, and stay.
    device_keys = tuple(_autos(Facts(), "cpu")) if other_device else ()
    # A second partition may be absent: written as "auto" then, it would be switched on.
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


def _put_batch(config: Config, recipe: Recipe, ranks: int) -> None:
    config["train_batch_size"] = recipe.samples_per_step
    config["train_micro_batch_size_per_gpu"] = recipe.micro_batch
    config["gradient_accumulation_steps"] = accumulation(recipe, ranks)
    config["gradient_clipping"] = recipe.optimizer.clip


def _put_precision(config: Config, recipe: Recipe, stage: int) -> None:
    """Switch on ``bf16`` or ``fp16``, or ``torch_autocast`` where ZeRO-0 trains in bf16, or none for fp32.

    In stages 1 to 3 the weights have the half-precision dtype, the optimizer keeps fp32 copies, and gradients
    accumulate in ``grad_accum_dtype``. fp32 weights accumulate in fp32 without a setting. ZeRO-0 in bf16 cannot
    accumulate in fp32 (DeepSpeed 0.19: NotImplementedError): there the trained weights stay fp32, and autocast computes
    in bf16.
    """
    dtype = recipe.model.dtype
    fp16, bf16 = config.pop("fp16", {}), config.pop("bf16", {})
    autocast, types = config.pop("torch_autocast", {}), config.pop("data_types", {})
    types = {key: value for key, value in types.items() if key == "keep_in_fp32_modules" and value != "auto"}
    if dtype != "float32" and stage > 0:
        name, block = ("bf16", bf16) if dtype == "bfloat16" else ("fp16", fp16)
        config[name] = block | {"enabled": True}
        types["grad_accum_dtype"] = {"float32": "fp32", "bfloat16": "bf16"}[recipe.optimizer.grad_dtype]
    elif dtype != "float32":
        config["torch_autocast"] = autocast | {"enabled": True, "dtype": "bfloat16"}
    if types:
        config["data_types"] = types


def _autos(facts: Facts, device: str, per_node: int = 1) -> dict[str, Any]:
    """The value of each "auto" that the recipe has no key for. None: it needs the hidden size, which is not known.

    ``per_node``: ranks on each node. The bucket sizes are those of transformers' DeepSpeed integration, so that files
    written for it mean the same here.
    """
    # All sizes are numbers of elements, not of bytes: a bucket as large as one hidden x hidden weight matrix holds
    # hidden² elements, twice as many bytes in bf16. Parameters below the persistence threshold (norms, biases, small
    # adapters) stay whole on every rank under ZeRO-3 instead of being gathered for each use.
    hidden, cuda = facts.hidden_size, device == "cuda"
    return {
        "zero_optimization.reduce_bucket_size": hidden and hidden * hidden,
        "zero_optimization.stage3_prefetch_bucket_size": hidden and hidden * hidden * 9 // 10,  # 0.9, in integers
        "zero_optimization.stage3_param_persistence_threshold": hidden and hidden * 10,
        _HPZ: per_node,  # hpZ keeps a second partition inside each node, so that its gathers do not cross nodes
        # Reducing beside the backward pass takes CUDA streams, and pinned memory a GPU that copies from it.
        "zero_optimization.overlap_comm": cuda,
        "zero_optimization.offload_optimizer.pin_memory": cuda,
        "zero_optimization.offload_param.pin_memory": cuda,
    }


def _fill_autos(config: Config, values: Config, stage: int, model: str, label: str) -> None:
    """Replace each "auto" by its value. One without a rule is dropped, so that DeepSpeed's default applies."""
    for path in _auto_paths(config):
        unused = stage < 3 and ("stage3_" in path or path == _HPZ)
        if path not in values or unused:
            _drop(config, path)
        elif values[path] is None:
            what = f'{path} "auto" needs the hidden size of {model}, which is not known here'
            raise UserError(f"deepspeed {label}", what, "write a number there, or give the model as a local folder")
        else:
            _put(config, path, values[path])


def _drop(config: Config, path: str) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        config = config[section]
    del config[leaf]


def _auto_paths(config: Config, prefix: str = "") -> list[str]:
    paths = []
    for key, value in config.items():
        if value == "auto":
            paths.append(prefix + key)
        elif isinstance(value, dict):
            paths += _auto_paths(value, f"{prefix}{key}.")
    return paths


def broken(config: Config, where: Devices) -> list[Problem]:
    """The problem of a second partition (ZeRO++ hpZ) whose size does not divide the number of ranks; else empty."""
    ranks = where.nodes * where.ranks
    size = _at(config, _HPZ) or 1
    if size == "auto" or ranks % int(size) == 0:
        return []
    return [Problem(f"{_HPZ} {size} does not divide {ranks} ranks", 'write "auto" there: the ranks of a node')]


def complete(config: Config, label: str, recipe: Recipe, where: Devices, facts: Facts) -> Config:
    """The finished DeepSpeed dict for ``recipe`` on all ranks of all nodes. ``label`` names ``config`` in messages.

    ``config`` agrees with the recipe (:func:`galley_launch.deepspeed.settle.settle`). Raises ``UserError`` for a batch
    that does not split, and for an ``"auto"`` that needs a fact of the model that is not known.
    """
    config = copy.deepcopy(config)
    # The loop makes the optimizer and the schedule itself, from the recipe, so DeepSpeed must not make its own.
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    stage = int(_at(config, "zero_optimization.stage") or 0)
    # "auto" is each node's own scratch directory, which only its ranks know: they fill it in.
    if _at(config, _NVME) == "auto":
        del config["zero_optimization"]["offload_optimizer"]["nvme_path"]
    _put_batch(config, recipe, where.nodes * where.ranks)
    _put_precision(config, recipe, stage)
    _fill_autos(config, _autos(facts, where.kind, where.ranks), stage, recipe.model.path, label)
    config.setdefault("steps_per_print", _NEVER)
    config.setdefault("wall_clock_breakdown", False)
    return config
