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
from galley_launch.job.diagnose.findings import Case, Failure, Finding, everywhere, find, hear, retry, shown, when
from galley_launch.job.diagnose.patterns import CAUSES, ECHOES, ENDINGS, FABRIC, HARDWARE, LOST, MEMORY, SIGNALS, STATES
from galley_launch.job.diagnose.voices import Voice, in_job, nodes, voices
from galley_launch.job.diagnose.watched import hang, preflight

__all__ = ["Failure", "classify"]

_SOUNDS = re.compile(
    r"(?i)error|exception|fail|fatal|abort|cannot|can't|unable|invalid|denied|refused|not found|no such"
)
_LABELLED = re.compile(r"\[rank(\d+)\]:")


def _speaker(voice: Voice, line: str) -> Voice:
    """Whose words ``line`` holds: torch labels what a rank says before it has a log of its own."""
    label = _LABELLED.search(line) if voice.rank is None else None
    return replace(voice, name=f"rank-{label[1]}") if label else voice


def _failure(finding: Finding, case: Case, blamed: Iterable[str] = ()) -> Failure:
    rule, voice = finding.rule, finding.voice
    # Where a rank stood when its peers were gone says nothing.
    where = voice.raised.places if voice.raised and rule not in (*FABRIC, *ECHOES) else ()
    return Failure(
        kind=rule.kind,
        who=_speaker(voice, finding.line).who(case.job) or finding.node,
        lines=shown(voice, dict.fromkeys([finding.line, *finding.rest, *where])),
        advice=rule.advice,
        retry=retry(rule.kind, case.evidence) if rule.retry is None else rule.retry,
        nodes=tuple(sorted({node for node in blamed if node})),
    )


def _blamed(found: Sequence[Finding]) -> set[str]:
    """Nodes on which the same is said as by the first."""
    return {each.node or each.voice.host for each in found if each.rule.blames and each.rule.kind == found[0].rule.kind}


def _hardware(case: Case) -> Failure | None:
    """A GPU or a driver is broken, or a GPU is missing. On one box the latter is what the user asked for."""
    found = [each for each in hear(HARDWARE, case) if case.job or each.voice.status != 2]
    return everywhere(_failure(found[0], case, _blamed(found)), case) if found else None


def _causes(case: Case) -> Failure | None:
    """Something that breaks a rank or a stage by itself, or a user's mistake."""
    found = hear(CAUSES, case)
    known = {each.voice.name for each in found}
    wrong = [voice for voice in case.voices if voice.status == 2 and voice.name not in known]
    if wrong and (not found or min(voice.time for voice in wrong) <= when(found[0], case)):
        voice = min(wrong, key=lambda each: each.time)
        what, _, todo = voice.message.rpartition("; ")
        lines = shown(replace(voice, text=""), [what or todo])
        advice = f"{todo[:1].upper()}{todo[1:]}." if what else LOOK
        return Failure("configuration", voice.who(case.job), lines, advice, False, ())
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
    found = hear(LOST, case)
    if not found:
        return _by_state(case, ["node"])
    named = {each.node for each in found if each.node}
    first = next((each for each in found if each.node), found[0])
    return replace(_failure(first, case, named), who=first.node)


def _memory(case: Case) -> Failure | None:
    """The kernel or Slurm ended somebody for want of memory: torchrun says whom."""
    found = hear(MEMORY, case)
    failure = _failure(found[0], case) if found else _by_state(case, ["host_oom"])
    if failure is None:
        return None
    place = found[0].node or found[0].voice.host if found else ""
    killed = [voice for voice in case.voices if voice.code == -9 and place in ("", voice.host)]
    who = min(killed, key=lambda each: each.time).who(case.job) if killed else failure.who or place
    return replace(failure, who=who)


def _ended(case: Case) -> Failure | None:
    """Slurm ended the job: at its time limit, for another job, or because somebody asked."""
    found = [each for each in hear(ENDINGS, case) if each.voice.rank is None]
    return _by_state(case, ["killed"]) or (replace(_failure(found[0], case), who="") if found else None)


def _code(case: Case) -> Failure | None:
    """An exception that no table knows, as far as it is not a peer's fault."""
    raised = [voice for voice in case.voices if voice.words and not any(r.pattern.search(voice.words) for r in ECHOES)]
    if not raised:
        return None
    voice = min(raised, key=lambda each: (each.time, each.rank or 0))
    lines = (voice.raised.exceptions[-1], *voice.raised.places) if voice.raised else (voice.message,)
    return Failure("code", _speaker(voice, lines[0]).who(case.job), shown(voice, lines), LOOK, False, ())


def _signal(case: Case) -> Failure | None:
    """A rank, or a stage, died of a signal that nobody here sends."""
    died = [voice for voice in case.voices if voice.first and voice.code is not None and -voice.code in SIGNALS]
    if died:
        voice = min(died, key=lambda each: each.time)
        return _killed(-(voice.code or 0), voice.who(case.job), case)
    # On one box a stage's own status. A job's is the highest of all its steps', most of which srun itself killed.
    number = 0 if case.job else (case.evidence.status or 0) - 128
    began = [name for name in stages.names() if name in case.evidence.logs]
    return _killed(number, began[-1] if began else "", case) if number in SIGNALS else None


def _killed(number: int, who: str, case: Case) -> Failure:
    kind, advice = SIGNALS[number]
    line = f"{who or 'the step'} was ended by signal {number}"
    return Failure(kind, who, (line,), advice, retry(kind, case.evidence), ())


def _silent(case: Case) -> Failure | None:
    """A rank ended by itself, the first on its node, and left no word."""
    mute = [v for v in case.voices if v.first and (v.code or 0) > 0 and not v.words and not find(ECHOES, v)]
    if not mute:
        return None
    voice = min(mute, key=lambda each: each.time)
    last = [line for line in voice.text.splitlines() if line.strip()][-3:]
    lines = (f"torchrun: rank {voice.rank} ended with status {voice.code}", *shown(voice, last))
    return Failure("code", voice.who(case.job), lines, LOOK, False, ())


def _fabric(case: Case) -> Failure | None:
    """The network's hardware complains."""
    found = hear(FABRIC, case)
    return _failure(found[0], case) if found else None


def _echo(case: Case) -> Failure | None:
    """Only what follows from a failure is left: the first of it."""
    found = hear(ECHOES, case)
    return _failure(found[0], case) if found else None


def _last(case: Case) -> Failure:
    """No table knows anything: what sounds most like an error."""
    status = case.evidence.status or 0
    told = [(voice, line) for voice in case.voices for line in voice.text.splitlines() if _SOUNDS.search(line)]
    if not 0 < status < 128 or not told:
        advice = "It was ended without a word: see the cluster's records of the job (sacct), or the kernel's (dmesg)."
        said = "exit status unknown" if case.evidence.status is None else f"exit status {status}"
        return Failure("killed", "", (said,), advice, True, ())
    voice = told[-1][0]
    last = [line for each, line in told if each is voice][-3:]
    kind = "configuration" if status in (126, 127) else "code"
    return Failure(kind, voice.who(case.job), shown(voice, last), LOOK, False, ())


_JUDGES: Sequence[Callable[[Case], Failure | None]] = (
    preflight, _hardware, _causes, _lost, _memory, hang, _ended, _code, _signal, _silent, _fabric, _echo,
)  # fmt: skip


def classify(evidence: Evidence) -> Failure:
    """The first cause of a failure. Never raises, whatever the logs hold."""
    heard = voices(evidence)
    known = [voice.time for voice in heard if 0 < voice.time < 1e11]
    year = time.localtime(min(known)).tm_year if known else 2000
    case = Case(evidence, heard, in_job(evidence), nodes(evidence), year)
    for judge in _JUDGES:
        failure = judge(case)
        if failure:
            return failure
    return _last(case)
