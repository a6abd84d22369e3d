"""Put a full fine-tuning's weights back into safetensors files, one file in memory at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from galley.checkpoint import Reader
from galley.errors import UserError
from galley.model import DTYPES
from galley.sharded import weight_files
from galley.spec import Model


def aliases(folder: str, model: Model) -> dict[str, str]:
    """Every parameter name, tied duplicates included, to the one name under which training knows it."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    empty.tie_weights()
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def write_full(folder: str, model: Model, reader: Reader, out: Path) -> None:
    """Write the trained weights to ``out`` in the base model's own files, with its index, in the task's dtype.

    Memory: the largest of the base model's files, and one parameter in fp32. Raises ``UserError`` where a trained
    parameter has no place in those files.
    """
    files, known = weight_files(folder), aliases(folder, model)
    lost = sorted(set(reader.names()) - {known.get(name, name) for name in files})
    if lost:
        what = f"{len(lost)} trained weights such as {lost[0]!r} are stored under other names in {folder}"
        raise UserError("export", what, "save the base model once with transformers' save_pretrained and use that")
    trained = set(reader.names())
    for path in sorted(set(files.values())):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in (name for name, where in files.items() if where == path):
                base = file.get_tensor(name)
                source = known.get(name, name)
                value = reader.whole(source).view(base.shape) if source in trained else base
                tensors[name] = value.to(DTYPES[model.dtype]) if value.is_floating_point() else value
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    _copy_index(Path(folder), out)


def _copy_index(folder: Path, out: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {"total_size": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
        (out / index.name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def copy_companions(folder: str, model: Model, out: Path) -> None:
    """Copy what a model folder needs beside its weights: configuration, generation settings, the repository's code."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    config.dtype = DTYPES[model.dtype]
    config.save_pretrained(out)
    if model.trust_remote_code:
        for path in Path(folder).glob("*.py"):
            shutil.copy2(path, out)
