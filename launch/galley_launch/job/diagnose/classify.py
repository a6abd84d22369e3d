"""Why did an attempt fail, who failed first, and can trying again cure it? For ``galley why`` and a job's verdict.

A failure on one of many ranks makes all the others fail too, louder: connections close, collectives time out, torchrun
ends the rest. So the questions come in an order, from what explains everything to what only follows (:data:`_JUDGES`),
and within a question the first in time counts: by recorded errors, torchrun's tables and torch's own time stamps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from galley.contract import stages
from galley_launch.job.diagnose.advice import LOOK
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
    SIGNALS,
    STATES,
)

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
    rule, source = finding.rule, finding.source
    # The traceback of a rank whose peers were gone shows where it waited for them: nothing about the cause.
    where = source.raised.places if source.raised and rule not in (*FABRIC, *SECONDARY) else ()
    return Failure(
        kind=rule.kind,
        who=_labelled(source, finding.line).who(case.job) or finding.node,
        lines=shown(source, dict.fromkeys([finding.line, *finding.rest, *where])),
        advice=rule.advice,
        retry=retry(rule.kind, case.evidence) if rule.retry is None else rule.retry,
        nodes=tuple(sorted({node for node in blamed if node})),
    )


def _blamed(found: Sequence[Finding]) -> set[str]:
    """Nodes to blame: those whose logs match a rule of the same kind of failure as the first match does."""
    return {
        each.node or each.source.host for each in found if each.rule.blames and each.rule.kind == found[0].rule.kind
    }


def _hardware(case: Case) -> Failure | None:
    """A GPU or a driver is broken, or a GPU is missing. On one box the latter is what the user asked for."""
    found = [each for each in all_matches(HARDWARE, case) if case.job or each.source.status != 2]
    return everywhere(_failure(found[0], case, _blamed(found)), case) if found else None


def _causes(case: Case) -> Failure | None:
    """Something that breaks a rank or a stage by itself, or a user's mistake (status 2), whichever came first."""
    found = all_matches(CAUSES, case)
    known = {each.source.name for each in found}
    wrong = [source for source in case.sources if source.status == 2 and source.name not in known]
    if wrong and (not found or min(source.time for source in wrong) <= when(found[0], case)):
        source = min(wrong, key=lambda each: each.time)
        what, _, todo = source.message.rpartition("; ")
        lines = shown(replace(source, text=""), [what or todo])
        advice = f"{todo[:1].upper()}{todo[1:]}." if what else LOOK
        return Failure("configuration", source.who(case.job), lines, advice, False, ())
    return everywhere(_failure(found[0], case, _blamed(found)), case) if found else None


def _state(case: Case) -> tuple[str, tuple[str, bool | None, str] | None]:
    word = re.match(r"[A-Z_]*", case.evidence.state.strip().upper())
    return (word[0], STATES.get(word[0])) if word else ("", None)


def _by_state(case: Case, kinds: Sequence[str]) -> Failure | None:
    """Slurm's state of the job says it."""
    word, known = _state(case)
    if not known or known[0] not in kinds:
        return None
    kind, cure, advice = known
    again = retry(kind, case.evidence) if cure is None else cure
    return Failure(kind, "", (f"Slurm: the job is {word}",), advice, again, ())


def _lost(case: Case) -> Failure | None:
    """Slurm has lost a node."""
    found = all_matches(LOST, case)
    if not found:
        return _by_state(case, ["node"])
    named = {each.node for each in found if each.node}
    first = next((each for each in found if each.node), found[0])
    return replace(_failure(first, case, named), who=first.node)


def _memory(case: Case) -> Failure | None:
    """The kernel or Slurm killed a process because the host's memory was used up; torchrun's table says which rank."""
    found = all_matches(MEMORY, case)
    failure = _failure(found[0], case) if found else _by_state(case, ["host_oom"])
    if failure is None:
        return None
    place = found[0].node or found[0].source.host if found else ""
    killed = [source for source in case.sources if source.code == -9 and place in ("", source.host)]
    who = min(killed, key=lambda each: each.time).who(case.job) if killed else failure.who or place
    return replace(failure, who=who)


def _ended(case: Case) -> Failure | None:
    """Slurm ended the job: at its time limit, for another job, or because somebody asked."""
    found = [each for each in all_matches(ENDINGS, case) if each.source.rank is None]
    return _by_state(case, ["killed"]) or (replace(_failure(found[0], case), who="") if found else None)


def _code(case: Case) -> Failure | None:
    """An exception that no rule knows, and that is not a secondary error: the code's own fault."""
    raised = [
        source for source in case.sources if source.words and not any(r.pattern.search(source.words) for r in SECONDARY)
    ]
    if not raised:
        return None
    source = min(raised, key=lambda each: (each.time, each.rank or 0))
    lines = (source.raised.exceptions[-1], *source.raised.places) if source.raised else (source.message,)
    return Failure("code", _labelled(source, lines[0]).who(case.job), shown(source, lines), LOOK, False, ())


def _signal(case: Case) -> Failure | None:
    """A rank, or a stage, died of a signal that neither Galley, torchrun nor Slurm sends (SIGSEGV, SIGBUS …)."""
    died = [source for source in case.sources if source.first and source.code is not None and -source.code in SIGNALS]
    if died:
        source = min(died, key=lambda each: each.time)
        return _killed(-(source.code or 0), source.who(case.job), case)
    # On one box a stage's own status. A job's is the highest of all its steps', most of which srun itself killed.
    number = 0 if case.job else (case.evidence.status or 0) - 128
    began = [name for name in stages.names() if name in case.evidence.logs]
    return _killed(number, began[-1] if began else "", case) if number in SIGNALS else None


def _killed(number: int, who: str, case: Case) -> Failure:
    kind, advice = SIGNALS[number]
    line = f"{who or 'the step'} was ended by signal {number}"
    return Failure(kind, who, (line,), advice, retry(kind, case.evidence), ())


def _silent(case: Case) -> Failure | None:
    """A rank ended by itself, the first on its node, and left no record."""
    silent = [
        v for v in case.sources if v.first and (v.code or 0) > 0 and not v.words and not first_match(SECONDARY, v)
    ]
    if not silent:
        return None
    source = min(silent, key=lambda each: each.time)
    last = [line for line in source.text.splitlines() if line.strip()][-3:]
    lines = (f"torchrun: rank {source.rank} ended with status {source.code}", *shown(source, last))
    return Failure("code", source.who(case.job), lines, LOOK, False, ())


def _fabric(case: Case) -> Failure | None:
    """The network's hardware complains."""
    found = all_matches(FABRIC, case)
    return _failure(found[0], case) if found else None


def _secondary(case: Case) -> Failure | None:
    """Only secondary errors are left (a peer is gone, a connection was closed): the first of them."""
    found = all_matches(SECONDARY, case)
    return _failure(found[0], case) if found else None


def _last(case: Case) -> Failure:
    """No rule fits: the last lines that look like an error, or that there are none."""
    status = case.evidence.status or 0
    suspicious = [
        (source, line) for source in case.sources for line in source.text.splitlines() if _LIKE_ERROR.search(line)
    ]
    if not 0 < status < 128 or not suspicious:
        advice = "It was ended without a word: see the cluster's records of the job (sacct), or the kernel's (dmesg)."
        ended = "exit status unknown" if case.evidence.status is None else f"exit status {status}"
        return Failure("killed", "", (ended,), advice, True, ())
    source = suspicious[-1][0]
    last = [line for each, line in suspicious if each is source][-3:]
    kind = "configuration" if status in (126, 127) else "code"
    return Failure(kind, source.who(case.job), shown(source, last), LOOK, False, ())


_JUDGES: Sequence[Callable[[Case], Failure | None]] = (
    preflight, _hardware, _causes, _lost, _memory, hang, _ended, _code, _signal, _silent, _fabric, _secondary,
)  # fmt: skip


def classify(evidence: Evidence) -> Failure:
    """The first cause of a failure. Never raises, whatever the logs hold."""
    sources = log_sources(evidence)
    known = [source.time for source in sources if 0 < source.time < 1e11]
    year = time.localtime(min(known)).tm_year if known else 2000
    case = Case(evidence, sources, in_job(evidence), nodes(evidence), year)
    for judge in _JUDGES:
        failure = judge(case)
        if failure:
            return failure
    return _last(case)
