"""Why a run failed, in readable lines: ``galley why RUN``, for runs on one box and on a cluster."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from galley.contract import stages
from galley.contract.files import is_full
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
"""Columns that the lines are wrapped to."""
_KEY = 10
"""Columns of the key in front of a line (``shown by``)."""
_EARLY = "Read that log: only modules, setup, conda and host_python of the cluster's profile come before an attempt."


@dataclass(frozen=True)
class Explanation:
    """What is known of a run's failure, or that there was none."""

    name: str
    """The run's."""
    summary: str
    """What happened, to be read after the name: ``failed after step 5: a GPU ran out of memory``."""
    state: str = ""
    """How the run is now, if it went on after that failure: ``live``, ``done``. Else empty."""
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Key to lines: who failed first, what shows it, what to do, where the logs are."""
    table: tuple[tuple[str, str, str], ...] = ()
    """Every attempt that failed, where several did: which, after which step, of what."""


@dataclass(frozen=True)
class _FailedAttempt:
    """An attempt that failed, and why."""

    attempt: Attempt
    end: ExitRecord
    failure: Failure
    step: int | None
    stage: str
    """What was tried: ``attempt 2``, ``prepare``, ``export``."""

    @property
    def words(self) -> str:
        """What failed, as a clause; the kind itself where ``exit.json`` has one that is unknown here."""
        return WORDS.get(self.failure.kind, self.failure.kind)


def explain(run: RunDir) -> Explanation:
    """Why ``run`` failed: its newest failure in full, and each attempt that failed."""
    jobs = queue.query([run]).get(run.root)
    state, attempts = runs.state(run, jobs), run.attempts()
    # A job that only waits does not count as live: the attempt before it is over and can be explained.
    live = queue.state(jobs) not in ("", "queued") if jobs else locks.is_live(run)
    tried = [_failed_attempt(run, attempt, attempt == attempts[-1], live) for attempt in attempts]
    failures = [failed for failed in tried if failed]
    if not attempts:
        return _without_attempts(run, state)
    if not failures:
        nothing = queue.nothing_follows(run, jobs) if jobs else ""
        return Explanation(state.name, f"{_not_failed(state)}{nothing and '; '}{nothing}")
    last = failures[-1]
    over = last.attempt == attempts[-1] and not live
    nothing = queue.nothing_follows(run, jobs) if jobs and over else ""
    return Explanation(
        state.name,
        f"failed{_where(last, len(attempts))}: {last.words}",
        "" if over else _state_text(state),
        _details(run, last, nothing),
        tuple(map(_table_row, failures)) if len(failures) > 1 else (),
    )


def lines(run: RunDir) -> list[str]:
    """What ``galley why`` prints about ``run``."""
    explanation = explain(run)
    state = f"is {explanation.state}; it " if explanation.state else ""
    head = f"run {explanation.name} {state}{explanation.summary}"
    rows = [line for key, values in explanation.rows for line in _row(key, values)]
    return [*_wrapped(head, _WIDTH), *([""] if rows else []), *rows, *_table(explanation.table)]


def _where(failed: _FailedAttempt, attempts: int) -> str:
    """In which stage, or after which step; ``attempts``: how many there were, as a single one is not named."""
    if not failed.stage.startswith("attempt"):
        return f" in {failed.stage}"
    after = f" after step {failed.step}" if failed.step else " before its first step"
    return (f" in {failed.stage}" if attempts > 1 else "") + after


def _not_failed(state: runs.State) -> str:
    if state.state == "unknown":
        return "is not known to have failed: Slurm does not say whether it still runs"
    return f"did not fail: it is {_state_text(state)}"


def _state_text(state: runs.State) -> str:
    at = f" at step {state.row.step}" if state.state == "stopped" and state.row.step is not None else ""
    return f"{'not done yet' if state.state == 'lost' else state.state}{at}"


def _without_attempts(run: RunDir, state: runs.State) -> Explanation:
    """Of a run without an attempt: its jobs may have ended before they could begin one."""
    logs = sorted((run.jobs / "logs").glob("*.out"), key=written)
    filled = [path for path in logs if tail(path).strip()]
    if state.state not in ("new", "lost", "failed") or not (filled or state.message):
        return Explanation(state.name, "did not fail: it has no attempt yet")
    if not filled:
        return Explanation(state.name, f"has no attempt: {state.message}")
    # Status 1 and the job's output are all there is: heartbeats and error files belong to an attempt.
    evidence = Evidence(1, "", [], {str(filled[-1].relative_to(run.root)): tail(filled[-1])}, [], [], None, None)
    failure = classify(evidence)
    # Its kind counts only if it quotes a line of that log; otherwise it is a guess from the status, which is made up.
    known = any(line.startswith("jobs/") for line in failure.lines)
    words = f" ({WORDS[failure.kind]})" if known else ""
    shown = failure.lines if known else tuple(cut(line) for line in queue.last_output(run)[-3:])
    rows = (("shown by", shown), ("to do", (failure.advice if known else _EARLY,)), ("log", (str(filled[-1]),)))
    return Explanation(
        state.name, f"has no attempt: its job ended before it could begin one{words}", rows=_filled(rows)
    )


def _filled(rows: Iterable[tuple[str, tuple[str, ...]]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Those of ``rows`` that have any lines."""
    return tuple((key, values) for key, values in rows if values)


def _failed_attempt(run: RunDir, attempt: Attempt, newest: bool, live: bool) -> _FailedAttempt | None:
    """How ``attempt`` failed; None where it did not, or still runs."""
    end = read_exit(attempt.exit)
    if newest and live and end is None:
        return None
    end = end or ExitRecord()
    # The export comes after the newest attempt has ended well ("done"), so it can fail all the same.
    if end.verdict == "done" and newest and not live and _export_failed(run, attempt, end):
        failure = _unverified(end) or _export_failure(run, attempt)
        return _FailedAttempt(attempt, ExitRecord(), failure, None, stages.EXPORT.name)
    if end.verdict not in ("failed", "lost", None):
        return None
    recorded = end.step if end.last_step is None else end.last_step
    # metrics.jsonl is shared by all attempts: its last step is only the newest one's.
    step = last_step(run.metrics) if recorded is None and newest else recorded
    evidence = replace(collect(run, attempt, _status(end), ""), step=step)
    stage = f"attempt {attempt.number}" if attempt.number else stages.PREPARE.name
    return _FailedAttempt(attempt, end, _as_recorded(end, classify(evidence)), step, stage)


def _export_failed(run: RunDir, attempt: Attempt, end: ExitRecord) -> bool:
    if end.exported is not None:
        return not end.exported
    # Nothing is recorded either where the export was killed: then there is a log of it, but no result.
    return attempt.log(stages.EXPORT.name).exists() and not (run.export / "export.json").is_file()


def _unverified(end: ExitRecord) -> Failure | None:
    """The failure of an export that was written but did not pass its check; its message says what differs and where."""
    if not end.unverified:
        return None
    return Failure("unverified", stages.EXPORT.name, (cut(end.export_error or ""),), UNVERIFIED, False, ())


def _export_failure(run: RunDir, attempt: Attempt) -> Failure:
    evidence = collect(run, attempt, None, "")
    # Training's own logs and heartbeats stay out: it ended well, and a warning there would be taken for the cause.
    logs = {name: text for name, text in evidence.logs.items() if name.startswith(stages.EXPORT.name)}
    errors = [error for error in evidence.errors if error.get("who") == stages.EXPORT.name]
    # Without a recorded error: 1 if the log shows one ("Error", "error"), else unknown, as after a kill.
    status = errors[0].get("status") if errors else 1 if "rror" in "".join(logs.values()) else None
    return classify(replace(evidence, logs=logs, errors=errors, heartbeats=[], hang=None, status=status))


def _status(end: ExitRecord) -> int | None:
    """The exit status, as a shell would give it: 128 + N after signal N (bash(1), EXIT STATUS)."""
    # On one box exit.json has the signal in its message only.
    signal = re.search(r"killed by signal (\d{1,2})", end.message or "")
    return 128 + int(signal[1]) if signal else end.status


def _as_recorded(end: ExitRecord, failure: Failure) -> Failure:
    """``failure``, or the one in ``exit.json`` if its kind differs.

    The job that wrote that file knew Slurm's state of the job (``TIMEOUT``, ``PREEMPTED``), which cannot be asked for
    any more.
    """
    kind, reason = end.kind or "", end.reason or ""
    if not kind and end.verdict == "lost" and reason in ("walltime", "preemption"):
        kind = "killed"
    if not kind or kind == failure.kind:
        return failure
    line = cut(f"exit.json: {end.message or reason}")
    return Failure(kind, "", (line,), _advice(kind), bool(end.again), end.nodes or ())


def _advice(kind: str) -> str:
    """What to do where no more than the kind is known."""
    tables = (*patterns.CAUSES, *patterns.HARDWARE, *patterns.LOST, *patterns.ENDINGS, *patterns.SECONDARY)
    return next((rule.advice for rule in tables if rule.kind == kind), "Read the logs of that attempt.")


def _details(run: RunDir, failed: _FailedAttempt, nothing: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The rows of the explanation. ``nothing``: why no attempt follows, if that is known."""
    failure, checkpoints = failed.failure, run.checkpoints()
    resumes = f"after step {checkpoints[-1].step}" if checkpoints else "from the start: there is no checkpoint"
    return _filled(
        (
            ("first", (failure.who,) if failure.who else ()),
            ("shown by", tuple(failure.lines)),
            ("disk", (f"{run.root} lies on a disk that is full now: make room there",) if is_full(run.root) else ()),
            ("to do", (failure.advice,)),
            ("retry", (nothing or _retry_text(failed, run.root),)),
            ("resumes", (resumes,) if failed.stage.startswith("attempt") else ()),
            ("avoid", (", ".join(failure.nodes),) if failure.nodes else ()),
            ("logs", (str(failed.attempt.logs),)),
        )
    )


def _retry_text(failed: _FailedAttempt, root: Path) -> str:
    # A job's verdict says whether a successor follows; on one box nothing follows, so that the user has to decide.
    if failed.end.again is not None:
        return "another attempt follows by itself" if failed.end.again else "no attempt follows by itself"
    command = f"galley export {root}" if failed.stage == stages.EXPORT.name else f"galley run {root}"
    if failed.failure.retry:
        return f"the same may go well: {command}"
    return "retrying will not help until this is fixed"


def _row(key: str, values: Iterable[str]) -> list[str]:
    wrapped = [line for value in values for line in _wrapped(value, _WIDTH - _KEY)]
    return [f"{key if not number else '':<{_KEY}}{line}" for number, line in enumerate(wrapped)]


def _wrapped(text: str, width: int) -> list[str]:
    # Words are not broken at hyphens: a path or an option that is split cannot be copied.
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False) or [""]


def _table(failures: Sequence[tuple[str, str, str]]) -> list[str]:
    if not failures:
        return []
    rows = [("failed", "step", "what"), *failures]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return ["", *(f"{stage:<{first}}  {step:<{second}}  {why}".rstrip() for stage, step, why in rows)]


def _table_row(failed: _FailedAttempt) -> tuple[str, str, str]:
    why = f"{failed.words} ({failed.failure.who})" if failed.failure.who else failed.words
    return failed.stage, "" if failed.step is None else str(failed.step), why
