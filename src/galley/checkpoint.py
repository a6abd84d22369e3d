"""Checkpoints that no kill can tear, and that any number of ranks and any ZeRO stage can load.

Each rank writes the flat fp32 tensors that its optimizer steps (weights and both moments) to one safetensors file,
whose header says which slice of which parameter lies where. Nothing is pickled, frozen weights are not written, and a
reader takes just the slices that it needs, whatever the ranks and the ZeRO stage that wrote them. The manifest is
written last, and the whole directory then gets the checkpoint's name: without a manifest there is no checkpoint.
"""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from galley import optimizers
from galley.engine import Engine, base_optimizer, fragments, refresh_gathered, set_weight
from galley.errors import UserError
from galley.flats import numbered, pack
from galley.model import trained
from galley.optimizers import MOMENTS
from galley.rundir import Attempt, Checkpoint, RunDir, fsync_path, read_json, write_atomic
from galley.stage import Superseded
from galley.world import World


@dataclass
class State:
    """Where the loop is; everything else follows from the task and the step."""

    step: int = 0
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    held_out_loss: float | None = None
    held_out_step: int | None = None


@dataclass
class Writer:
    """Saves and prunes the checkpoints of one run, until a later attempt begins.

    After a network cut two attempts can run at once. Each writes in a directory of its own, and renames it to the
    checkpoint's when it is whole. Rank 0 looks for a later attempt before each change to what both can see.
    """

    run: RunDir
    attempt: Attempt
    world: World
    engine: Engine
    keep: int
    probes: dict[str, torch.Tensor] = field(default_factory=dict)

    def stands(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is there already (collective: rank 0 looks)."""
        return self.world.any(self.world.is_first and self.run.checkpoint(step).verifies())

    def save(self, state: State) -> Checkpoint:
        """Write the checkpoint of ``state.step`` (collective).

        Raises ``UserError`` on every rank when any rank could not write: the previous checkpoint is intact.
        Raises ``Superseded`` on every rank when a later attempt has begun.
        """
        checkpoint = self.run.checkpoint(state.step)
        staging = checkpoint.root.with_name(f".attempt-{self.attempt.number:04d}-{checkpoint.root.name}")
        first = self.world.is_first
        self._agreed(checkpoint, self._attempt(self._make_room, checkpoint, staging) if first else None)
        self._agreed(checkpoint, self._attempt(self._write_rank_file, staging))
        self._agreed(checkpoint, self._attempt(self._publish, checkpoint, staging, state) if first else None)
        self.tidy()
        return checkpoint

    def tidy(self) -> None:
        """Prune on rank 0; what cannot be deleted is said, and costs nothing but room."""
        if self.world.is_first and (problem := self._attempt(self.prune)) and not self.attempt.is_superseded():
            print(f"could not delete old checkpoints: {problem}", flush=True)

    def amend(self, state: State) -> None:
        """Bring a checkpoint that stands up to date: its held-out loss may have been measured since (collective).

        Raises as ``save`` does.
        """
        checkpoint = self.run.checkpoint(state.step)
        self._agreed(checkpoint, self._attempt(self._amend, checkpoint, state) if self.world.is_first else None)

    def _amend(self, checkpoint: Checkpoint, state: State) -> None:
        self._fence()
        manifest = read_json(checkpoint.manifest)
        if manifest and manifest["state"] != asdict(state):
            write_atomic(checkpoint.manifest, _manifest_text(manifest["files"], state, manifest))

    def _fence(self) -> None:
        if self.attempt.is_superseded():
            raise Superseded(self.attempt)

    def _attempt(self, work: Any, *arguments: Any) -> str | None:
        try:
            work(*arguments)
        except Exception as error:  # safetensors reports a full disk as its own exception
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            return "the disk is full" if full else f"{type(error).__name__}: {error}"
        return None

    def _agreed(self, checkpoint: Checkpoint, problem: str | None) -> None:
        """Go on together, or fail together where any rank has a problem (collective).

        A later attempt clears our unfinished files away, so that it can be the cause of any problem.
        """
        problems = [each for each in self.world.gather(problem) if each]
        if problems:
            self.world.fence(self.attempt)
            raise self._failed(checkpoint, problems[0])

    def _failed(self, checkpoint: Checkpoint, problem: str) -> UserError:
        self.tidy()  # our half
        before = [each.step for each in self.run.checkpoints()]
        kept = f"the checkpoint of step {before[-1]} is intact" if before else "no earlier checkpoint exists"
        what = f"could not save step {checkpoint.step}: {problem}; {kept}"
        return UserError(str(checkpoint.root), what, "make room, then run the same command again to resume")

    def _make_room(self, checkpoint: Checkpoint, staging: Path) -> None:
        """Prune before writing, so that a run never needs room for more than ``keep`` + best + one."""
        self.tidy()
        self._fence()
        if not checkpoint.verifies():
            _remove(checkpoint.root)
        staging.mkdir(parents=True)

    def _write_rank_file(self, folder: Path) -> None:
        if self.engine.zero_optimization_stage() == 0 and not self.world.is_first:
            return  # every rank holds the same
        path = folder / f"rank-{self.world.rank:05d}.safetensors"
        tensors, layout = pack(fragments(self.engine), base_optimizer(self.engine))
        save_file(tensors, path, metadata={"fragments": json.dumps(layout)})
        fsync_path(path)

    def _publish(self, checkpoint: Checkpoint, staging: Path, state: State) -> None:
        save_file(self.probes, staging / "probes.safetensors")
        fsync_path(staging / "probes.safetensors")
        fsync_path(staging)
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        made_by = {"world": self.world.size, "zero_stage": self.engine.zero_optimization_stage()}
        write_atomic(Checkpoint(staging).manifest, _manifest_text(files, state, made_by))
        self._fence()
        if checkpoint.verifies():  # an earlier attempt's ranks were still at it, and quicker
            _remove(staging)
            return
        _remove(checkpoint.root)
        staging.rename(checkpoint.root)
        fsync_path(checkpoint.root.parent)

    def prune(self) -> None:
        """Delete all but the newest ``keep`` checkpoints and the best one, and what killed saves left."""
        folder = self.run.root / "checkpoints"
        best = best_checkpoint(self.run)
        doomed = [each.root for each in self.run.checkpoints()[: -self.keep] if best is None or each.step != best.step]
        doomed += [path for path in folder.glob("step-*") if not Checkpoint(path).manifest.exists()]
        for path in doomed:
            self._fence()
            _remove(path)
        for path in folder.glob(".attempt-*-step-*"):
            self._fence()
            shutil.rmtree(path, ignore_errors=True)  # an earlier attempt may still write there


def _remove(path: Path) -> None:
    """Delete a checkpoint's directory, if it is there. The manifest goes first: no half checkpoint.

    What is not there is not deleted: a later attempt might just have made it.
    """
    manifest = Checkpoint(path).manifest
    if manifest.exists():
        manifest.unlink()
    if path.exists():
        shutil.rmtree(path)


def best_checkpoint(run: RunDir) -> Checkpoint | None:
    """The checkpoint with the lowest held-out loss, among those that were measured at their own step."""
    scored = [(read_json(each.manifest) or {}, each) for each in run.checkpoints()]
    measured = [(float(each["held_out_loss"]), at) for each, at in scored if each.get("held_out_loss") is not None]
    return min(measured, key=lambda pair: (pair[0], pair[1].step))[1] if measured else None


def _manifest_text(files: dict[str, int], state: State, made_by: dict[str, Any]) -> str:
    """The manifest of a checkpoint; ``made_by`` has the world size and ZeRO stage that wrote it."""
    manifest = {
        "step": state.step,
        "world": made_by["world"],
        "zero_stage": made_by["zero_stage"],
        "held_out_loss": state.held_out_loss if state.held_out_step == state.step else None,
        "state": asdict(state),
        "files": files,
    }
    return json.dumps(manifest, indent=1)


class Reader:
    """Reads slices of parameters out of a checkpoint, mapping its files rather than loading them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files: list[Any] = [safe_open(path, "pt") for path in sorted(checkpoint.root.glob("rank-*.safetensors"))]
        self.places: dict[str, list[tuple[int, int, int, int, int]]] = {}
        for index, file in enumerate(self.files):
            for name, start, numel, number, offset in json.loads(file.metadata()["fragments"]):
                self.places.setdefault(name, []).append((start, numel, index, number, offset))

    def names(self) -> list[str]:
        """Parameters in the checkpoint."""
        return list(self.places)

    def has_moments(self) -> bool:
        """Whether the optimizer had taken a step."""
        return any(key.startswith(MOMENTS[0]) for file in self.files for key in file.keys())  # noqa: SIM118

    def fill(self, kind: str, name: str, start: int, into: torch.Tensor) -> None:
        """Copy elements ``start…`` of ``kind`` (weight or a moment) of a parameter into the flat tensor ``into``."""
        end = start + into.numel()
        for first, numel, index, number, offset in self.places[name]:
            low, high = max(start, first), min(end, first + numel)
            if low < high:
                source = self.files[index].get_slice(f"{kind}.{number}")
                into[low - start : high - start].copy_(source[offset + low - first : offset + high - first])

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return max(start + numel for start, numel, *_ in self.places[name])

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
    state = State(**json.loads(checkpoint.manifest.read_text(encoding="utf-8"))["state"])
    refresh_gathered(engine, before=True)
    for name, parameter in parameters.items():
        set_weight(parameter, reader.whole(name))
    _load_optimizer(reader, engine, state.step)
    _load_packed(reader, checkpoint, engine)
    refresh_gathered(engine, before=False)
    return state


def _load_optimizer(reader: Reader, engine: Engine, step: int) -> None:
    optimizer, moments = base_optimizer(engine), reader.has_moments()
    for each in fragments(engine):
        if moments and each.flat not in optimizer.state:
            optimizer.state[each.flat] = optimizers.fresh(optimizer, each.flat, step)
        targets = {"weight": each.flat.data}
        if moments:
            state = optimizer.state[each.flat]
            targets |= {key: state[key] for key in MOMENTS if key in state}
        for kind, flat in targets.items():
            reader.fill(kind, each.name, each.start, flat.view(-1)[each.offset : each.offset + each.numel])


def _load_packed(reader: Reader, checkpoint: Checkpoint, engine: Engine) -> None:
    """8-bit state goes back to the flat tensors that it is of: its blocks do not follow the parameters' borders."""
    optimizer, rank = base_optimizer(engine), torch.distributed.get_rank()
    if not optimizers.packs(optimizer):
        return
    made = read_json(checkpoint.manifest) or {}
    flats, layout = numbered(fragments(engine))
    file = reader.files[min(rank, len(reader.files) - 1)]
    here = (torch.distributed.get_world_size(), engine.zero_optimization_stage())
    same = here == (made["world"], made["zero_stage"])
    if not same or [list(row) for row in layout] != json.loads(file.metadata()["fragments"]):
        what = f"has 8-bit optimizer state, which is of {made['world']} ranks under ZeRO-{made['zero_stage']}"
        raise UserError(str(checkpoint.root), what, "go on with as many ranks, that stage and the same buckets")
    optimizers.restore_packed(optimizer, flats, file)
