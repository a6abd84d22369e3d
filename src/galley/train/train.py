"""What each rank does, from the spec to the last checkpoint: ``torchrun -m galley.train RUN/run.json``."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import torch

from galley.contract import pace
from galley.contract.errors import UserError
from galley.contract.files import reason
from galley.contract.records import ExitRecord, read_exit, write_exit
from galley.contract.rundir import Attempt, RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest, damage, read_manifest
from galley.engine import engine
from galley.model import model
from galley.ranks import heartbeat
from galley.ranks.progress import Progress
from galley.ranks.stage import current_attempt, run_stage
from galley.ranks.store import LAUNCHER
from galley.ranks.world import World, hold_run, join, redirect_output
from galley.train.begin import begin

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def work(spec: RunSpec, run: RunDir, attempt: Attempt) -> None:
    """Train from the newest checkpoint, or from the start, until done or told to stop.

    Raises ``Superseded`` on every rank when a later attempt has begun, without saving.
    """
    lock = hold_run(run)
    heartbeat.beat("join")
    world = join(spec.placement)
    heartbeat.beat("load")
    manifest = _checked_data(run, world)
    progress = Progress(world.is_first)
    world.print_once(f"loading {spec.task.model.path} on {_ranks(world.size)}")
    progress.at("loading")
    torch.manual_seed(spec.task.seed)
    built = engine.build(model.load(spec, manifest, world.device), spec)
    loop = begin(spec, run, attempt, world, manifest, built, progress)
    verdict, reason = loop.train()
    world.fence(attempt)
    if world.is_first and (read_exit(attempt.exit) or ExitRecord()).ended is None:  # else its job has recorded its end
        record = ExitRecord(verdict, reason, loop.state.step, loop.order.steps, message="", status=0)
        write_exit(attempt.exit, record)
        if verdict == "done":  # last in the log, where people read first
            warn(*loop.health.end(manifest.model.vocab), *pace.warnings(spec, manifest.train.samples))
    heartbeat.beat("end", loop.state.step)
    world.barrier()
    if loop.recorder:
        loop.recorder.wait()  # last: the run is recorded by now, and nothing is lost where this is cut short
    os.close(lock)


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def warn(*texts: str) -> None:
    """One line each, which the launcher shows whatever else it shows of this log."""
    for text in texts:
        print(f"warning: {text}", flush=True)


def _checked_data(run: RunDir, world: World) -> Manifest:
    """The manifest of data that are as prepare wrote them; each rank reads a share (collective)."""
    todo = f"remove {run.data} and run again: the same data are prepared anew"
    try:
        manifest = read_manifest(run)
    except ValueError:
        raise UserError(str(run.data_manifest), "is damaged, or from another version", todo) from None
    except OSError as error:
        raise UserError(str(run.data_manifest), f"cannot be read ({reason(error)})", todo) from None
    problems = world.gather(damage(run, manifest, slice(world.rank, None, world.size)))
    if problem := next(filter(None, problems), None):
        raise UserError(str(run.data), problem, todo)
    return manifest


def end_with_launcher() -> None:
    """Have the kernel end this rank when torchrun is killed: it would train on, and nobody could resume the run.

    prctl(2), ``PR_SET_PDEATHSIG``. Only for ranks that torchrun started, from its main thread, as it does.
    """
    if launcher := os.environ.get(LAUNCHER):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):  # it was killed before we could ask
            os.kill(os.getpid(), signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Run this rank on the ``run.json`` that ``argv`` names; its output goes to ``logs/rank-N.log``."""
    rank = int(os.environ.get("RANK", "0"))
    if len(argv) == 1:
        attempt = current_attempt(RunDir(Path(argv[0]).absolute().parent))
        redirect_output(attempt.log(f"rank-{rank}"))
    end_with_launcher()
    heartbeat.begin()
    return run_stage(f"rank-{rank}", work, argv)
