"""Write checkpoints while training goes on, so that no kill, no full disk and no second attempt can tear one.

Each rank copies what its optimizer holds, which is all that training waits for; a thread writes the copy. The sums that
every step makes anyway tell each rank how far the others are: once all files are there, rank 0's thread publishes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from galley.checkpoint import whole
from galley.checkpoint.checkpoint import State, best_checkpoint, remove
from galley.checkpoint.flats import Layout, by_flat, pack
from galley.checkpoint.pending import Pending, SaveProgress
from galley.contract.errors import UserError
from galley.contract.files import follow_umask
from galley.contract.rundir import Attempt, Checkpoint, RunDir, fsync_path, read_json, write_atomic
from galley.engine import swap
from galley.engine.engine import Engine, base_optimizer, fragments
from galley.ranks.memory import free_bytes
from galley.ranks.stage import Superseded
from galley.ranks.world import World

_QUIET = 19
"""Niceness of the writing threads, the highest there is: training comes first. A rank that waits for its thread leaves
its core to it."""


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
    neighbours: int = 1
    """Ranks that share this rank's memory, itself included."""
    pending: Pending | None = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def stands(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` already exists (collective: rank 0 looks)."""
        return self.world.any(self.world.is_first and self.run.checkpoint(step).verifies())

    def begin(self, state: State, probes: dict[str, torch.Tensor]) -> None:
        """Copy ``state.step`` and have it written; no other save is on its way (collective).

        Raises ``UserError`` on every rank when any rank could not write: the previous checkpoint is intact.
        Raises ``Superseded`` on every rank when a later attempt has begun.
        """
        began = time.perf_counter()
        checkpoint = self.run.checkpoint(state.step)
        staging = checkpoint.root.with_name(f".attempt-{self.attempt.number:04d}-{checkpoint.root.name}")
        # Rank 0 makes the directory first, and all agree that it is there: only then may the others write into it.
        problem = _problem(self._make_room, checkpoint, staging) if self.world.is_first else None
        self._agreed(checkpoint, problem)
        # A copy of the state, since training goes on changing its own; tensors are copied in `_start`.
        pending = Pending(replace(state), checkpoint, staging, probes, began)
        self._agreed(checkpoint, _problem(self._start, pending))
        self.pending = pending

    def save_progress(self) -> SaveProgress:
        """How far this rank is; ``advance`` needs the sums over all ranks."""
        pending = self.pending
        if pending is None:
            return SaveProgress(0.0, 0.0, 0.0)
        return SaveProgress(
            written=float(pending.written.is_set()),
            failed=float(pending.problem is not None),
            published=float(self.world.is_first and pending.published.is_set()),
        )

    def advance(self, written: float, failed: float, published: float) -> Pending | None:
        """Go on with a save by the sums of all ranks' progress (collective); returns it when it has come to its end.

        Raises as ``begin`` does.
        """
        # Every rank has the same sums, so that all finish at the same step: `finish` is collective.
        if failed or published:
            return self.finish()
        if self.pending and written == self.world.size:
            self.pending.all_written.set()
        return None

    def finish(self) -> Pending | None:
        """Wait for the save that is on its way, and return it; None where there is none (collective).

        Raises as ``begin`` does.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        # Twice together: all files must be there before rank 0 may publish, and its publishing must have succeeded
        # before any rank counts the checkpoint as saved.
        pending.written.wait()
        self._agreed(pending.checkpoint, pending.problem)
        pending.all_written.set()
        if self.world.is_first:
            pending.published.wait()
        self._agreed(pending.checkpoint, pending.problem)
        pending.seconds = time.perf_counter() - pending.began
        return pending

    def tidy(self) -> None:
        """Prune on rank 0. What cannot be deleted takes room and does no other harm: that is printed, not raised."""
        if self.world.is_first and (problem := _problem(self.prune)):
            with contextlib.suppress(OSError):
                if not self.attempt.is_superseded():
                    print(f"could not delete old checkpoints: {problem}", flush=True)

    def amend(self, state: State) -> None:
        """Bring a checkpoint that stands up to date: its held-out loss may have been measured since (collective).

        Raises as ``begin`` does.
        """
        checkpoint = self.run.checkpoint(state.step)
        self._agreed(checkpoint, _problem(self._amend, checkpoint, state) if self.world.is_first else None)

    def _amend(self, checkpoint: Checkpoint, state: State) -> None:
        self._fence()
        manifest = read_json(checkpoint.manifest)
        if manifest and manifest["state"] != asdict(state):
            write_atomic(checkpoint.manifest, whole.manifest_text(state, manifest))

    def _fence(self) -> None:
        if self.attempt.is_superseded():
            raise Superseded(self.attempt)

    def _agreed(self, checkpoint: Checkpoint, problem: str | None) -> None:
        """Go on together, or fail together where any rank has a problem (collective).

        A later attempt clears the unfinished files of this one away, so that it can be the cause of any problem.
        """
        problems = [of_rank for of_rank in self.world.gather(problem) if of_rank]
        if problems:
            self.world.fence(self.attempt)
            raise self._failed(checkpoint, problems[0])

    def _failed(self, checkpoint: Checkpoint, problem: str) -> UserError:
        self.tidy()  # removes what was written of this one
        steps = [earlier.step for earlier in self.run.checkpoints()]
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "no earlier checkpoint exists"
        what = f"could not save step {checkpoint.step}: {problem}; {kept}"
        return UserError(str(checkpoint.root), what, "make room, then run the same command again to resume")

    def _make_room(self, checkpoint: Checkpoint, staging: Path) -> None:
        """Prune before writing, so that a run never needs room for more than ``keep`` + best + one."""
        self.tidy()
        self._fence()
        if not checkpoint.verifies():
            remove(checkpoint.root)
        staging.mkdir(parents=True)

    def _start(self, pending: Pending) -> None:
        """Copy, and start the thread that writes. Where this node has no memory for a copy, wait for the write."""
        if swap.is_used(self.engine):
            self._write_swapped(pending.staging)
        tensors, pending.layout = self._held()
        beside = self._fits(tensors)
        pending.tensors = self._copied(tensors) if beside else tensors
        threading.Thread(target=self._write, args=(pending,), daemon=True).start()
        if not beside:
            pending.written.wait()
            pending.tensors = {}

    def _held(self) -> tuple[dict[str, torch.Tensor], Layout]:
        """What this rank has to write, and has in memory: nothing where rank 0 holds the same."""
        # Without ZeRO every rank steps all weights, to the same bits.
        if swap.is_used(self.engine) or (self.engine.zero_optimization_stage() == 0 and not self.world.is_first):
            return {}, []
        return pack(fragments(self.engine), base_optimizer(self.engine))

    def _write_swapped(self, staging: Path) -> None:
        """State that lies on a disk goes from there to a file for each flat tensor: memory might not hold it all.

        Training waits for all of it: the next step would change what is read.
        """
        for number, held in enumerate(by_flat(fragments(self.engine))):
            with swap.resident(self.engine, held[0].flat):
                tensors, layout = pack(held, base_optimizer(self.engine))
                _write_file(staging / f"rank-{self.world.rank:05d}-{number:05d}.safetensors", tensors, layout)

    def _fits(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether this node has memory for copies, once for each rank on it.

        Twice their size: torch's allocator of pinned memory rounds each tensor up to a power of two bytes.
        """
        # The buffers of the save before are there already, and are used again.
        new = sum(value.nbytes for key, value in tensors.items() if key not in self.buffers)
        return 2 * new * self.neighbours < free_bytes()

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies in this process's memory, in the buffers of the save before."""
        for key, value in tensors.items():
            if key not in self.buffers:
                self.buffers[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.buffers[key].copy_(value, non_blocking=True)  # from a GPU into pinned memory: all copies overlap
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return {key: self.buffers[key] for key in tensors}

    def _write(self, pending: Pending) -> None:
        """In a thread: this rank's file, and on rank 0 the whole checkpoint once every rank's is there. Whatever
        happens, nobody waits for it in vain.
        """
        try:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _QUIET)
            # Set in this order: who sees that the file is written also sees whether it failed.
            pending.problem = _problem(self._write_rank_file, pending)
            pending.written.set()
            if self.world.is_first and pending.problem is None:
                pending.all_written.wait()
                pending.problem = _problem(self._publish, pending)
                self.tidy()
        except BaseException as error:  # a panic in safetensors' Rust code is no Exception
            pending.problem = pending.problem or f"{type(error).__name__}: {error}"
        finally:
            pending.written.set()
            pending.published.set()

    def _write_rank_file(self, pending: Pending) -> None:
        if pending.tensors:
            path = pending.staging / f"rank-{self.world.rank:05d}.safetensors"
            _write_file(path, pending.tensors, pending.layout)

    def _publish(self, pending: Pending) -> None:
        # The order is the promise: all files and their names are on the disk, then the manifest, then the one rename
        # by which a directory with a manifest gets a checkpoint's name. Killed before it, the run has the one before.
        staging, checkpoint = pending.staging, pending.checkpoint
        save_file(pending.probes, staging / "probes.safetensors")
        follow_umask(staging / "probes.safetensors")
        fsync_path(staging / "probes.safetensors")
        fsync_path(staging)
        checksums = whole.collect(staging)
        files = {name: (staging / name).stat().st_size for name in checksums}
        made_by = {"world": self.world.size, "zero_stage": self.engine.zero_optimization_stage()}
        made_by |= {"files": files, "checksums": checksums}
        write_atomic(Checkpoint(staging).manifest, whole.manifest_text(pending.state, made_by))
        self._fence()
        if checkpoint.verifies():  # ranks of an earlier attempt were still saving the same step, and were quicker
            remove(staging)
            return
        remove(checkpoint.root)
        staging.rename(checkpoint.root)
        fsync_path(checkpoint.root.parent)

    def prune(self) -> None:
        """Delete all but the newest ``keep`` checkpoints and the best one, and what killed saves left."""
        # The fence is looked at before each removal, not once: a later attempt may begin at any moment, and removing a
        # large checkpoint takes seconds.
        folder = self.run.root / "checkpoints"
        best = best_checkpoint(self.run)
        older = self.run.checkpoints()[: -self.keep]
        doomed = [checkpoint.root for checkpoint in older if best is None or checkpoint.step != best.step]
        doomed += [path for path in folder.glob("step-*") if not Checkpoint(path).manifest.exists()]
        for path in doomed:
            self._fence()
            remove(path)
        for path in folder.glob(".attempt-*-step-*"):
            self._fence()
            shutil.rmtree(path, ignore_errors=True)  # an earlier attempt may still write there


def _problem(work: Any, *arguments: Any) -> str | None:
    """Do ``work``; returns what went wrong, if something did."""
    try:
        work(*arguments)
    except Exception as error:  # safetensors reports a full disk as its own exception
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        return "the disk is full" if full else f"{type(error).__name__}: {error}"
    return None


def _write_file(path: Path, tensors: dict[str, torch.Tensor], layout: Layout) -> None:
    save_file(tensors, path, metadata={"fragments": json.dumps(layout)})
    follow_umask(path)
    fsync_path(path)
    whole.note(path)
