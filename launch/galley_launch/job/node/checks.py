"""The checks of a node before training that need no other node; :mod:`.preflight` runs them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from galley.contract.rundir import Attempt

Outcome = dict[str, Any]
"""``{"ok", "detail"}``, and whatever else a check has for the report."""
_MIB, _GIB = 1 << 20, 1 << 30
_SKEW_S = 30.0
"""Seconds by which two clocks may differ."""
# Parts of the memory that is needed: at least this much must be free, and this much be allowed by the cgroup.
_OF_FREE, _OF_LIMIT = 0.8, 0.95
# Shares of the time limit: the head stops waiting, then the others, then every check; the report has the rest. Nodes
# do not start at the same moment, so a node that waits for the head must wait longer than the head waits for it.
GATHER, JOIN, CHECKS = 0.7, 0.85, 0.95


@dataclass(frozen=True)
class Node:
    """This node, and what it needs to have."""

    attempt: Attempt
    name: str
    number: int
    """``SLURM_NODEID``; the head is 0."""
    nodes: int
    head: str
    port: int
    gpus: int
    scratch: str
    memory_mb: int
    began: float
    """``time.monotonic()`` at the start."""
    limit: float
    loopback: bool
    """Whether the head may have a loopback address: several nodes of a test on one host."""

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.attempt.root.parent.parent

    def left(self, share: float) -> float:
        """Seconds until that share of the time limit is over; at least a tenth."""
        return max(0.1, self.began + share * self.limit - time.monotonic())

    def is_over(self, share: float) -> bool:
        """Whether that share of the time limit is over."""
        return time.monotonic() >= self.began + share * self.limit


Check = Callable[[Node], Outcome]
"""Any exception is a failed check."""


def outcome(ok: bool, detail: str, **more: Any) -> Outcome:
    """What a check returns: whether the node passed, one line of why, and anything else for the report."""
    return {"ok": ok, "detail": detail, **more}


_IN_USE = "are in use by another process"


class _Gpu(NamedTuple):
    """A row of ``nvidia-smi``, in the order of the columns that :func:`_query` asks for; MiB and degrees Celsius."""

    slot: str
    uuid: str
    name: str
    total: str = ""
    used: str = ""
    ecc: str = ""
    temperature: str = ""

    def fault(self) -> str:
        """What is wrong with it, or nothing. A value that a device does not have reads ``[N/A]``."""
        cells = " ".join(self[3:])  # what is measured, without the index, the id and the name
        if any(word in cells for word in ("Unknown Error", "lost", "requires reset")):
            return f"GPU {self.slot} ({self.uuid}) does not answer: {cells}"
        if self.ecc.isdigit() and int(self.ecc):
            return f"GPU {self.slot} ({self.uuid}) has {self.ecc} uncorrected memory errors"
        # A driver that idles, or a display, may hold some hundred MiB, and is no reason to refuse the node.
        if self.used.isdigit() and int(self.used) > 2048:
            return f"GPU {self.slot} ({self.uuid}): {self.used} of {self.total} MiB {_IN_USE}"
        return ""


def _query(node: Node) -> tuple[list[_Gpu], str]:
    """The GPUs that the driver lists, and the first line of its output that is not a GPU."""
    fields = "index,uuid,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=node.left(JOIN), check=False)
    except subprocess.TimeoutExpired as timeout:
        return [], f"; nvidia-smi does not answer in {timeout.timeout:.0f} s"
    except OSError as error:
        if Path("/dev/kfd").exists() or shutil.which("rocm-smi"):
            return [], "; this node has AMD's GPUs, which are not supported: Galley trains on NVIDIA's"
        return [], f"; nvidia-smi cannot be run: {error.strerror}"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    other_lines = [", ".join(row) for row in rows if len(row) != 7] + answer.stderr.splitlines()
    return [_Gpu(*row) for row in rows if len(row) == 7], "".join(f"; nvidia-smi: {line}" for line in other_lines[:1])


def _visible(present: list[_Gpu]) -> list[_Gpu]:
    """Those of ``present`` that this job may use: by CUDA's mask, or else by Slurm's list; all where there is none."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = os.environ.get("SLURM_STEP_GPUS", os.environ.get("SLURM_JOB_GPUS")) if mask is None else mask
    if names is None:
        return present
    visible: list[_Gpu] = []
    for name in filter(None, (name.strip() for name in names.split(","))):
        match = [gpu for gpu in present if name == gpu.slot or (len(name) > 4 and gpu.uuid.startswith(name))]
        if not match and not (present and name.startswith("MIG-")):
            # CUDA ignores everything from the first unknown device on. But Slurm counts the whole node's GPUs, and
            # where a cgroup hides the others, the driver counts this job's.
            return visible if mask is not None else present
        visible.append(match[0] if match else _Gpu(name, name, "MIG device"))
    return visible


def devices(node: Node) -> Outcome:
    """Enough GPUs are visible, none is broken, and no other process holds their memory."""
    if not node.gpus:
        return outcome(True, "no GPU is asked for")
    deadline = time.monotonic() + min(20.0, node.left(JOIN) - 1)
    while True:
        listed, complaint = _query(node)
        gpus = _visible(listed)[: node.gpus]
        faults = [fault for fault in (gpu.fault() for gpu in gpus) if fault]
        # The driver frees a process's memory a while after it has ended: that of the job before may still be held.
        if not any(_IN_USE in fault for fault in faults) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if len(gpus) < node.gpus:
        faults.append(f"{len(gpus)} of {node.gpus} GPUs are visible{complaint}")
    detail = "; ".join(faults) or f"{node.gpus} x {gpus[0].name}"
    return outcome(not faults, detail, gpus=[gpu._asdict() for gpu in gpus])


def cgroup_limits(table: str, root: Path) -> list[int]:
    """The limits in bytes of a memory cgroup and those above it, versions 1 and 2.

    ``table`` is ``/proc/PID/cgroup`` (cgroups(7)), ``root`` where cgroups are mounted.
    """
    limits = []
    for line in table.splitlines():
        # Version 1 has a line for each hierarchy with its controllers; version 2 has one line, "0::/path", without.
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        group = top / path.lstrip("/")
        # Every group is limited by all of those above it as well: Slurm limits the job, the step and the task.
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or nothing to read
                limits.append(int((folder / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text()))
            if folder == top:
                break
    return limits


def memory(node: Node) -> Outcome:
    """Enough memory is free and allowed to the job, and /dev/shm has room for what ranks exchange through it."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    free = next(int(line[1]) // 1024 for line in lines if line[0] == "MemAvailable:")
    groups = cgroup_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    limit = min(groups, default=1 << 62) // _MIB
    shm = os.statvfs("/dev/shm")
    # 64 MB is what Docker gives a container for /dev/shm by default. One rank alone exchanges nothing through it.
    size, room = shm.f_blocks * shm.f_frsize // _MIB, shm.f_bavail * shm.f_frsize // _MIB
    # Version 1 writes "no limit" as the largest 64-bit number, rounded down to a page: more than any node has.
    allowed = "" if limit > 1 << 40 else f", {limit} MiB allowed to the job"
    needed = f"{node.memory_mb} MiB needed" if node.memory_mb else "what is needed is not known"
    detail = f"{free} MiB free{allowed}; {needed}; /dev/shm has {size} MiB, {room} MiB free"
    # The kernel keeps a part of a node's memory for itself, and a cgroup's limit may be rounded down.
    enough = (
        free >= _OF_FREE * node.memory_mb and limit >= _OF_LIMIT * node.memory_mb and (size >= 64 or node.gpus == 1)
    )
    return outcome(enough, detail)


def _probe(folder: Path, node: Node, check: str) -> float:
    """Write, sync, rename and delete a file; returns the seconds that this host's clock is ahead of the disk's."""
    temporary = folder / f".galley-{check}-{node.name}-{os.getpid()}"
    final = temporary.with_name(f"{temporary.name}-done")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        before = time.time()
        os.write(descriptor, bytes(1 << 16))
        os.fsync(descriptor)
        after, stamp = time.time(), os.fstat(descriptor).st_mtime
        temporary.replace(final)
    finally:
        os.close(descriptor)
        for path in (temporary, final):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    # Where the clocks agree, the file's time lies between the two readings. Only what is outside of them counts, as a
    # slow disk is no skew: ahead of it by before - stamp, or behind it by after - stamp (negative).
    return max(0.0, before - stamp) or min(0.0, after - stamp)


def _folder_fault(folder: Path, node: Node, scratch: bool) -> str:
    """What is wrong with ``folder``, or nothing."""
    try:
        _probe(folder, node, "disk")
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    disk = os.statvfs(folder)
    if scratch and disk.f_flag & os.ST_NOEXEC:
        return f"{folder} is mounted noexec, so compiled kernels cannot be loaded from it; set cluster.scratch"
    free = disk.f_bavail * disk.f_frsize
    if free < _GIB:
        return f"{folder} has {free // _MIB} MiB left"
    # A file system without a fixed number of files (Btrfs) reports 0 of them.
    return f"{folder} has room for {disk.f_favail} files" if disk.f_files and disk.f_favail < 1000 else ""


def disk(node: Node) -> Outcome:
    """The run's directory, on the shared disk, and the node's scratch, on its own, can be written and have room."""
    if node.scratch:
        Path(node.scratch).mkdir(exist_ok=True)  # not its parents: a disk that is not mounted is a fault
    faults = [_folder_fault(node.run, node, scratch=False)]
    if node.scratch:
        faults.append(_folder_fault(Path(node.scratch), node, scratch=True))
    return outcome(not any(faults), "; ".join(filter(None, faults)) or "writable, with room")


def _name_advice(head: str) -> str:
    """What helps where a node's name does not resolve: most often its domain is missing."""
    domain = socket.getfqdn().partition(".")[2]
    with contextlib.suppress(OSError, UnicodeError):
        if domain and "." not in head and socket.getaddrinfo(f"{head}.{domain}", None):
            return f", but {head}.{domain} does: have {domain} put into this node's search domains (resolv.conf)"
    return ": have the site put it into DNS or /etc/hosts of its nodes"


def name(node: Node) -> Outcome:
    """The head's name resolves here, and not to this node itself."""
    try:
        rows = socket.getaddrinfo(node.head, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        return outcome(False, f"{node.head}, the head's name, does not resolve here ({error}){_name_advice(node.head)}")
    addresses = sorted({str(row[4][0]) for row in rows})
    # An IPv6 address may end with its interface (fe80::1%eth0), which is no part of the address.
    loopback = any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    # Some distributions put a host's own name into /etc/hosts as 127.0.1.1: only the head itself may read it so.
    ok = not loopback or node.nodes == 1 or node.number == 0 or node.loopback
    return outcome(ok, f"{node.head} is {', '.join(addresses)}" + ("" if ok else ", which is this node itself"))


def limits(node: Node) -> Outcome:
    """Reports the limits that networks and data loaders run into. Never fails: not every network needs them."""
    # The soft limits, in bytes and in files: InfiniBand pins the memory that it sends from and receives into.
    memlock, files = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE))
    locked = "unlimited" if memlock == resource.RLIM_INFINITY else f"{memlock // 1024} KiB"
    low = node.gpus and node.nodes > 1 and 0 <= memlock < 64 * _MIB
    warning = "; warning: too little locked memory for InfiniBand, see LimitMEMLOCK of slurmd" if low else ""
    return outcome(True, f"memlock {locked}, nofile {files}{warning}")


def clock(node: Node, exchange: Outcome) -> Outcome:
    """This node's clock agrees with the shared disk's, and with the other nodes' (from the ``exchange``)."""
    ahead = {"the shared disk": _probe(node.run, node, "clock")}
    if "ahead" in exchange and node.nodes > 1:
        ahead["the other nodes"] = float(exchange["ahead"])
    detail = ", ".join(f"{abs(by):.1f} s {'ahead of' if by > 0 else 'behind'} {what}" for what, by in ahead.items())
    return outcome(all(abs(by) <= _SKEW_S for by in ahead.values()), detail)
