"""Build a model under ZeRO-3 without ever holding it whole: each rank reads only its own slice of each weight.

transformers' own ZeRO-3 loading reads all files on rank 0 and scatters them, so that rank 0 needs the host memory of
the whole model. Here every rank maps the safetensors files and copies its partition of each parameter out of them:
no collective, and one slice of private memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.initialization import no_init_weights

from galley.model.loading import sources
from galley.storage.weights import weight_files


def load(folder: str, build: Callable[[], Any], config: dict[str, Any]) -> Any:
    """Build the model partitioned over all ranks (``deepspeed.zero.Init``) and fill each rank's partitions."""
    # No dtype argument: on a CPU zero.Init ignores it (0.19.8) and follows the configuration only when it is absent.
    partitioned = deepspeed.zero.Init(config_dict_or_path=config)
    partitioned._zero_init_param = partial(_partition_empty, partitioned)
    with no_init_weights(), partitioned:
        model = build()
    model.tie_weights()
    _fill(model, weight_files(folder))
    restore_buffers(model, folder, build)
    return model


def _partition_empty(partitioned: Any, parameter: Any) -> None:
    """What zero.Init does with a new parameter, without sending rank 0's (uninitialised) copy of it to all others."""
    partitioned._convert_to_deepspeed_param(parameter)
    parameter.partition()


def restore_buffers(model: Any, folder: str, build: Callable[[], Any]) -> None:
    """Give the model its buffers in the precision that it computes them in, and those of its files as they lie there.

    ``zero.Init`` rounds every floating tensor made under it to bf16 or fp16, rotary frequencies among them: at
    position 4,000 that turns angles by whole radians, in silence.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        exact = build()
    files = weight_files(folder)
    stored = sources(exact, files)
    for name, module in exact.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            persistent = key not in module._non_persistent_buffers_set
            path = f"{name}.{key}" if name else key
            if persistent and path in stored:
                with safe_open(files[stored[path]], "pt") as file:
                    buffer.copy_(file.get_tensor(stored[path]))
            home = model.get_submodule(name)
            home.register_buffer(key, buffer.to(getattr(home, key).device), persistent=persistent)


def _fill(model: Any, files: dict[str, Path]) -> None:
    by_file: dict[Path, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        by_file.setdefault(files[name], []).append((name, parameter))
    for path, parameters in by_file.items():
        with safe_open(path, "pt") as file:
            for name, parameter in parameters:
                copy_partition(parameter, file.get_tensor(name))


def partition_start(parameter: Any) -> int:
    """Where this rank's partition of a ZeRO-3 parameter starts in the flattened parameter."""
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return int(rank * parameter.ds_tensor.ds_numel)


def subtract(parameter: Any, whole: torch.Tensor) -> None:
    """Subtract this rank's slice of ``whole`` (fp32, the parameter's shape) from its partition, rounding once."""
    start, mine = partition_start(parameter), parameter.ds_tensor.data
    part = whole.reshape(-1)[start : start + mine.numel()].to(mine.device)
    mine[: part.numel()].copy_(mine[: part.numel()].float() - part)
    parameter.ds_secondary_tensor = None


def copy_partition(parameter: Any, whole: torch.Tensor) -> None:
    """Copy this rank's slice of ``whole`` (any float dtype, the parameter's shape) into its partition.

    The second copy that ZeRO++ hpZ keeps inside each node is stale then; DeepSpeed makes it anew where there is none.
    """
    start = partition_start(parameter)
    mine = whole.reshape(-1)[start : start + parameter.ds_tensor.ds_numel]
    parameter.ds_tensor.data[: mine.numel()].copy_(mine)
    parameter.ds_secondary_tensor = None
