"""Put a full fine-tuning's weights back into safetensors files, one file in memory at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from galley.checkpoint import Reader
from galley.model import DTYPES, load_plain, parameter_names, stored_as_named
from galley.spec import Model
from galley.weights import weight_files


def write_full(folder: str, model: Model, reader: Reader, out: Path) -> None:
    """Write the trained weights to ``out`` in the base model's own files, with its index, in the task's dtype.

    Memory: the largest of the base model's files, and one parameter in fp32. A model whose files have other names
    than its parameters is loaded whole, and saved by transformers, which knows how to name them back.
    """
    if not stored_as_named(folder, model):
        _write_through_model(folder, model, reader, out)
        return
    files, known = weight_files(folder), parameter_names(folder, model)
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


def _write_through_model(folder: str, model: Model, reader: Reader, out: Path) -> None:
    loaded = load_plain(folder, model, DTYPES[model.dtype])
    parameters = dict(loaded.named_parameters())
    for name in reader.names():
        parameters[name].data.copy_(reader.whole(name).view(parameters[name].shape))
    loaded.save_pretrained(str(out), max_shard_size="4GB")


def _copy_index(folder: Path, out: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (out / "model.safetensors").exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {"total_size": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
        (out / index.name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def copy_companions(folder: str, model: Model, out: Path) -> None:
    """Copy what a model folder needs beside its weights: configuration, processors of images, the repository's code."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    config.dtype = DTYPES[model.dtype]
    config.save_pretrained(out)
    for path in Path(folder).glob("*processor_config.json"):
        shutil.copy2(path, out)
    if model.trust_remote_code:
        for path in Path(folder).glob("*.py"):
            shutil.copy2(path, out)
