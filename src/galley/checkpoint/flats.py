"""The flat fp32 tensors that a rank's optimizer steps, as a checkpoint's file has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from galley.engine import optimizers
from galley.engine.engine import Fragment

Layout = list[tuple[str, int, int, int, int]]
"""One row a fragment: parameter, start in it, elements, number of the flat tensor, offset in that.

It is written into the file's header as JSON: ``["model.norm.weight", 0, 64, 2, 4096]`` says that elements 0 to 63 of
that parameter are elements 4096 to 4159 of ``weight.2``, ``exp_avg.2`` and ``exp_avg_sq.2``.
"""


def pack(held: Iterable[Fragment], optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Layout]:
    """Weights and optimizer state by name and number of the flat tensor, where they are (no copies), and the layout of
    its fragments.

    Number n of F flat tensors, of N elements (padding included), gives ``weight.n`` and, once a step was taken,
    ``exp_avg.n`` and ``exp_avg_sq.n``, all fp32 [N]: 12 bytes an element. 8-bit state is ``state1.n`` and ``state2.n``,
    uint8 [N], with ``absmax1.n`` and ``absmax2.n``, fp32 [N / 256], and ``step.n``, int64 [1].
    """
    flats, layout = numbered(held)
    tensors: dict[str, torch.Tensor] = {}
    for number, flat in enumerate(flats):
        tensors[f"weight.{number}"] = flat.detach().reshape(-1)
        tensors |= {f"{key}.{number}": value for key, value in optimizers.saved(optimizer, flat).items()}
    return tensors, layout


def numbered(held: Iterable[Fragment]) -> tuple[list[torch.Tensor], Layout]:
    """The flat tensors that the fragments lie in, and which fragment lies where."""
    # By identity: tensors compare element by element. Numbers count in the order in which fragments name the flat
    # tensors, which is the model's order of parameters, so that a resumed run of the same placement numbers them alike.
    flats: list[torch.Tensor] = []
    numbers: dict[int, int] = {}
    layout: Layout = []
    for fragment in held:
        number = numbers.setdefault(id(fragment.flat), len(flats))
        if number == len(flats):
            flats.append(fragment.flat)
        layout.append((fragment.name, fragment.start, fragment.numel, number, fragment.offset))
    return flats, layout


def by_flat(held: Iterable[Fragment]) -> list[list[Fragment]]:
    """The fragments of each flat tensor."""
    groups: dict[int, list[Fragment]] = {}
    for fragment in held:
        groups.setdefault(id(fragment.flat), []).append(fragment)
    return list(groups.values())
