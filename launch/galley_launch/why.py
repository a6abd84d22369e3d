"""Why a run failed, in lines for a person: ``galley why RUN``, for runs on one box and on a cluster."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, replace
from typing import Any

from galley.rundir import Attempt, RunDir, read_json
from galley_launch import locks, runs
from galley_launch.job import patterns
from galley_launch.job.advice import WORDS
from galley_launch.job.classify import Failure, classify
from galley_launch.job.evidence import collect, last_step
from galley_launch.job.findings import cut

_WIDTH = 120
_KEY = 10


@dataclass(frozen=True)
class _Fall:
    """An attempt that failed."""

    attempt: Attempt
    end: dict[str, Any]
    """Its ``exit.json``."""
    failure: Failure
    step: int | None

    @property
    def words(self) -> str:
        """What failed."""
        return WORDS.get(self.failure.kind, self.failure.kind)


def lines(run: RunDir) -> list[str]:
    """What ``galley why`` prints of ``run``: its newest failure in full, then each failed attempt in one line."""
    state, attempts = runs.state(run), run.attempts()
    failed = [attempt for attempt in attempts if _has_failed(run, attempt, attempts[-1])]
    if not failed:
        return [_no_failure(state, attempts)]
    falls = [_fall(run, attempt, attempt == attempts[-1]) for attempt in failed]
    last = falls[-1]
    before = "" if last.attempt == attempts[-1] else f"is {_ending(state)}; attempt {last.attempt.number} of it "
    where = f" in attempt {last.attempt.number}" if len(attempts) > 1 and not before else ""
    after = f" after step {last.step}" if last.step else " before its first step"
    head = f"run {state.name} {before}failed{where}{after}: {last.words}"
    return [*_wrapped(head, 2), "", *_details(run, last), *(_table(falls) if len(falls) > 1 else [])]


def _has_failed(run: RunDir, attempt: Attempt, newest: Attempt) -> bool:
    end = read_json(attempt.exit)
    if end is not None:
        return end.get("verdict") in ("failed", "lost")
    if attempt != newest:
        return True
    if run.cluster.exists():  # Whether its job still runs is not to be seen from here.
        return bool(attempt.errors()) or any(attempt.root.glob("hang-*.json"))
    return not locks.is_live(run)


def _no_failure(state: runs.State, attempts: list[Attempt]) -> str:
    if not attempts:
        return f"run {state.name} did not fail: it has no attempt yet"
    return f"run {state.name} did not fail: it is {_ending(state)}"


def _ending(state: runs.State) -> str:
    at = f" at step {state.row['step']}" if state.state == "stopped" and "step" in state.row else ""
    word = "not done yet" if state.state == "lost" else state.state
    return f"{word}{at}"


def _fall(run: RunDir, attempt: Attempt, newest: bool) -> _Fall:
    end = read_json(attempt.exit) or {}
    known = end.get("last_step", end.get("step"))
    step = int(known) if isinstance(known, int) else last_step(run) if newest else None
    evidence = replace(collect(run, attempt, _status(end), str(end.get("state") or "")), step=step)
    return _Fall(attempt, end, _agreed(end, classify(evidence)), step)


def _status(end: dict[str, Any]) -> int | None:
    """The launcher keeps a signal in its message only."""
    signal = re.search(r"killed by signal (\d{1,2})", str(end.get("message") or ""))
    status = end.get("status")
    return 128 + int(signal[1]) if signal else status if isinstance(status, int) else None


def _agreed(end: dict[str, Any], failure: Failure) -> Failure:
    """The job's own verdict stands: it knew Slurm's state of the job, which is gone."""
    kind, reason = str(end.get("kind") or ""), str(end.get("reason") or "")
    if not kind and end.get("verdict") == "lost" and reason in ("walltime", "preemption"):
        kind = "killed"
    if not kind or kind == failure.kind:
        return failure
    said = cut(f"exit.json: {end.get('message') or reason}")
    retry = bool(end.get("again", failure.retry))
    return Failure(kind, "", (said,), _advice(kind), retry, tuple(map(str, end.get("nodes") or ())))


def _advice(kind: str) -> str:
    """What to do where no more than the kind is known."""
    tables = (*patterns.CAUSES, *patterns.HARDWARE, *patterns.LOST, *patterns.ENDINGS, *patterns.ECHOES)
    return next((rule.advice for rule in tables if rule.kind == kind), "Read the logs of that attempt.")


def _details(run: RunDir, fall: _Fall) -> list[str]:
    failure, found = fall.failure, run.checkpoints()
    rows = [("first", [failure.who] if failure.who else []), ("shown by", list(failure.lines))]
    rows += [("to do", [failure.advice]), ("again", [_again(fall, run)])]
    rows += [("resumes", [f"after step {found[-1].step}" if found else "from the start: there is no checkpoint"])]
    rows += [("avoid", [", ".join(failure.nodes)] if failure.nodes else []), ("logs", [str(fall.attempt.logs)])]
    return [line for key, values in rows for line in _row(key, values)]


def _again(fall: _Fall, run: RunDir) -> str:
    if "again" in fall.end:
        return "another attempt follows by itself" if fall.end["again"] else "no attempt follows by itself"
    return f"the same may go well: galley run {run.root}" if fall.failure.retry else "not before that is changed"


def _row(key: str, values: list[str]) -> list[str]:
    wrapped = [line for value in values for line in _wrapped(value, 2)]
    return [f"{key if not number else '':<{_KEY}}{line}" for number, line in enumerate(wrapped)]


def _wrapped(text: str, hang: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH - _KEY, subsequent_indent=" " * hang, break_on_hyphens=False) or [""]


def _table(falls: list[_Fall]) -> list[str]:
    rows = [("attempt", "step", "what failed")]
    rows += [(str(fall.attempt.number), "" if fall.step is None else str(fall.step), _short(fall)) for fall in falls]
    width = max(len(step) for _, step, _ in rows)
    return ["", *(f"{number:<{_KEY}}{step:<{width}}  {what}".rstrip() for number, step, what in rows)]


def _short(fall: _Fall) -> str:
    return f"{fall.words} ({fall.failure.who})" if fall.failure.who else fall.words
