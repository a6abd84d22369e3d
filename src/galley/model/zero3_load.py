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
    # Tying replaces one parameter by the other; zero.Init partitioned both, and the one that is left is filled.
    model.tie_weights()
    _fill(model, weight_files(folder))
    restore_buffers(model, folder, build)
    return model


def _partition_empty(partitioned: Any, parameter: Any) -> None:
    """What zero.Init does with a new parameter, but for one thing: it would broadcast rank 0's copy to all others
    (``_zero_init_param`` in runtime/zero/partition_parameters.py), and these copies are not initialised yet.
    """
    partitioned._convert_to_deepspeed_param(parameter)
    parameter.partition()


def restore_buffers(model: Any, folder: str, build: Callable[[], Any]) -> None:
    """Give the model its buffers in the precision that it computes them in, and those of its files as they lie there.

    ``zero.Init`` rounds every floating tensor made under it to bf16 or fp16, rotary frequencies among them: at
    position 4,000 that turns angles by whole radians, in silence.
    """
    # A second model of the same class, outside zero.Init: its parameters are on the meta device and take no memory, its
    # buffers are computed as without ZeRO.
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
    """Copy this rank's partition of every parameter out of the files, opening each of them once.

    safetensors maps a file: of a tensor that is read, only the pages of this rank's slice need to come from the disk.
    """
    by_file: dict[Path, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        by_file.setdefault(files[name], []).append((name, parameter))
    for path, parameters in by_file.items():
        with safe_open(path, "pt") as file:
            for name, parameter in parameters:
                copy_partition(parameter, file.get_tensor(name))


def partition_start(parameter: Any) -> int:
    """Where this rank's partition of a ZeRO-3 parameter starts in the flattened parameter.

    Partitions are equal, ceil(elements / ranks) each; the last ones may reach beyond the parameter, or lie there whole.
    """
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    return int(rank * parameter.ds_tensor.ds_numel)


def subtract(parameter: Any, whole: torch.Tensor) -> None:
    """Subtract this rank's slice of ``whole`` (fp32, the parameter's shape) from its partition, rounding once."""
    start, partition = partition_start(parameter), parameter.ds_tensor.data
    part = whole.reshape(-1)[start : start + partition.numel()].to(partition.device)  # shorter where padding begins
    partition[: part.numel()].copy_(partition[: part.numel()].float() - part)
    parameter.ds_secondary_tensor = None


def copy_partition(parameter: Any, whole: torch.Tensor) -> None:
    """Copy this rank's slice of ``whole`` (any float dtype, the parameter's shape) into its partition.

    The second copy that ZeRO++ hpZ keeps inside each node is stale then; DeepSpeed makes it anew where there is none.
    """
    start = partition_start(parameter)
    part = whole.reshape(-1)[start : start + parameter.ds_tensor.ds_numel]
    parameter.ds_tensor.data[: part.numel()].copy_(part)
    parameter.ds_secondary_tensor = None
