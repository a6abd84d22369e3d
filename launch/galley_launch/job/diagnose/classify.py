"""Why did an attempt fail, who failed first, and may another attempt succeed? For ``galley why`` and a job's verdict.

A failure on one of many ranks makes all the others fail too, and with more output: connections close, collectives time
out, torchrun ends the rest. So the questions are asked in an order, from causes that explain everything else to errors
that only follow from others (:data:`_JUDGES`). Within a question the first match in time counts, by recorded errors,
torchrun's tables and torch's own time stamps.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from galley.contract import stages
from galley_launch.job.diagnose.advice import READ_LOG, SIGTERM
from galley_launch.job.diagnose.evidence import Evidence
from galley_launch.job.diagnose.findings import (
    Case,
    Failure,
    Finding,
    all_matches,
    everywhere,
    first_match,
    retry,
    shown,
    when,
)
from galley_launch.job.diagnose.log_sources import LogSource, in_job, log_sources, nodes
from galley_launch.job.diagnose.own_checks import hang, preflight
from galley_launch.job.diagnose.patterns import (
    CAUSES,
    ENDINGS,
    FABRIC,
    HARDWARE,
    LOST,
    MEMORY,
    SECONDARY,
)
from galley_launch.job.diagnose.states import SIGNALS, STATES, StateMeaning

__all__ = ["Failure", "classify"]

_LIKE_ERROR = re.compile(
    r"(?i)error|exception|fail|fatal|abort|cannot|can't|unable|invalid|denied|refused|not found|no such"
)
_LABELLED = re.compile(r"\[rank(\d+)\]:")


def _labelled(source: LogSource, line: str) -> LogSource:
    """The rank that wrote ``line`` into a shared log, where torch labels it (``[rank3]:``), else ``source`` itself."""
    label = _LABELLED.search(line) if source.rank is None else None
    return replace(source, name=f"rank-{label[1]}") if label else source


def _failure(finding: Finding, case: Case, blamed: Iterable[str] = ()) -> Failure:
    """``finding`` as the cause of the failure; ``blamed``: the nodes to avoid (empty names are left out)."""
    rule, source = finding.rule, finding.source
    # The traceback of a rank whose peers were gone only shows where it waited for them, not the cause.
    where = source.raised.places if source.raised and rule not in (*FABRIC, *SECONDARY) else ()
    return Failure(
        kind=rule.kind,
        who=_labelled(source, finding.line).who(case.job) or finding.node,
        lines=shown(source, dict.fromkeys([finding.line, *finding.rest, *where])),
        advice=rule.advice,
        retry=retry(rule.kind, case.evidence) if rule.retry is None else rule.retry,
        nodes=tuple(sorted({node for node in blamed if node})),
    )


def _blamed(matches: Sequence[Finding]) -> set[str]:
    """Nodes to blame: those whose logs match a rule of the same kind of failure as the first match does."""
    kind = matches[0].rule.kind
    return {match.node or match.source.host for match in matches if match.rule.blames and match.rule.kind == kind}


def _hardware(case: Case) -> Failure | None:
    """A GPU or a driver is broken, or a GPU is missing (on one box, status 2: the user asked for too many)."""
    matches = [match for match in all_matches(HARDWARE, case) if case.job or match.source.status != 2]
    return everywhere(_failure(matches[0], case, _blamed(matches)), case) if matches else None


def _causes(case: Case) -> Failure | None:
    """Something that breaks a rank or a stage by itself, or a user's mistake (status 2), whichever came first."""
    matches = all_matches(CAUSES, case)
    known = {match.source.name for match in matches}
    mistakes = [source for source in case.sources if source.status == 2 and source.name not in known]
    if mistakes and (not matches or min(source.time for source in mistakes) <= when(matches[0], case)):
        source = min(mistakes, key=lambda source: source.time)
        # A UserError is one line, "where: what; what to do": its own advice is better than any table's.
        what, _, todo = source.message.rpartition("; ")
        lines = shown(replace(source, text=""), [what or todo])
        advice = f"{todo[:1].upper()}{todo[1:]}." if what else READ_LOG
        return Failure("configuration", source.who(case.job), lines, advice, False, ())
    return everywhere(_failure(matches[0], case, _blamed(matches)), case) if matches else None


def _state(case: Case) -> tuple[str, StateMeaning | None]:
    """Slurm's state of the job without what may follow it (``CANCELLED by 0``), and what it means."""
    state = re.match(r"[A-Z_]*", case.evidence.state.strip().upper())
    return (state[0], STATES.get(state[0])) if state else ("", None)


def _by_state(case: Case, kinds: Sequence[str]) -> Failure | None:
    """The failure that Slurm's state of the job stands for, where it is of one of ``kinds``."""
    state, meaning = _state(case)
    if not meaning or meaning.kind not in kinds:
        return None
    again = retry(meaning.kind, case.evidence) if meaning.retry is None else meaning.retry
    return Failure(meaning.kind, "", (f"Slurm: the job is {state}",), meaning.advice, again, ())


def _lost(case: Case) -> Failure | None:
    """Slurm has lost a node."""
    matches = all_matches(LOST, case)
    if not matches:
        return _by_state(case, ["node"])
    named = {match.node for match in matches if match.node}
    first = next((match for match in matches if match.node), matches[0])
    return replace(_failure(first, case, named), who=first.node)


def _memory(case: Case) -> Failure | None:
    """The kernel or Slurm killed a process because the host's memory was used up; torchrun's table shows which rank."""
    matches = all_matches(MEMORY, case)
    failure = _failure(matches[0], case) if matches else _by_state(case, ["host_oom"])
    if failure is None:
        return None
    node = matches[0].node or matches[0].source.host if matches else ""
    # The line names a step or a process number; the rank is the first on that node that died of SIGKILL.
    killed = [source for source in case.sources if source.code == -9 and node in ("", source.host)]
    who = min(killed, key=lambda source: source.time).who(case.job) if killed else failure.who or node
    return replace(failure, who=who)


def _ended(case: Case) -> Failure | None:
    """Slurm ended the job: at its time limit, for another job, or because somebody cancelled it."""
    # Only Slurm's own lines count: a rank may have printed such a line from somewhere else.
    matches = [match for match in all_matches(ENDINGS, case) if match.source.rank is None]
    return _by_state(case, ["killed"]) or (replace(_failure(matches[0], case), who="") if matches else None)


def _code(case: Case) -> Failure | None:
    """An exception that no rule knows, and that is not a secondary error: the code's own fault."""
    raised = [
        source
        for source in case.sources
        if source.words and not any(rule.pattern.search(source.words) for rule in SECONDARY)
    ]
    if not raised:
        return None
    source = min(raised, key=lambda source: (source.time, source.rank or 0))
    lines = (source.raised.exceptions[-1], *source.raised.places) if source.raised else (source.message,)
    return Failure("code", _labelled(source, lines[0]).who(case.job), shown(source, lines), READ_LOG, False, ())


def _signal(case: Case) -> Failure | None:
    """A rank, or a stage, died of a signal that neither Galley, torchrun nor Slurm sends (SIGSEGV, SIGBUS …)."""
    died = [source for source in case.sources if source.first and source.code is not None and -source.code in SIGNALS]
    if died:
        source = min(died, key=lambda source: source.time)
        return _killed(-(source.code or 0), source.who(case.job), case)
    # On one box the status is the stage's own: 128 and the signal's number. A job's is the highest of all its tasks',
    # most of which srun itself killed (srun(1), --kill-on-bad-exit), and shows nothing of the first.
    number = 0 if case.job else (case.evidence.status or 0) - 128
    started = [name for name in stages.names() if name in case.evidence.logs]
    return _killed(number, started[-1] if started else "", case) if number in SIGNALS else None


def _killed(number: int, who: str, case: Case) -> Failure:
    meaning = SIGNALS[number]
    line = f"{who or 'the step'} was ended by signal {number}"
    return Failure(meaning.kind, who, (line,), meaning.advice, retry(meaning.kind, case.evidence), ())


def _silent(case: Case) -> Failure | None:
    """A rank ended by itself, the first on its node, and left no record."""
    silent = [
        source
        for source in case.sources
        if source.first and (source.code or 0) > 0 and not source.words and not first_match(SECONDARY, source)
    ]
    if not silent:
        return None
    source = min(silent, key=lambda source: source.time)
    last = [line for line in source.text.splitlines() if line.strip()][-3:]
    lines = (f"torchrun: rank {source.rank} ended with status {source.code}", *shown(source, last))
    return Failure("code", source.who(case.job), lines, READ_LOG, False, ())


def _terminated(case: Case) -> Failure | None:
    """On one box, the first rank to end was sent SIGTERM, and its peers only lost it.

    torchrun sends SIGTERM to the ranks that are left, so that one is the cause only where its rank was the first.
    """
    first = [source for source in case.sources if source.first and source.code == -signal.SIGTERM]
    if case.job or not first:
        return None
    source = min(first, key=lambda source: source.time)
    who = source.who(case.job)
    line = f"{who} was ended by signal 15 (SIGTERM), which neither galley nor torchrun sent"
    return Failure("killed", who, (line,), SIGTERM, True, ())


def _fabric(case: Case) -> Failure | None:
    """The network's hardware reports an error."""
    matches = all_matches(FABRIC, case)
    return _failure(matches[0], case) if matches else None


def _secondary(case: Case) -> Failure | None:
    """Only secondary errors are left (a peer is gone, a connection was closed): the first of them."""
    matches = all_matches(SECONDARY, case)
    return _failure(matches[0], case) if matches else None


def _last(case: Case) -> Failure:
    """No rule matches: the last lines that look like an error, or that there are none."""
    status = case.evidence.status or 0
    suspicious = [
        (source, line) for source in case.sources for line in source.text.splitlines() if _LIKE_ERROR.search(line)
    ]
    if not 0 < status < 128 or not suspicious:
        advice = "It was ended without a word: see the cluster's records of the job (sacct), or the kernel's (dmesg)."
        ended = "exit status unknown" if case.evidence.status is None else f"exit status {status}"
        return Failure("killed", "", (ended,), advice, True, ())
    source = suspicious[-1][0]
    last = [line for log, line in suspicious if log is source][-3:]
    # A shell's 126 and 127: the command cannot be executed, or was not found.
    kind = "configuration" if status in (126, 127) else "code"
    return Failure(kind, source.who(case.job), shown(source, last), READ_LOG, False, ())


# Each question is only asked where those before it have no answer. A broken node or a full disk makes ranks raise, hang
# and be killed, so it comes first; an exception of the code comes after Slurm's own end of the job, which raises in
# ranks, too; and last come errors that every rank reports whose peer is gone.
_JUDGES: Sequence[Callable[[Case], Failure | None]] = (
    preflight, _hardware, _causes, _lost, _memory, hang, _ended, _code, _signal, _silent, _terminated, _fabric,
    _secondary,
)  # fmt: skip


def classify(evidence: Evidence) -> Failure:
    """The first cause of a failure. Never raises, whatever the logs hold."""
    sources = log_sources(evidence)
    # torch's stamps have a month and a day only: the year is that of the first record with a full time.
    known = [source.time for source in sources if 0 < source.time < 1e11]
    year = time.localtime(min(known)).tm_year if known else 2000
    case = Case(evidence, sources, in_job(evidence), nodes(evidence), year)
    for judge in _JUDGES:
        failure = judge(case)
        if failure:
            return failure
    return _last(case)
