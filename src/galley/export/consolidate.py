"""Put a full fine-tuning's weights back into safetensors files, one file in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.core_model_loading import build_glob_alternation

from galley.checkpoint.checkpoint import Reader
from galley.contract.spec import Model
from galley.model.generation import save_model
from galley.model.model import DTYPES, load_plain, parameter_names, stored_as_named
from galley.model.towers import auto_class
from galley.storage.weights import weight_files


def write_full(folder: str, model: Model, reader: Reader, out: Path) -> None:
    """Write the trained weights to ``out`` in the base model's own files, with its index, in the task's dtype, or in
    fp32 what transformers keeps in that.

    Memory: the largest of the base model's files, and one parameter in fp32. A model whose files have other names
    than its parameters is loaded whole, and saved by transformers, which knows how to name them back.
    """
    if not stored_as_named(folder, model):
        _write_through_model(folder, model, reader, out)
        return
    # Three kinds of names: those of tensors in the base's files (`files`, name to file), which the export keeps; every
    # parameter's, tied ones twice, to the one under which it was trained (`known`); and the trained ones.
    files, known = weight_files(folder), parameter_names(folder, model)
    trained, dtype_of = set(reader.names()), dtypes(folder, model)
    for path in sorted(set(files.values())):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in (name for name, where in files.items() if where == path):
                base = file.get_tensor(name)
                source = known.get(name, name)
                value = reader.whole(source).view(base.shape) if source in trained else base  # fp32, or as in the base
                tensors[name] = value.to(dtype_of(name)) if value.is_floating_point() else value
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    _copy_index(Path(folder), out)


def dtypes(folder: str, model: Model) -> Callable[[str], torch.dtype]:
    """The dtype that transformers loads each tensor in, by its name in the model, when asked for the task's."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    dtype = DTYPES[model.dtype]
    with torch.device("meta"):
        empty = auto_class(config).from_config(config, trust_remote_code=model.trust_remote_code)
    # transformers keeps some modules in fp32 when a model is loaded in 16 bits (_keep_in_fp32_modules: norms, routers).
    kept = list(empty._get_dtype_plan(dtype))
    pattern = build_glob_alternation(kept)[0] if kept else None
    return lambda name: torch.float32 if pattern and pattern.search(name) else dtype


def _write_through_model(folder: str, model: Model, reader: Reader, out: Path) -> None:
    loaded = load_plain(folder, model, DTYPES[model.dtype])
    parameters = dict(loaded.named_parameters())
    for name in reader.names():
        parameters[name].data.copy_(reader.whole(name).view(parameters[name].shape))
    save_model(loaded, out, max_shard_size="4GB")


def _copy_index(folder: Path, out: Path) -> None:
    # The files have the base's names and tensors, so its index holds; only their size may differ, with the dtype.
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
