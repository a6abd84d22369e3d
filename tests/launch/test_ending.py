"""How an attempt ended, and whether another follows: what was said, asked, done, and Slurm's word, together."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launch.attempts import BUG, attempted, raised, stepped, submitted

from galley.contract.records import read_exit
from galley_launch.job import chain, ending, finish
from galley_launch.job.ending import judge

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n"
NCCL = "torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error, NCCL version 2.21\n"


@dataclass(frozen=True)
class Case:
    """What is known at the end of an attempt, and what follows."""

    verdict: str
    reason: str
    again: bool
    kind: str = ""
    message: str = ""
    """The beginning of it."""
    said: str | None = None
    """By the ranks, with the reason after a colon."""
    stop: str | None = None
    state: str = "RUNNING"
    status: int | None = 0
    log: str = ""
    failed: bool = False
    """Whether the log's last line was recorded as rank 0's error."""
    step: int = 10
    saved: int | None = 8
    began: int = 0
    """The checkpoint that it resumed from."""
    before: dict[str, Any] = field(default_factory=dict)
    """What the attempt before it left, where there was one."""


SAVED = {"walltime": True, "preemption": True, "signal": True, "user": False, "budget": False}
TWICE = {"kind": "nccl", "last_step": 10, "verdict": "failed", "reason": "failure"}
LATE = {"verdict": "stopped", "reason": "walltime", "checkpoint": 8}
CASES = {
    "done": Case("done", "finished", False, said="done:finished"),
    "done, whatever Slurm says": Case("done", "finished", False, said="done:finished", state="TIMEOUT", status=137),
    "done, though a stop came late": Case("done", "finished", False, said="done:finished", stop="walltime"),
    "done, and cancelled": Case("done", "finished", False, said="done:finished", state="CANCELLED"),
    **{
        f"saved: {reason}": Case("stopped", reason, again, said=f"stopped:{reason}", stop=reason)
        for reason, again in SAVED.items()
    },
    "ended early": Case("done", "early stopping", False, said="done:early stopping"),
    "a signal was a pre-emption": Case(
        "stopped", "preemption", True, said="stopped:x", stop="signal", state="PREEMPTED"
    ),
    "a signal was a dead node": Case(
        "stopped", "node failure", True, said="stopped:x", stop="signal", state="NODE_FAIL"
    ),
    "a signal was a time limit": Case("stopped", "walltime", True, said="stopped:x", stop="signal", state="TIMEOUT"),
    "a signal was scancel": Case("stopped", "cancel", False, said="stopped:x", stop="signal", state="CANCELLED"),
    "galley cancel": Case("stopped", "cancel", False, stop="cancel", status=143),
    "scancel": Case("stopped", "cancel", False, state="CANCELLED", status=None),
    "the user, before it could save": Case("stopped", "user", False, stop="user", status=1, message="ended before"),
    "the budget, before it could save": Case("stopped", "budget", False, stop="budget", status=1),
    "the time limit, unsaved": Case("lost", "walltime", True, state="TIMEOUT", status=None, message="ended before it"),
    "asked in time, killed all the same": Case("lost", "walltime", True, stop="walltime", status=137),
    "pre-empted, unsaved": Case("lost", "preemption", True, state="PREEMPTED", status=None),
    "pre-empted, and its own grace was short": Case("lost", "preemption", True, stop="preemption", status=143),
    "a node died": Case("failed", "failure", True, "node", state="NODE_FAIL", status=None),
    "no word at all": Case("failed", "failure", True, "killed", state="", status=None, message="exit status unknown"),
    "killed": Case("failed", "failure", True, "killed", status=137, state="FAILED"),
    "out of host memory, after steps": Case("failed", "failure", True, "host_oom", state="OUT_OF_MEMORY", status=None),
    "out of host memory at once": Case(
        "failed", "failure", False, "host_oom", state="OUT_OF_MEMORY", step=0, saved=None
    ),
    "GPU memory, after steps": Case("failed", "failure", True, "gpu_oom", status=1, log=OOM, failed=True),
    "GPU memory at the first step": Case("failed", "failure", False, "gpu_oom", status=1, log=OOM, step=0, saved=None),
    "GPU memory at once, resumed": Case("failed", "failure", False, "gpu_oom", status=1, log=OOM, step=8, began=8),
    "GPU memory in the second step, resumed": Case(
        "failed", "failure", True, "gpu_oom", status=1, log=OOM, step=9, began=8
    ),
    "the network": Case("failed", "failure", True, "nccl", status=1, log=NCCL, failed=True),
    "the network, twice at a step": Case(
        "failed", "failure", False, "nccl", "failed twice at step 10: ", status=1, log=NCCL, failed=True, before=TWICE
    ),
    "the network, at another step": Case(
        "failed", "failure", True, "nccl", status=1, log=NCCL, failed=True, before=TWICE | {"last_step": 9}
    ),
    "the network, after something else": Case(
        "failed", "failure", True, "nccl", status=1, log=NCCL, failed=True, before=TWICE | {"kind": "node"}
    ),
    "a mistake in the code": Case("failed", "failure", False, "code", status=1, log=BUG, failed=True),
    "a mistake in the code as time runs out": Case(
        "failed", "failure", False, "code", status=1, log=BUG, failed=True, stop="walltime"
    ),
    "a mistake of the user's": Case(
        "failed", "failure", False, "configuration", status=2, log="x: y; z\n", failed=True
    ),
    "late, and late before, without a checkpoint": Case(
        *("failed", "no progress", False, "configuration"),
        message="two attempts in a row reached their time limit without a checkpoint after step 8; raise cluster.time",
        **{"said": "stopped:walltime", "stop": "walltime", "began": 8, "before": LATE},
    ),
    "lost to the time limit twice": Case(
        "failed", "no progress", False, "configuration", state="TIMEOUT", status=None, began=8, before=LATE
    ),
    "late, and late before, but further": Case(
        "stopped", "walltime", True, said="stopped:walltime", began=8, saved=9, before=LATE
    ),
    "late, after something else": Case(
        "stopped", "walltime", True, said="stopped:walltime", began=8, before={"verdict": "failed", "checkpoint": 8}
    ),
    "pre-empted twice without a checkpoint": Case(
        "stopped", "preemption", True, said="stopped:preemption", began=8, before=LATE | {"reason": "preemption"}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_follows(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = submitted(tmp_path / "run")
    number = 2 if case.before else 1
    if case.before:
        attempted(run, 1, said=case.before)
    verdict, _, reason = (case.said or "").partition(":")
    said = {"verdict": verdict, "reason": reason, "step": case.step} if case.said else None
    errors = raised(case.log, 2 if case.kind == "configuration" else 1) if case.failed else None
    logs = {"rank_0": case.log} if case.log else {}
    attempt = attempted(run, number, said=said, stop=case.stop, facts={"checkpoint": case.began}, errors=errors, **logs)
    stepped(run, case.step, case.saved)
    found = judge(run, attempt, case.status, case.state)
    assert (found.verdict, found.reason, found.again, found.kind) == (case.verdict, case.reason, case.again, case.kind)
    assert found.message.startswith(case.message)
    assert found.status == (0 if case.verdict in ("done", "stopped") else 2 if case.kind == "configuration" else 1)
    assert judge(run, attempt, case.status, case.state) == found  # It only looks.


@pytest.mark.parametrize(
    ("cause", "state", "wanted"),
    [
        ("", "COMPLETING", ("stopped", "cancel", False)),
        (" DUE TO TIME LIMIT", "COMPLETING", ("lost", "walltime", True)),
        (" DUE TO PREEMPTION", "COMPLETING", ("lost", "preemption", True)),
        (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", "COMPLETING", ("failed", "failure", True)),
        ("", "RUNNING", ("failed", "failure", False)),  # of the same job, before it was requeued
    ],
)
def test_a_job_that_is_being_ended(tmp_path: Path, cause: str, state: str, wanted: tuple[str, str, bool]) -> None:
    """The controller says no more than COMPLETING while the job's script has its time of grace."""
    run = submitted(tmp_path / "run")
    attempt = attempted(run, 1, stop="signal", facts={"job": "104", "checkpoint": 0})
    stepped(run, 11, 8)
    (run.jobs / "logs").mkdir(parents=True, exist_ok=True)
    line = f"slurmstepd-node1: error: *** JOB 104 ON node1 CANCELLED AT 2026-11-23T15:28:48{cause} ***"
    (run.jobs / "logs" / "train-104.out").write_text(f"{line}\n")
    found = judge(run, attempt, 143, state)
    assert (found.verdict, found.reason, found.again) == wanted


def test_what_is_written_down(tmp_path: Path) -> None:
    run = submitted(tmp_path / "run")
    attempt = attempted(run, said={"verdict": "stopped", "reason": "walltime", "step": 10, "ranks": 8})
    stepped(run, 10, 10)
    record = finish.conclude(run, attempt, ending.Ending("failed", "failure", True, "m", "node", ("n2",)))
    assert record == read_exit(attempt.exit)
    body = json.loads(attempt.exit.read_text())
    wanted = {"verdict": "failed", "reason": "failure", "again": True, "message": "m", "kind": "node", "nodes": ["n2"]}
    wanted |= {"status": 1, "checkpoint": 10, "last_step": 10, "step": 10, "ranks": 8}
    assert {name: body[name] for name in wanted} == wanted
    assert time.time() - 60 < body["ended"] <= time.time()
    assert chain.excluded(run) == {"n2": "attempt 1: node"}
    again = finish.conclude(run, attempt, ending.Ending("done", "finished", False), ended=5.0)
    assert (again.ended, again.message, again.status) == (body["ended"], "", 0)


def test_hours(tmp_path: Path) -> None:
    run = submitted(tmp_path / "run")
    assert ending.used_hours(run) == 0
    attempted(run, 0, said={"ended": 1e9 + 9e9})  # preparing takes no GPU
    run.attempt(0).job.write_text(json.dumps({"job": "1", "nodes": ["n1"]}))
    attempted(run, 1, said={"ended": 1e9 + 3600})
    attempted(run, 2, said={"ended": 1e9 + 1800}, facts={"ranks": 4})
    assert ending.used_hours(run) == pytest.approx(8 + 2)
    attempted(run, 3)
    assert ending.used_hours(run, until=1e9 + 900) == pytest.approx(8 + 2 + 2)
    attempted(run, 4, facts={"started": 2e9})  # a clock that ran backwards
    assert ending.used_hours(run, until=1e9 + 900) == pytest.approx(8 + 2 + 2)
