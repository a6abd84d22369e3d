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

# Lines that show no failure: warnings, what is tried again, and the source lines of a traceback.
_IGNORED = re.compile(r"^[^'\"]* raise \w|Warning: |\b[Rr]etrying\b|\b[Ww]ill retry\b")
# What torch's C++ logger puts before a message: of it only the time is shown.
_PREFIX = re.compile(r"^(?:\[rank\d+\]:)?\[[EWF]\d+ (\d\d:\d\d:\d\d)\S* [\w.]+:\d+\] (?:\[[^\]]*\] *)*")
_TIME = r"\1 "
SHOWN = 8
"""The most lines that are shown of a failure."""
WIDTH = 240
"""The most characters of such a line."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed."""

    kind: str
    """A key of :data:`galley_launch.job.diagnose.advice.WORDS`."""
    who: str
    """Who failed first: ``rank 3 on node2``, ``prepare``, ``node2``; empty: no single one."""
    lines: tuple[str, ...]
    """What shows it, each with its source: ``rank-3.log: CUDA out of memory. Tried …``. At most :data:`SHOWN`."""
    advice: str
    """What to change."""
    retry: bool
    """Whether another attempt may succeed. (The caller sees whether the same failure came twice.)"""
    nodes: tuple[str, ...]
    """Nodes to blame and to avoid; empty: none, or unknown."""


@dataclass(frozen=True)
class Case:
    """An attempt that failed: the evidence, and what each log source holds of it."""

    evidence: Evidence
    sources: Sequence[LogSource]
    job: bool
    """Whether it was a Slurm job, with nodes to blame and to avoid; False: on one box."""
    nodes: Sequence[str]
    """Its nodes, as far as they are known."""
    year: int
    """The year of the attempt: torch's time stamps have none."""

    @property
    def started(self) -> bool:
        """Whether any rank started: then the environment is complete."""
        return bool(self.evidence.heartbeats) or any(log.rank is not None and log.text for log in self.sources)


@dataclass(frozen=True)
class Finding:
    """A rule that matches, and where."""

    source: LogSource
    rule: Rule
    order: int
    """Index of the rule in its table."""
    line: str
    rest: tuple[str, ...]
    """The lines after it that belong to it."""
    node: str
    """The node that the line names; empty: none."""


def shown(source: LogSource, lines: Iterable[str]) -> tuple[str, ...]:
    """``lines`` of a log, or of the error that was recorded, each with the name of its file."""
    file = f"errors/{source.name}.json" if not source.text else source.log if "/" in source.log else f"{source.log}.log"
    return tuple(cut(f"{file}: {_PREFIX.sub(_TIME, line.strip())}") for line in lines if line.strip())[:SHOWN]


def cut(line: str) -> str:
    """``line`` on one line of at most :data:`WIDTH` characters."""
    line = " ".join(clean(line).split("\n"))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def _search(rules: Sequence[Rule], source: LogSource, text: str) -> Finding | None:
    """The first rule in the table that matches anywhere in ``text``, apart from lines that are ignored."""
    # The rules are the outer loop: a special rule wins over a general one wherever in the text the two match.
    for order, rule in enumerate(rules):
        for match in rule.pattern.finditer(text):
            begin = text.rfind("\n", 0, match.start()) + 1
            line, *rest = text[begin:].split("\n", rule.more + 1)[: rule.more + 1]
            if not _IGNORED.search(line):
                return Finding(source, rule, order, line, tuple(rest), match.groupdict().get("node") or "")
    return None


def _explained(source: LogSource) -> bool:
    """Whether a rule knows the error that ``source`` recorded or raised."""
    return any(rule.pattern.search(source.words) for rule in (*HARDWARE, *CAUSES, *SECONDARY))


def first_match(rules: Sequence[Rule], source: LogSource) -> Finding | None:
    """The first of ``rules`` that matches ``source``: its recorded error and exceptions first, then its log.

    Where a source recorded an error that no table knows, or a user's mistake, other lines of its log are not taken for
    the cause. The exception is a broken GPU, after which code fails in ways that no table can list.
    """
    match = _search(rules, source, source.words)
    if match:
        # The log often has the same failure in more detail than the exception, and with the lines that belong to it.
        detailed = _search([rule for rule in rules if rule.kind == match.rule.kind], source, source.text)
        return replace(detailed, order=match.order) if detailed else match
    if source.status == 2 or (source.words and rules is not HARDWARE and not _explained(source)):
        return None
    return _search(rules, source, source.text)


def all_matches(rules: Sequence[Rule], case: Case) -> list[Finding]:
    """The first match of ``rules`` in every source, first in time first."""
    matches = [
        match for match in (first_match(rules, source) for source in case.sources) if match and _counts(match, case)
    ]
    # Matches at one time, or all at an unknown one, are ordered by their rules (the special first), then by rank.
    return sorted(
        matches, key=lambda match: (when(match, case), match.order, match.source.rank or 0, match.source.name)
    )


def _counts(finding: Finding, case: Case) -> bool:
    """Whether a match may be the cause: once ranks have started, what a job's scripts complained about was not."""
    return not (finding.source.is_script and case.started and finding.rule.kind == "configuration")


def when(finding: Finding, case: Case) -> float:
    """Seconds since the epoch; :data:`~galley_launch.job.diagnose.torchrun.UNKNOWN` where no record has the time."""
    source = finding.source
    return source.time if source.time != UNKNOWN else stamp(finding.line, case.year)


def retry(kind: str, evidence: Evidence) -> bool:
    """Whether another attempt may succeed. Memory that does not suffice for a step will not do so next time."""
    return kind in RETRIED and (not kind.endswith("_oom") or bool(evidence.step))


def everywhere(failure: Failure, case: Case) -> Failure:
    """Correct the blame: where every node fails alike, the job's request or its environment is wrong, and no node is.

    And a wrong configuration that only some of the nodes report is a fault of these nodes.
    """
    some = set(failure.nodes) < set(case.nodes)
    if failure.kind == "configuration" and failure.nodes:
        return replace(failure, kind="node", retry=True) if some else replace(failure, nodes=())
    if some or len(case.nodes) < 2:
        return failure
    if failure.kind == "node":
        failure = replace(failure, kind="configuration", advice=EVERYWHERE)
    return replace(failure, retry=False, nodes=())
