"""Reads what Slurm's commands print about jobs. Pure functions of text, for the formats of Slurm 22.05 to 25.11.

Only formats that Galley itself asks for are read (columns between ``|``, free text last), never ``--json``: its keys
change between versions, and its plugin is not installed everywhere. A site's own notices between the lines are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

_OVER = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
        *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    )
)
# What Slurm prints where there is no value; which of these depends on the command, the column and the version.
_NOTHING = frozenset(("", "(null)", "n/a", "none", "none assigned", "unknown", "invalid"))

SQUEUE_FIELDS = (
    *("JobID", "State", "NodeList", "StartTime", "EndTime", "TimeLimit", "exit_code", "Dependency"),
    *("RestartCnt", "PreemptTime", "Requeue", "Reason", "Name"),
)
"""Columns of ``squeue -O``; the name last, as it may hold anything."""
SACCT_FIELDS = ("JobIDRaw", "State", "NodeList", "Start", "End", "Timelimit", "ExitCode", "Reason", "JobName")
"""Columns of ``sacct --parsable2``. ``Restarts`` is newer than 23.11; older ones refuse the whole call for it."""
# squeue's names for the same columns, so that one function reads the rows of both.
_SACCT_AS_SQUEUE = (*SQUEUE_FIELDS[:7], "Reason", "Name")

_TRANSIENT = re.compile(
    r"no answer from|unable to contact|timed out|time-?out|temporar|standby|connect failure|try again"
    r"|connection (?:refused|reset|closed)|zero bytes were transmitted|communication|not responding",
    re.IGNORECASE,
)


class SlurmError(Exception):
    """A Slurm command refused or could not be reached: its own message in one line."""

    @property
    def is_transient(self) -> bool:
        """Whether Slurm did not answer or was busy, so that asking again may help; otherwise it refused."""
        return bool(_TRANSIENT.search(str(self)))


@dataclass(frozen=True)
class Job:
    """A job in Slurm. Times are seconds since the epoch."""

    id: str
    name: str
    state: str
    """``PENDING``, ``RUNNING``, ``COMPLETED``, ...: Slurm's long name, without ``by UID``."""
    reason: str
    """Why it waits or why it ended; "" where Slurm prints ``None``."""
    nodes: tuple[str, ...]
    start: float | None
    """When it began; while it waits, when Slurm expects it to."""
    end: float | None
    """When it ended; while it runs, when its limit ends it."""
    limit_s: int | None
    """None: unlimited, or the partition's own."""
    restarts: int
    """Times that it was requeued; 0 where only accounting still knows the job."""
    exit_status: int | None
    """None: not over, or ended by something else than its own exit."""
    exit_signal: int | None
    preempted: bool
    """Whether Slurm has chosen it to make room: while it runs, it is in its grace time; afterwards, it was ended
    for that. False again once it waits for its next start."""
    dependency: str
    requeue_allowed: bool

    def is_over(self) -> bool:
        """Whether it has ended and will not start again by itself."""
        return self.state in _OVER

    def is_live(self) -> bool:
        """Whether it waits, runs or is being cleaned up; also every state that is not known here."""
        return not self.is_over()


def known(text: str) -> str:
    """``text``, or "" where it stands for no value (``(null)``, ``N/A``, ``None`` …)."""
    text = text.strip()
    return "" if text.lower() in _NOTHING else text


def integer(text: str) -> int:
    """The number that ``text`` begins with (``4+`` where nodes differ); else 0."""
    match = re.match(r"\d+", text.strip())
    return int(match.group()) if match else 0


def parse_time(text: str) -> float | None:
    """``2026-11-23T10:10:06``, printed by a command under TZ=UTC, as seconds since the epoch; else None."""
    try:
        moment = datetime.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
    return moment.replace(tzinfo=timezone.utc).timestamp()  # noqa: UP017 - datetime.UTC is newer than 3.9


def parse_limit(text: str) -> int | None:
    """Seconds in ``1-02:03:04``, ``02:03:04``, ``03:04``, ``1-02`` or (minutes) ``90``; None: no limit, or unset."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    # What the numbers are depends on how many there are (sbatch(1), --time): minutes[:seconds], hours:minutes:seconds;
    # but after days they begin with the hours.
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def parse_exit(text: str) -> tuple[int | None, int | None]:
    """(status, signal) of ``3:0``, ``0:15`` or a raw wait status (squeue of 22.05); one of the two is None."""
    status, colon, signal = text.strip().partition(":")
    if not status.isdecimal():
        return None, None
    # A raw wait status has the signal in its low seven bits, and the exit status in the next byte (wait(2)).
    number = int(signal) if colon and signal.isdecimal() else int(status) & 0x7F
    if number:
        return None, number
    return (int(status) if colon else int(status) >> 8), None


def _state(text: str) -> str:
    """``CANCELLED by 0`` and ``CANCELLED+`` are ``CANCELLED``."""
    words = text.split()
    return words[0].rstrip("+").upper() if words else "?"


def _rows(text: str, columns: int) -> Iterator[list[str]]:
    """Cells of each line that begins with a job id. Raises SlurmError for one with too few columns."""
    for line in text.splitlines():
        if not re.match(r"\s*\d[\d_+]*\s*\|", line):
            continue
        # The last column is free text, which may hold the separator: it is not split further.
        cells = [cell.strip() for cell in line.split("|", columns - 1)]
        if len(cells) < columns:
            raise SlurmError(f"cannot read this line of Slurm's: {line.strip()[:200]}")
        yield cells


def named(names: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """The cells of a row, by the names of their columns."""
    return dict(zip(names, cells))  # noqa: B905 - ``strict`` is newer than 3.9


def _job(row: dict[str, str]) -> Job:
    state = _state(row["State"])
    status, signal = parse_exit(row["exit_code"]) if state in _OVER else (None, None)
    if status == 0 and state != "COMPLETED":
        status = None  # accounting has 0:0 for a job that was ended by the loss of a node or by pre-emption
    return Job(
        id=row["JobID"],
        name=row["Name"],
        state=state,
        reason=known(row["Reason"]),
        nodes=tuple(hostnames(known(row["NodeList"]))),
        start=parse_time(row["StartTime"]),
        end=parse_time(row["EndTime"]),
        limit_s=parse_limit(row["TimeLimit"]),
        restarts=integer(row.get("RestartCnt", "")),
        exit_status=status,
        exit_signal=signal,
        preempted=state == "PREEMPTED" or parse_time(row.get("PreemptTime", "")) is not None,
        dependency=known(row.get("Dependency", "")),
        requeue_allowed=row.get("Requeue") == "1",
    )


def jobs_from_squeue(text: str) -> dict[str, Job]:
    """Jobs by id from ``squeue -O`` with :data:`SQUEUE_FIELDS`, each ended by ``|``."""
    rows = (named(SQUEUE_FIELDS, cells) for cells in _rows(text, len(SQUEUE_FIELDS)))
    return {row["JobID"]: _job({**row, "Name": row["Name"].removesuffix("|")}) for row in rows}


def jobs_from_sacct(text: str) -> dict[str, Job]:
    """Jobs by id from ``sacct --parsable2`` with :data:`SACCT_FIELDS`; of several records the last."""
    rows = (named(_SACCT_AS_SQUEUE, cells) for cells in _rows(text, len(SACCT_FIELDS)))
    return {row["JobID"]: _job(row) for row in rows}


_ID = re.compile(r"\s*(\d+)(?:;\S*)?\s*")
# A site's wrapper may drop --parsable, and write colours, prefixes or a cost around sbatch's sentence.
_SUBMITTED = re.compile(r"\bSubmitted batch job (\d+)")


def id_from_sbatch(text: str) -> str:
    """The job id that sbatch printed, with ``--parsable`` or without, among a site's own lines; "": there is none."""
    worded = _SUBMITTED.findall(re.sub(r"\x1b\[[0-9;]*m", "", text))
    plain = [match[1] for line in text.splitlines() if (match := _ID.fullmatch(line))]
    return str([*plain, *worded][-1]) if plain or worded else ""


def start_from_test(text: str) -> float | None:
    """The expected start that ``sbatch --test-only`` prints; None: there is none."""
    match = re.search(r"to start at (\S+)", text)
    return parse_time(match.group(1)) if match else None


def _range(text: str, whole: str) -> list[str]:
    """``05-07`` as ``05``, ``06``, ``07``; one number as itself. ``whole``: the node list, for the error."""
    first, dash, last = text.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise SlurmError(f"cannot read the node list {whole}")
    numbers = range(int(first), int(last or first) + 1)
    if not 0 < len(numbers) <= 1 << 17:
        raise SlurmError(f"cannot read the node list {whole}: {text} is not a range")
    # Leading zeros are part of the names: as many digits as the first number has.
    return [str(number).zfill(len(first)) for number in numbers]


def hostnames(nodelist: str) -> list[str]:
    """``node[1-3,05-07],login-a`` as names, in order, as ``scontrol show hostnames`` does; several brackets multiply.

    Raises:
        SlurmError: unbalanced brackets, or a range that is none.
    """
    hosts: list[str] = []
    # Only commas outside of brackets separate the parts: those that no closing bracket follows before an opening one.
    for part in re.split(r",(?![^\[]*\])", nodelist.strip()):
        if part and not re.fullmatch(r"([^\[\],\s]|\[[^\[\]]+\])+", part):
            raise SlurmError(f"cannot read the node list {nodelist}")
        names = [""]
        for text, inside in re.findall(r"([^\[\]]+)|\[([^\[\]]+)\]", part):
            ends = [text] if text else [end for item in inside.split(",") for end in _range(item, nodelist)]
            names = [name + end for name in names for end in ends]
        hosts += [name for name in names if name]
    return hosts
