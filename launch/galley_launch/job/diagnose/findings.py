"""Which rules of :mod:`galley_launch.job.diagnose.patterns` match an attempt's logs and records, and where first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from galley_launch.job.diagnose.advice import EVERYWHERE
from galley_launch.job.diagnose.evidence import Evidence, clean
from galley_launch.job.diagnose.log_sources import LogSource, stamp
from galley_launch.job.diagnose.patterns import CAUSES, HARDWARE, RETRIED, SECONDARY, Rule
from galley_launch.job.diagnose.torchrun import UNKNOWN

# Warnings, what is tried again, and a traceback's source lines.
_PASSING = re.compile(r"^[^'\"]* raise \w|Warning: |\b[Rr]etrying\b|\b[Ww]ill retry\b")
# What torch's C++ puts before a message; its time is worth keeping.
_PREFIX = re.compile(r"^(?:\[rank\d+\]:)?\[[EWF]\d+ (\d\d:\d\d:\d\d)\S* [\w.]+:\d+\] (?:\[[^\]]*\] *)*")
_TIME = r"\1 "
SHOWN = 8
"""Lines that show a failure."""
WIDTH = 240
"""Characters of such a line."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    kind: str
    """A key of :data:`galley_launch.job.diagnose.advice.WORDS`."""
    who: str
    """Who failed first: ``rank 3 on node2``, ``prepare``, ``node2``; empty: nobody in particular."""
    lines: tuple[str, ...]
    """What shows it, each with its source: ``rank-3.log: CUDA out of memory. Tried …``. At most :data:`SHOWN`."""
    advice: str
    """What to change."""
    retry: bool
    """Whether trying again can cure it. (That the same failure came twice is the caller's to see.)"""
    nodes: tuple[str, ...]
    """Nodes to blame and to avoid; empty: none, or unknown."""


@dataclass(frozen=True)
class Case:
    """An attempt that failed: the evidence, and what each log source holds of it."""

    evidence: Evidence
    sources: Sequence[LogSource]
    job: bool
    """A Slurm job, with nodes to blame and to avoid; not one box."""
    nodes: Sequence[str]
    """Its nodes, as far as they are known."""
    year: int
    """Of the attempt: torch's time stamps have none."""

    @property
    def started(self) -> bool:
        """Whether any rank came up: then the environment is not what is missing."""
        return bool(self.evidence.heartbeats) or any(each.rank is not None and each.text for each in self.sources)


@dataclass(frozen=True)
class Finding:
    """A rule that matches, and where."""

    source: LogSource
    rule: Rule
    order: int
    """Place of the rule in its table."""
    line: str
    rest: tuple[str, ...]
    """What follows the line and belongs to it."""
    node: str
    """The node that the line names."""


def shown(source: LogSource, lines: Iterable[str]) -> tuple[str, ...]:
    """``lines`` of a log, or of the error that was recorded, each with the name of its file."""
    file = f"errors/{source.name}.json" if not source.text else source.log if "/" in source.log else f"{source.log}.log"
    return tuple(cut(f"{file}: {_PREFIX.sub(_TIME, line.strip())}") for line in lines if line.strip())[:SHOWN]


def cut(line: str) -> str:
    """``line`` on one line of at most :data:`WIDTH` characters."""
    line = " ".join(clean(line).split("\n"))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _search(rules: Sequence[Rule], source: LogSource, text: str) -> Finding | None:
    """The first rule in the table that fits anywhere in ``text``, but for what is ignored."""
    for order, rule in enumerate(rules):
        for match in rule.pattern.finditer(text):
            begin = text.rfind("\n", 0, match.start()) + 1
            line, *rest = text[begin:].split("\n", rule.more + 1)[: rule.more + 1]
            if not _PASSING.search(line):
                return Finding(source, rule, order, line, tuple(rest), match.groupdict().get("node") or "")
    return None


def _explained(source: LogSource) -> bool:
    """Whether a rule knows the error that ``source`` recorded or raised."""
    return any(rule.pattern.search(source.words) for rule in (*HARDWARE, *CAUSES, *SECONDARY))


def first_match(rules: Sequence[Rule], source: LogSource) -> Finding | None:
    """The first of ``rules`` that matches ``source``: its recorded error and exceptions first, then its log.

    An error that no table knows, or a user's mistake, is not explained by some other line of its log; only a broken
    GPU, which has many names, is.
    """
    found = _search(rules, source, source.words)
    if found:  # better as the log has it: it may be more special, and more follows
        better = _search([rule for rule in rules if rule.kind == found.rule.kind], source, source.text)
        return replace(better, order=found.order) if better else found
    if source.status == 2 or (source.words and rules is not HARDWARE and not _explained(source)):
        return None
    return _search(rules, source, source.text)


def all_matches(rules: Sequence[Rule], case: Case) -> list[Finding]:
    """The first match of ``rules`` in every source, first in time first."""
    found = [
        finding
        for finding in (first_match(rules, source) for source in case.sources)
        if finding and _counts(finding, case)
    ]
    return sorted(found, key=lambda each: (when(each, case), each.order, each.source.rank or 0, each.source.name))


def _counts(finding: Finding, case: Case) -> bool:
    """Once ranks are up, what a job's scripts lacked does not matter."""
    return not (finding.source.is_script and case.started and finding.rule.kind == "configuration")


def when(finding: Finding, case: Case) -> float:
    """Seconds since 1970; :data:`~galley_launch.job.diagnose.torchrun.UNKNOWN` where nothing says."""
    source = finding.source
    return source.time if source.time != UNKNOWN else stamp(finding.line, case.year)


def retry(kind: str, evidence: Evidence) -> bool:
    """Memory that was not enough for the first step is not enough for the next try either."""
    return kind in RETRIED and (not kind.endswith("_oom") or bool(evidence.step))


def everywhere(failure: Failure, case: Case) -> Failure:
    """Where every node is to blame, none is: the request or the environment is. And the other way round."""
    some = set(failure.nodes) < set(case.nodes)
    if failure.kind == "configuration" and failure.nodes:
        return replace(failure, kind="node", retry=True) if some else replace(failure, nodes=())
    if some or len(case.nodes) < 2:
        return failure
    if failure.kind == "node":
        failure = replace(failure, kind="configuration", advice=EVERYWHERE)
    return replace(failure, retry=False, nodes=())
