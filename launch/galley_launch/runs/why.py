"""Why a run failed, in lines for a person: ``galley why RUN``, for runs on one box and on a cluster."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from galley.contract import stages
from galley.contract.metrics import last_step
from galley.contract.records import ExitRecord, read_exit
from galley.contract.rundir import Attempt, RunDir
from galley_launch.base import locks
from galley_launch.job.diagnose import patterns
from galley_launch.job.diagnose.advice import UNVERIFIED, WORDS
from galley_launch.job.diagnose.classify import Failure, classify
from galley_launch.job.diagnose.evidence import Evidence, collect, tail, written
from galley_launch.job.diagnose.findings import cut
from galley_launch.runs import runs
from galley_launch.submit import queue

_WIDTH = 120
_KEY = 10
_EARLY = "Read that log: only modules, setup, conda and host_python of the cluster's profile come before an attempt."


@dataclass(frozen=True)
class Explanation:
    """What is known of a run's failure, or that there was none."""

    name: str
    """Of the run."""
    told: str
    """What happened, to be read after the name: ``failed after step 5: a GPU ran out of memory``."""
    still: str = ""
    """How the run is, where it goes on all the same."""
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Key to lines: who failed first, what shows it, what to do, where the logs are."""
    table: tuple[tuple[str, str, str], ...] = ()
    """Every attempt that failed, where several did: which, after which step, of what."""


@dataclass(frozen=True)
class _Fall:
    """An attempt that failed."""

    attempt: Attempt
    end: ExitRecord
    failure: Failure
    step: int | None
    what: str
    """What was tried: ``attempt 2``, ``prepare``, ``export``."""

    @property
    def words(self) -> str:
        """What failed."""
        return WORDS.get(self.failure.kind, self.failure.kind)


def explain(run: RunDir) -> Explanation:
    """Why ``run`` failed: its newest failure in full, and each attempt that failed."""
    jobs = queue.look([run]).get(run.root)
    state, attempts = runs.state(run, jobs), run.attempts()
    live = queue.word(jobs) not in ("", "queued") if jobs else locks.is_live(run)
    falls = [fall for attempt in attempts if (fall := _fall(run, attempt, attempt == attempts[-1], live))]
    if not attempts:
        return _before_any(run, state)
    if not falls:
        nothing = queue.nothing_follows(run, jobs) if jobs else ""
        return Explanation(state.name, f"{_no_failure(state)}{nothing and '; '}{nothing}")
    last = falls[-1]
    over = last.attempt == attempts[-1] and not live
    nothing = queue.nothing_follows(run, jobs) if jobs and over else ""
    return Explanation(
        state.name,
        f"failed{_where(last, len(attempts))}: {last.words}",
        "" if over else _ending(state),
        _details(run, last, nothing),
        tuple(map(_short, falls)) if len(falls) > 1 else (),
    )


def lines(run: RunDir) -> list[str]:
    """What ``galley why`` prints of ``run``."""
    found = explain(run)
    head = f"run {found.name} {f'is {found.still}; it ' if found.still else ''}{found.told}"
    rows = [line for key, values in found.rows for line in _row(key, values)]
    return [*_wrapped(head, _WIDTH), *([""] if rows else []), *rows, *_table(found.table)]


def _where(fall: _Fall, attempts: int) -> str:
    if not fall.what.startswith("attempt"):
        return f" in {fall.what}"
    after = f" after step {fall.step}" if fall.step else " before its first step"
    return (f" in {fall.what}" if attempts > 1 else "") + after


def _no_failure(state: runs.State) -> str:
    if state.state == "unknown":
        return "is not known to have failed: Slurm does not say whether it still runs"
    return f"did not fail: it is {_ending(state)}"


def _ending(state: runs.State) -> str:
    at = f" at step {state.row.step}" if state.state == "stopped" and state.row.step is not None else ""
    return f"{'not done yet' if state.state == 'lost' else state.state}{at}"


def _before_any(run: RunDir, state: runs.State) -> Explanation:
    """Of a run without an attempt: its jobs may have ended before they could begin one."""
    logs = sorted((run.jobs / "logs").glob("*.out"), key=written)
    told = [path for path in logs if tail(path).strip()]
    if state.state not in ("new", "lost", "failed") or not (told or state.message):
        return Explanation(state.name, "did not fail: it has no attempt yet")
    if not told:
        return Explanation(state.name, f"has no attempt: {state.message}")
    found = Evidence(1, "", [], {str(told[-1].relative_to(run.root)): tail(told[-1])}, [], [], None, None)
    failure = classify(found)
    known = any(line.startswith("jobs/") for line in failure.lines)
    words = f" ({WORDS[failure.kind]})" if known else ""
    shown = failure.lines if known else tuple(cut(line) for line in queue.last_words(run)[-3:])
    rows = (("shown by", shown), ("to do", (failure.advice if known else _EARLY,)), ("log", (str(told[-1]),)))
    return Explanation(state.name, f"has no attempt: its job ended before it could begin one{words}", rows=_known(rows))


def _known(rows: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((key, values) for key, values in rows if values)


def _fall(run: RunDir, attempt: Attempt, newest: bool, live: bool) -> _Fall | None:
    """How ``attempt`` failed; None where it did not, or still runs."""
    end = read_exit(attempt.exit)
    if newest and live and end is None:
        return None
    end = end or ExitRecord()
    if end.verdict == "done" and newest and not live and _export_failed(run, attempt, end):
        return _Fall(attempt, ExitRecord(), _unverified(end) or _of_export(run, attempt), None, stages.EXPORT.name)
    if end.verdict not in ("failed", "lost", None):
        return None
    known = end.step if end.last_step is None else end.last_step
    step = last_step(run.metrics) if known is None and newest else known
    found = replace(collect(run, attempt, _status(end), ""), step=step)
    what = f"attempt {attempt.number}" if attempt.number else stages.PREPARE.name
    return _Fall(attempt, end, _agreed(end, classify(found)), step, what)


def _export_failed(run: RunDir, attempt: Attempt, end: ExitRecord) -> bool:
    tried = attempt.log(stages.EXPORT.name).exists()
    if end.exported is not None:
        return not end.exported
    return tried and not (run.export / "export.json").is_file()


def _unverified(end: ExitRecord) -> Failure | None:
    """An export that was written, but whose check failed: its own words say what differs and where it is."""
    if not end.unverified:
        return None
    return Failure("unverified", stages.EXPORT.name, (cut(end.export_error or ""),), UNVERIFIED, False, ())


def _of_export(run: RunDir, attempt: Attempt) -> Failure:
    found = collect(run, attempt, None, "")
    logs = {name: text for name, text in found.logs.items() if name.startswith(stages.EXPORT.name)}
    errors = [error for error in found.errors if error.get("who") == stages.EXPORT.name]
    status = errors[0].get("status") if errors else 1 if "rror" in "".join(logs.values()) else None
    return classify(replace(found, logs=logs, errors=errors, heartbeats=[], hang=None, status=status))


def _status(end: ExitRecord) -> int | None:
    """The launcher keeps a signal in its message only."""
    signal = re.search(r"killed by signal (\d{1,2})", end.message or "")
    return 128 + int(signal[1]) if signal else end.status


def _agreed(end: ExitRecord, failure: Failure) -> Failure:
    """The job's own verdict stands: it knew Slurm's state of the job, which is gone."""
    kind, reason = end.kind or "", end.reason or ""
    if not kind and end.verdict == "lost" and reason in ("walltime", "preemption"):
        kind = "killed"
    if not kind or kind == failure.kind:
        return failure
    told = cut(f"exit.json: {end.message or reason}")
    return Failure(kind, "", (told,), _advice(kind), bool(end.again), end.nodes or ())


def _advice(kind: str) -> str:
    """What to do where no more than the kind is known."""
    tables = (*patterns.CAUSES, *patterns.HARDWARE, *patterns.LOST, *patterns.ENDINGS, *patterns.SECONDARY)
    return next((rule.advice for rule in tables if rule.kind == kind), "Read the logs of that attempt.")


def _details(run: RunDir, fall: _Fall, nothing: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    failure, found = fall.failure, run.checkpoints()
    resumes = f"after step {found[-1].step}" if found else "from the start: there is no checkpoint"
    return _known(
        (
            ("first", (failure.who,) if failure.who else ()),
            ("shown by", tuple(failure.lines)),
            ("to do", (failure.advice,)),
            ("retry", (nothing or _again(fall, run.root),)),
            ("resumes", (resumes,) if fall.what.startswith("attempt") else ()),
            ("avoid", (", ".join(failure.nodes),) if failure.nodes else ()),
            ("logs", (str(fall.attempt.logs),)),
        )
    )


def _again(fall: _Fall, root: Path) -> str:
    if fall.end.again is not None:
        return "another attempt follows by itself" if fall.end.again else "no attempt follows by itself"
    same = f"galley export {root}" if fall.what == stages.EXPORT.name else f"galley run {root}"
    return f"the same may go well: {same}" if fall.failure.retry else "retrying will not help until this is fixed"


def _row(key: str, values: Iterable[str]) -> list[str]:
    wrapped = [line for value in values for line in _wrapped(value, _WIDTH - _KEY)]
    return [f"{key if not number else '':<{_KEY}}{line}" for number, line in enumerate(wrapped)]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False) or [""]


def _table(falls: Sequence[tuple[str, str, str]]) -> list[str]:
    if not falls:
        return []
    rows = [("failed", "step", "what"), *falls]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return ["", *(f"{what:<{first}}  {step:<{second}}  {why}".rstrip() for what, step, why in rows)]


def _short(fall: _Fall) -> tuple[str, str, str]:
    why = f"{fall.words} ({fall.failure.who})" if fall.failure.who else fall.words
    return fall.what, "" if fall.step is None else str(fall.step), why
