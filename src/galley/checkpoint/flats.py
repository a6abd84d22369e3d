"""The flat fp32 tensors that a rank's optimizer steps, as a checkpoint's file has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from galley.engine import optimizers
from galley.engine.engine import Fragment

Layout = list[tuple[str, int, int, int, int]]
"""One row a fragment: parameter, start in it, elements, number of the flat tensor, offset in that."""


def pack(held: Iterable[Fragment], optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Layout]:
    """Weights and optimizer state by name and number of the flat tensor, where they are (no copies), and the layout of
    its fragments.
    """
    flats, layout = numbered(held)
    tensors: dict[str, torch.Tensor] = {}
    for number, flat in enumerate(flats):
        tensors[f"weight.{number}"] = flat.detach().reshape(-1)
        tensors |= {f"{key}.{number}": value for key, value in optimizers.saved(optimizer, flat).items()}
    return tensors, layout


def numbered(held: Iterable[Fragment]) -> tuple[list[torch.Tensor], Layout]:
    """The flat tensors that the fragments lie in, and which fragment lies where."""
    flats: dict[int, torch.Tensor] = {}
    layout: Layout = []
    for each in held:
        flats.setdefault(id(each.flat), each.flat)
        layout.append((each.name, each.start, each.numel, list(flats).index(id(each.flat)), each.offset))
    return list(flats.values()), layout


def by_flat(held: Iterable[Fragment]) -> list[list[Fragment]]:
    """The fragments of each flat tensor."""
    found: dict[int, list[Fragment]] = {}
    for each in held:
        found.setdefault(id(each.flat), []).append(each)
    return list(found.values())
