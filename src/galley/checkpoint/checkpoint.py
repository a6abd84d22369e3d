"""Checkpoints that no kill can tear, and that any number of ranks and any ZeRO stage can load.

Each rank writes the flat fp32 tensors that its optimizer steps (weights and both moments) to one safetensors file,
whose header says which slice of which parameter lies where. Nothing is pickled, frozen weights are not written, and a
reader takes just the slices that it needs, whatever the ranks and the ZeRO stage that wrote them. The manifest is
written last, and the whole directory then gets the checkpoint's name: without a manifest there is no checkpoint.
``saving`` writes them; here is what they hold, and how they are read.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from galley.checkpoint.flats import by_flat, numbered
from galley.contract import files
from galley.contract.errors import UserError
from galley.contract.rundir import Checkpoint, RunDir, read_json
from galley.engine import optimizers, swap
from galley.engine.engine import Engine, base_optimizer, fragments, refresh_gathered, set_loss_scale, set_weight
from galley.engine.optimizers import MOMENTS
from galley.model.model import trained


@dataclass
class State:
    """Where the loop is; everything else follows from the task and the step."""

    step: int = 0
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps that were left out, for their gradients overflowed fp16."""
    loss_scale: dict[str, float] | None = None
    """With fp16: ``engine.loss_scale`` after the step."""
    best_loss: float | None = None
    bad_evaluations: int = 0
    held_out_loss: float | None = None
    held_out_step: int | None = None

    def evaluated(self, loss: float) -> bool:
        """Keep the held-out loss after this step; returns whether it is the best yet."""
        self.held_out_loss, self.held_out_step = loss, self.step
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self.best_loss = loss
        self.bad_evaluations = 0 if is_best else self.bad_evaluations + 1
        return is_best


FORMER = frozenset({"best_step"})
"""What a state had in manifests of earlier versions, and nothing reads."""


def best_checkpoint(run: RunDir) -> Checkpoint | None:
    """The checkpoint with the lowest held-out loss, among those that were measured at their own step."""
    measured: list[tuple[float, int, Checkpoint]] = []
    for checkpoint in run.checkpoints():
        loss = files.number((read_json(checkpoint.manifest) or {}).get("held_out_loss"), math.inf)
        if math.isfinite(loss):
            measured.append((loss, checkpoint.step, checkpoint))
    return min(measured)[2] if measured else None  # of equals the earliest: no two have one step


def remove(path: Path) -> None:
    """Delete a checkpoint's directory, if it is there. The manifest goes first: without it no checkpoint exists.

    A path that does not exist is left alone, even where it appears meanwhile: a later attempt may be making it.
    """
    manifest = Checkpoint(path).manifest
    if manifest.exists():
        manifest.unlink()
    if path.exists():
        shutil.rmtree(path)


class StoredFragment(NamedTuple):
    """A slice of a parameter in a file of a checkpoint; see ``flats.Layout``."""

    start: int
    """First element in the flattened parameter."""
    numel: int
    """Elements."""
    file: Any
    """The open safetensors file."""
    number: int
    """Of the flat tensor."""
    offset: int
    """First element in the flat tensor."""


class Reader:
    """Reads slices of parameters out of a checkpoint, mapping its files rather than loading them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files: list[Any] = [safe_open(path, "pt") for path in sorted(checkpoint.root.glob("rank-*.safetensors"))]
        self.fragments: dict[str, list[StoredFragment]] = {}
        for file in self.files:
            for name, start, numel, number, offset in json.loads(file.metadata()["fragments"]):
                self.fragments.setdefault(name, []).append(StoredFragment(start, numel, file, number, offset))

    def names(self) -> list[str]:
        """Parameters in the checkpoint."""
        return list(self.fragments)

    def has_moments(self) -> bool:
        """Whether the optimizer had taken a step."""
        return any(key.startswith(MOMENTS[0]) for file in self.files for key in file.keys())  # noqa: SIM118

    def fill(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Copy elements ``start…`` of ``kind`` (weight or a moment) of a parameter into the flat tensor ``into``."""
        # Who writes and who reads cut a parameter at different elements: of each stored fragment that overlaps with
        # start … end, the overlap is read, [low, high) counted in the parameter, and nothing else of the file.
        end = start + into.numel()
        for stored in self.fragments[name]:
            low, high = max(start, stored.start), min(end, stored.start + stored.numel)
            if low < high:
                source = stored.file.get_slice(f"{kind}.{stored.number}")
                in_flat = stored.offset - stored.start  # from elements of the parameter to those of the flat tensor
                into[low - start : high - start].copy_(source[low + in_flat : high + in_flat])

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return max(stored.start + stored.numel for stored in self.fragments[name])

    def whole(self, name: str) -> torch.Tensor:
        """The fp32 weight of a parameter, flattened."""
        value = torch.empty(self.numel(name), dtype=torch.float32)
        self.fill("weight", name, 0, value)
        return value


def load(checkpoint: Checkpoint, engine: Engine) -> State:
    """Put a checkpoint into ``engine``: weights, fp32 copies and moments. Bit-identical under the same placement.

    Raises ``UserError`` where the checkpoint is of another set of parameters.
    """
    reader, parameters = Reader(checkpoint), trained(engine.module)
    if set(reader.names()) != set(parameters):
        odd = sorted(set(reader.names()) ^ set(parameters))[0]
        raise UserError(str(checkpoint.root), f"is of another model or method ({odd!r})", "use a new run: name=…")
    written = json.loads(checkpoint.manifest.read_text(encoding="utf-8"))["state"]
    state = State(**{name: value for name, value in written.items() if name not in FORMER})
    # Weights first, then the optimizer's fp32 copies: both come from the same fp32 values, the weights rounded to the
    # dtype of the forward pass as the optimizer's step rounds them, so that the next loss is the same to the bit.
    refresh_gathered(engine, before=True)
    for name, parameter in parameters.items():
        set_weight(parameter, reader.whole(name))
    _load_optimizer(reader, engine, state.step - state.skipped)
    _load_packed(reader, checkpoint, engine)
    refresh_gathered(engine, before=False)
    set_loss_scale(engine, state.loss_scale)
    return state


def _load_optimizer(reader: Reader, engine: Engine, step: int) -> None:
    optimizer, moments = base_optimizer(engine), reader.has_moments()
    for held in by_flat(fragments(engine)):
        flat = held[0].flat
        with swap.resident(engine, flat, changes=True):
            if moments and flat not in optimizer.state:
                optimizer.state[flat] = optimizers.fresh(optimizer, flat, step)
            state = optimizer.state[flat] if moments else {}
            targets = {"weight": flat.data} | {key: state[key] for key in MOMENTS if key in state}
            for fragment in held:
                elements = slice(fragment.offset, fragment.offset + fragment.numel)
                for kind, target in targets.items():
                    reader.fill(kind, fragment.name, fragment.start, target.view(-1)[elements])


def _load_packed(reader: Reader, checkpoint: Checkpoint, engine: Engine) -> None:
    """Load 8-bit optimizer state into the flat tensors that it was saved of.

    It cannot be sliced as fp32 moments are: 256 values share a scale, and such a block may span two parameters.
    """
    optimizer, rank = base_optimizer(engine), torch.distributed.get_rank()
    if not optimizers.packs(optimizer):
        return
    manifest = read_json(checkpoint.manifest) or {}
    flats, layout = numbered(fragments(engine))
    file = reader.files[min(rank, len(reader.files) - 1)]
    here = (torch.distributed.get_world_size(), engine.zero_optimization_stage())
    world, stage = manifest["world"], manifest["zero_stage"]
    if here != (world, stage) or [list(row) for row in layout] != json.loads(file.metadata()["fragments"]):
        what = f"has 8-bit optimizer state, which is of {world} ranks under ZeRO-{stage}"
        raise UserError(str(checkpoint.root), what, "go on with as many ranks, that stage and the same buckets")
    optimizers.restore_packed(optimizer, flats, file)
