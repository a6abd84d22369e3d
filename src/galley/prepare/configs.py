"""Whether a model's ``config.json`` can be that of its weights, found out before anything is built from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley.contract.files import read_json
from galley.storage.weights import read_headers

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
SIZES = ("hidden_size", "n_embd", "d_model", "vocab_size")
COUNTS = ("num_attention_heads", "n_head", "num_key_value_heads", "intermediate_size", "head_dim")
"""Sizes that are 0 where an architecture has no such thing."""
LARGEST = 1 << 31
"""No size of a layer is larger."""


def check_config(folder: Path, trust: bool) -> None:
    """Raise :class:`UserError` where ``config.json`` gives sizes that no model has, or transformers refuses it.

    A layer has a tensor at least: with more layers than tensors, building the model would take all memory and time.
    """
    config = read_json(folder / "config.json") or {}
    parts = [config]
    if isinstance(text := config.get("text_config"), dict):
        parts.append(text)
    for part in parts:
        for wrong in _wrong(part, len(read_headers(folder))):
            raise UserError("model.path", f"'{folder}/config.json' says {wrong}", "download the model again")
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # of a damaged file, anything
        what = f"transformers cannot use '{folder}/config.json': {' '.join(str(error).split())[:200]}"
        raise UserError("model.path", what, "download the model again, or update transformers") from error


def _wrong(config: dict[str, Any], tensors: int) -> Iterator[str]:
    """Sizes that are none, as ``name value``."""
    for name in (*LAYERS, *SIZES, *COUNTS):
        value, most = config.get(name), tensors if name in LAYERS else LARGEST
        if value is None or isinstance(value, list):  # some architectures give one for each layer
            continue
        if type(value) is not int or not (name not in COUNTS) <= value <= most:
            over = f", and its weights are {tensors} tensors" if name in LAYERS and type(value) is int else ""
            yield f"{name} {str(value)[:60]!r}{over}" if isinstance(value, str) else f"{name} {str(value)[:60]}{over}"
