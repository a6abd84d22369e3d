"""What is known of each rank, stage and node of an attempt: a :class:`LogSource`, with when and how it ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from galley.contract import stages
from galley_launch.job.diagnose.evidence import Evidence, clean
from galley_launch.job.diagnose.torchrun import ROOT, UNKNOWN, RankExit, moment, rank_exits

# The level, date and time that torch's C++ puts before a message: E1206 18:44:12.715298746
_STAMP = re.compile(r"\b[EWF](\d{1,2})(\d\d) (\d\d):(\d\d):(\d\d)\.(\d+) ")
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'^\s*File "[^"]+", line \d+,? in ')
# The folder of an environment, which is left out where a frame is shown.
_LIBRARY = re.compile(r'^File ".*/(?:site|dist)-packages/')
# What torchrun (--tee), torch and srun (--label) put before a line: "[rank3]:", "[default0]:", "3: ".
_LABEL = re.compile(r"^(?:\d+: )?(?:\[(?:default|rank)\d+\]: ?)*")
_CHAINED = re.compile("During handling of the above exception|The above exception was the direct cause")
# Exceptions that only report that something ended, raised by torchrun or at a signal: never the cause.
_MESSENGERS = re.compile(r"(?:^|\.)(?:ChildFailedError|SignalException|KeyboardInterrupt|SystemExit)\b")


@dataclass(frozen=True)
class Raised:
    """A chain of exceptions that nobody caught."""

    exceptions: tuple[str, ...]
    """The first of the chain first."""
    places: tuple[str, ...]
    """The frame that raised the last of them, then the frame of Galley that called it."""


@dataclass(frozen=True)
class LogSource:
    """The log and the recorded error of one rank, one stage or one node, or of the job's own script."""

    name: str
    """``rank-3``, ``prepare``, ``export``; or a log that is shared: ``train``, ``train-node2``, ``job``."""
    log: str = ""
    """Name of its log; empty: it has none."""
    text: str = ""
    """Its text, without control characters (:func:`clean`)."""
    message: str = ""
    """The first line of the error that it recorded."""
    status: int | None = None
    """The status that it recorded: 2 for a user's mistake."""
    time: float = UNKNOWN
    """When it failed, in seconds since the epoch."""
    host: str = ""
    """The node that it ran on, by Slurm's name."""
    code: int | None = None
    """Exit code that torchrun saw; negative: a signal."""
    first: bool = False
    """Whether torchrun on its node saw it fail before the others."""
    raised: Raised | None = None
    """The last exceptions in its log, apart from those that torchrun itself raises."""

    @property
    def words(self) -> str:
        """The error that it recorded and the exceptions in its log."""
        return "\n".join((self.message, *(self.raised.exceptions if self.raised else ())))

    @property
    def rank(self) -> int | None:
        """Its number, where it is a rank."""
        prefix, _, number = self.name.partition("-")
        return int(number) if prefix == "rank" and number.isdecimal() else None

    def who(self, job: bool) -> str:
        """``rank 3 on node2``, ``prepare``, ``node2``; empty for a log that all nodes share."""
        if self.rank is not None:
            return f"rank {self.rank} on {self.host}" if job and self.host else f"rank {self.rank}"
        return self.host if self.is_script else self.name

    @property
    def is_script(self) -> bool:
        """Whether it is the shell and torchrun around a stage, not a rank or a stage itself."""
        return self.rank is None and self.name not in stages.alone()


@dataclass(frozen=True)
class _NodeExit:
    """The end of a rank, and the node whose torchrun saw it (empty: one box)."""

    exit: RankExit
    node: str


def in_job(evidence: Evidence) -> bool:
    """Whether the attempt was a Slurm job."""
    return bool(evidence.state or evidence.preflight) or any(
        "/" in log or log == "job" or split(log)[1] for log in evidence.logs
    )


def split(log: str) -> tuple[str, str]:
    """(Source, node) of a log by its name. A log that srun writes for each node has the node's: ``train-node2``."""
    stage, _, node = log.partition("-")
    if stage in stages.alone():
        return stage, node
    return log, node if stage in (*stages.names(), stages.PREFLIGHT) else ""


def nodes(evidence: Evidence) -> list[str]:
    """The job's nodes, as far as they left a log or a report."""
    logs = {split(name)[1] for name in evidence.logs} - {""}
    return sorted(logs | {str(report["node"]) for report in evidence.preflight if report.get("node")})


def _number(value: Any, default: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _exits(evidence: Evidence) -> dict[int, _NodeExit]:
    """How ranks ended by torchrun's tables; of a rank that is in several, the earliest."""
    exits: dict[int, _NodeExit] = {}
    for name, text in evidence.logs.items():
        for ended in rank_exits(clean(text)) if ROOT in text else []:
            if ended.rank not in exits or ended.time < exits[ended.rank].exit.time:
                exits[ended.rank] = _NodeExit(ended, split(name)[1])
    return exits


def _hosts(evidence: Evidence) -> dict[str, str]:
    """The host of each rank and stage, by the name of its log; by Slurm's name for the node, where that is known."""
    known = nodes(evidence)
    # Where both have a host, that of the recorded error counts.
    recorded = {f"rank-{beat.get('rank')}": beat.get("host") for beat in evidence.heartbeats}
    recorded |= {str(error.get("who")): error["host"] for error in evidence.errors if error.get("host")}
    hosts = {}
    for name, host in recorded.items():
        short = str(host or "").partition(".")[0]
        hosts[name] = str(host or "") if str(host) in known or short not in known else short
    return hosts


def log_sources(evidence: Evidence) -> list[LogSource]:
    """Each rank, stage and node that left a log or a recorded error, or that torchrun saw end."""
    exits, hosts = {f"rank-{number}": ended for number, ended in _exits(evidence).items()}, _hosts(evidence)
    errors: dict[str, dict[str, Any]] = {}
    for error in evidence.errors:  # in the order of time, so that the first error of each is kept
        errors.setdefault(str(error.get("who")), error)
    logs = [(*split(log), log) for log in evidence.logs]
    without_log = [(name, "", "") for name in (*errors, *exits) if name not in {name for name, _, _ in logs}]
    sources = []
    for name, node, log in dict.fromkeys([*logs, *without_log]):
        error, ended = errors.get(name, {}), exits.get(name)
        text, message = clean(str(evidence.logs.get(log, ""))), clean(str(error.get("message") or ""))
        sources.append(
            LogSource(
                name=name,
                log=log,
                text=text,
                message=message.partition("\n")[0],
                raised=_raised(text, message),
                status=error["status"] if isinstance(error.get("status"), int) else None,
                time=_number(error.get("time"), ended.exit.time if ended else UNKNOWN),
                host=node or hosts.get(name) or (ended.node if ended else ""),
                code=ended.exit.code if ended else None,
                first=bool(ended and ended.exit.first),
            )
        )
    return sources


def stamp(line: str, year: int) -> float:
    """When torch's C++ printed ``line``, in seconds since the epoch; :data:`UNKNOWN` where it has no time stamp."""
    match = _STAMP.search(line)
    if not match:
        return UNKNOWN
    month, day, hour, minute, second, fraction = match.groups()
    whole = moment(f"{year} {month} {day} {hour} {minute} {second}", "%Y %m %d %H %M %S")
    return whole + float(f"0.{fraction}")


def _raised(text: str, message: str) -> Raised | None:
    """The last chain of exceptions in ``text``, or the last with the type of the recorded error, ``message``."""
    raw = text.splitlines()
    lines = [_LABEL.sub("", line, count=1) for line in raw]
    starts = [number for number, line in enumerate(lines) if line.strip() == _TRACEBACK]
    wanted, chosen, before = message.partition(":")[0], None, None
    for start in starts:
        # Frames and their source lines are indented; the first line that is not is the exception itself.
        end = next((at for at in range(start + 1, len(lines)) if lines[at] and lines[at][0] not in " \t"), None)
        if end is None or end in starts or _MESSENGERS.search(lines[end]):
            continue  # cut off, directly followed by another traceback, or only a report of the end
        chained = before is not None and any(_CHAINED.match(line) for line in lines[before[0] : start])
        exceptions = (*(before[1] if before and chained else ()), raw[end])
        before = (end, exceptions)
        # A later one replaces the choice, unless the choice has the wanted type and the later one does not.
        if chosen is None or wanted in lines[end] or wanted not in chosen.exceptions[-1]:
            chosen = Raised(exceptions, _places(lines[start:end]))
    return chosen


def _places(lines: list[str]) -> tuple[str, ...]:
    frames = [_LIBRARY.sub('File "', line.strip()) for line in lines if _FRAME.match(line)]
    in_galley = [frame for frame in frames if "galley/" in frame]
    return tuple(dict.fromkeys([*frames[-1:], *in_galley[-1:]]))


def stack(source: LogSource) -> tuple[str, ...]:
    """The innermost frame in a rank's last dump by faulthandler, then the innermost frame of Galley."""
    # faulthandler prints the innermost frame first, a traceback last.
    _, _, dump = source.text.rpartition("(most recent call first):\n")
    return _places(list(reversed(dump.splitlines())))
