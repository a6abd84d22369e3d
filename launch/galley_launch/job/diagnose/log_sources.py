"""What is known of each rank, stage and node of an attempt: a :class:`LogSource`, with when and how it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from galley.contract import stages
from galley_launch.job.diagnose.evidence import Evidence, clean
from galley_launch.job.diagnose.torchrun import ROOT, UNKNOWN, RankExit, moment, rank_exits

# The date that torch's C++ puts before a message: E1206 18:44:12.715298746
_STAMP = re.compile(r"\b[EWF](\d{1,2})(\d\d) (\d\d):(\d\d):(\d\d)\.(\d+) ")
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'^\s*File "[^"]+", line \d+,? in ')
# Where libraries lie says nothing.
_LIBRARY = re.compile(r'^File ".*/(?:site|dist)-packages/')
_LABEL = re.compile(r"^(?:\d+: )?(?:\[(?:default|rank)\d+\]: ?)*")
# How torchrun and a terminal end: what they raise says nothing of why.
_CHAINED = re.compile("During handling of the above exception|The above exception was the direct cause")
_MESSENGERS = re.compile(r"(?:^|\.)(?:ChildFailedError|SignalException|KeyboardInterrupt|SystemExit)\b")


@dataclass(frozen=True)
class Raised:
    """A chain of exceptions that nobody caught."""

    exceptions: tuple[str, ...]
    """The first of the chain first."""
    places: tuple[str, ...]
    """Where the last was raised, then where Galley called that."""


@dataclass(frozen=True)
class LogSource:
    """The log and the recorded error of one rank, one stage or one node, or of the job's own script."""

    name: str
    """``rank-3``, ``prepare``, ``export``; or a log that is shared: ``train``, ``train-node2``, ``job``."""
    log: str = ""
    """Name of its log; empty: it has none."""
    text: str = ""
    """That log, clean."""
    message: str = ""
    """The first line of the error that it recorded."""
    status: int | None = None
    """The status that it recorded: 2 for a user's mistake."""
    time: float = UNKNOWN
    """When it failed, in seconds since 1970."""
    host: str = ""
    """The node that it ran on, by Slurm's name."""
    code: int | None = None
    """Exit code that torchrun saw; negative: a signal."""
    first: bool = False
    """torchrun on its node saw it fail before the others."""
    raised: Raised | None = None
    """What its log ends with, but for what torchrun itself raises."""

    @property
    def words(self) -> str:
        """The error that it recorded and the exceptions in its log."""
        return "\n".join((self.message, *(self.raised.exceptions if self.raised else ())))

    @property
    def rank(self) -> int | None:
        """Its rank, if it is one."""
        word, _, number = self.name.partition("-")
        return int(number) if word == "rank" and number.isdecimal() else None

    def who(self, job: bool) -> str:
        """``rank 3 on node2``, ``prepare``, ``node2``, or nothing for what everybody shares."""
        if self.rank is not None:
            return f"rank {self.rank} on {self.host}" if job and self.host else f"rank {self.rank}"
        return self.host if self.is_script else self.name

    @property
    def is_script(self) -> bool:
        """Not a rank or a stage itself, but the shell and torchrun around it."""
        return self.rank is None and self.name not in stages.alone()


@dataclass(frozen=True)
class _Death:
    exit: RankExit
    node: str


def in_job(evidence: Evidence) -> bool:
    """Whether the attempt was a Slurm job."""
    return bool(evidence.state or evidence.preflight) or any(
        "/" in n or n == "job" or split(n)[1] for n in evidence.logs
    )


def split(log: str) -> tuple[str, str]:
    """Whose log it is by its name, and on which node: srun keeps one for each node, ``train-node2``."""
    word, _, node = log.partition("-")
    if word in stages.alone():
        return word, node
    return log, node if word in (*stages.names(), stages.PREFLIGHT) else ""


def nodes(evidence: Evidence) -> list[str]:
    """The job's nodes, as far as they left a log or a report."""
    logs = {split(name)[1] for name in evidence.logs} - {""}
    return sorted(logs | {str(each["node"]) for each in evidence.preflight if each.get("node")})


def _number(value: Any, otherwise: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise


def _deaths(evidence: Evidence) -> dict[int, _Death]:
    """How ranks ended by torchrun's tables; of a rank that is in several, the earliest."""
    found: dict[int, _Death] = {}
    for name, text in evidence.logs.items():
        for ended in rank_exits(clean(text)) if ROOT in text else []:
            if ended.rank not in found or ended.time < found[ended.rank].exit.time:
                found[ended.rank] = _Death(ended, split(name)[1])
    return found


def _hosts(evidence: Evidence) -> dict[str, str]:
    """Where each rank ran, by the name of its log: what Slurm calls the node, where that is known."""
    known = nodes(evidence)
    said = {f"rank-{each.get('rank')}": each.get("host") for each in evidence.heartbeats}
    said |= {str(each.get("who")): each["host"] for each in evidence.errors if each.get("host")}
    hosts = {}
    for name, host in said.items():
        short = str(host or "").partition(".")[0]
        hosts[name] = str(host or "") if str(host) in known or short not in known else short
    return hosts


def log_sources(evidence: Evidence) -> list[LogSource]:
    """Each rank, stage and node that left a log or a recorded error, or that torchrun saw end."""
    deaths, hosts = {f"rank-{number}": death for number, death in _deaths(evidence).items()}, _hosts(evidence)
    errors: dict[str, dict[str, Any]] = {}
    for error in evidence.errors:
        errors.setdefault(str(error.get("who")), error)
    logs = [(*split(log), log) for log in evidence.logs]
    without_log = [(name, "", "") for name in (*errors, *deaths) if name not in {name for name, _, _ in logs}]
    found = []
    for name, node, log in dict.fromkeys([*logs, *without_log]):
        error, death = errors.get(name, {}), deaths.get(name)
        text, message = clean(str(evidence.logs.get(log, ""))), clean(str(error.get("message") or ""))
        found.append(
            LogSource(
                name=name,
                log=log,
                text=text,
                message=message.partition("\n")[0],
                raised=_raised(text, message),
                status=error["status"] if isinstance(error.get("status"), int) else None,
                time=_number(error.get("time"), death.exit.time if death else UNKNOWN),
                host=node or hosts.get(name) or (death.node if death else ""),
                code=death.exit.code if death else None,
                first=bool(death and death.exit.first),
            )
        )
    return found


def stamp(line: str, year: int) -> float:
    """When torch's C++ printed ``line``, if it says so."""
    match = _STAMP.search(line)
    if not match:
        return UNKNOWN
    month, day, hour, minute, second, part = match.groups()
    whole = moment(f"{year} {month} {day} {hour} {minute} {second}", "%Y %m %d %H %M %S")
    return whole + float(f"0.{part}")


def _raised(text: str, message: str) -> Raised | None:
    """The last chain of exceptions in ``text``, or the last that fits the error that was recorded."""
    raw = text.splitlines()
    lines = [_LABEL.sub("", line, count=1) for line in raw]
    starts = [number for number, line in enumerate(lines) if line.strip() == _TRACEBACK]
    wanted, chosen, before = message.partition(":")[0], None, None
    for start in starts:
        end = next((at for at in range(start + 1, len(lines)) if lines[at] and lines[at][0] not in " \t"), None)
        if end is None or end in starts or _MESSENGERS.search(lines[end]):
            continue
        chained = before is not None and any(_CHAINED.match(line) for line in lines[before[0] : start])
        exceptions = (*(before[1] if before and chained else ()), raw[end])
        before = (end, exceptions)
        if chosen is None or wanted in lines[end] or wanted not in chosen.exceptions[-1]:
            chosen = Raised(exceptions, _places(lines[start:end]))
    return chosen


def _places(lines: list[str]) -> tuple[str, ...]:
    frames = [_LIBRARY.sub('File "', line.strip()) for line in lines if _FRAME.match(line)]
    in_galley = [frame for frame in frames if "galley/" in frame]
    return tuple(dict.fromkeys([*frames[-1:], *in_galley[-1:]]))


def stack(source: LogSource) -> tuple[str, ...]:
    """Where a rank stood when it was made to say so (faulthandler), then where Galley called that."""
    _, _, dump = source.text.rpartition("(most recent call first):\n")
    return _places(list(reversed(dump.splitlines())))
