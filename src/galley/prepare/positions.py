"""How long a sample may be: an architecture with a table of vectors for positions has no more positions than rows."""

from __future__ import annotations

from typing import Any

import torch

from galley.contract.errors import UserError
from galley.model.towers import unused_by_text

_SETTINGS = {"mpt": "max_seq_len"}
"""Architectures that make a bias of so many positions in each forward pass."""


def longest(model: Any) -> tuple[int, str] | None:
    """Positions that a table of ``model`` has, and the table's name; None where positions are computed (rotary, ALiBi).

    ``model`` may be on the meta device.
    """
    towers = tuple(f"{name}." for name in unused_by_text(model))
    tables = [table for table in (*_learned(model), *_precomputed(model)) if not table[1].startswith(towers)]
    setting = _SETTINGS.get(model.config.model_type)
    if setting:
        tables.append((int(getattr(model.config, setting)), f"{setting} in config.json"))
    return min(tables) if tables else None


def _learned(model: Any) -> list[tuple[int, str]]:
    """Embeddings that are named after positions; some keep their first rows for padding."""
    tables = []
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("pos" in leaf or leaf == "wpe") and "relative" not in name:
            tables.append((module.num_embeddings - int(getattr(module, "offset", 0)), f"{name}.weight"))
    return tables


def _precomputed(model: Any) -> list[tuple[int, str]]:
    """Buffers that a forward pass indexes by position (GPT-J's angles, GPT-Neo's mask), but for those that can grow."""
    limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    tables = []
    for name, buffer in model.named_buffers():
        home, _, leaf = name.rpartition(".")
        mask = leaf == "bias" and buffer.dim() == 4 and buffer.shape[-1] == buffer.shape[-2] > 1
        rows = "pos" in leaf and buffer.dim() == 2 and limit in buffer.shape
        if not hasattr(model.get_submodule(home), "make_weights") and (mask or rows):
            tables.append((int(buffer.shape[-1]) if mask else limit, name))
    return tables


def check_positions(model: Any, max_length: int) -> None:
    """Raise :class:`UserError` where ``model`` has fewer positions than a sample of ``max_length`` tokens."""
    limit = longest(model)
    if limit and max_length > limit[0]:
        positions, table = limit
        what = f"{max_length} is more than the {positions} positions that the model has ({table})"
        raise UserError("data.max_length", what, f"use data.max_length={positions} or less")
