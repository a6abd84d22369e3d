"""What failures write into logs, their kinds, and what to do: one table for each question that the classifier asks.

Within a table the first rule that matches wins, so the special stands before the general. Texts are those of torch 2.4
to 2.13, NCCL 2.14 to 2.27, gloo, DeepSpeed, huggingface_hub, NVIDIA's driver (its Xid catalogue) and Slurm 20.11 to
25.05. A pattern is tried on lines of at most :data:`galley_launch.job.diagnose.evidence.LONGEST` characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from galley_launch.job.diagnose.advice import (
    ACCESS,
    CONTAINER,
    DISK_ROOM,
    DRIVER,
    EXPORT,
    HOST_MEMORY,
    HOST_PYTHON,
    INSTALL,
    KERNEL,
    KILLED,
    LATE_RANK,
    LATER,
    LESS_MEMORY,
    LINKS,
    LOCKED,
    MEETING,
    MODULES,
    OFFLINE,
    OTHER_PORT,
    PEERS,
    REACH_HEAD,
    REPLACE,
    REQUEST,
    SCRATCH,
    SHM,
)


@dataclass(frozen=True)
class Rule:
    """A kind of failure, the text that shows it in a log, and what to do about it."""

    kind: str
    pattern: re.Pattern[str]
    """May name the node to blame: ``(?P<node>…)``."""
    advice: str
    blames: bool = False
    """Whether the node whose log matches is broken."""
    retry: bool | None = None
    """Whether another attempt may succeed; None: as for every failure of the kind."""
    more: int = 0
    """How many lines after the one that matches belong to it."""


def _rule(kind: str, pattern: str, advice: str, blames: bool = False, retry: bool | None = None, more: int = 0) -> Rule:
    return Rule(kind, re.compile(pattern, re.MULTILINE), advice, blames, retry, more)


RETRIED = frozenset(["gpu_oom", "host_oom", "nccl", "gloo", "port", "node", "hang", "killed"])
"""Kinds after which another attempt may succeed. Out of memory: only where a step was done (``findings.retry``)."""

HARDWARE = (
    # Xids that a program cannot cause; 13, 31, 43, 45 and others are usually a kernel's own mistake.
    _rule(
        "node",
        r"NVRM: Xid(?: \([^)]*\))?:? (?:48|6[2-4]|74|79|92|94|95|110|119|12[0-3]|13[67]|14[0-9]|15[0-8])\b.*",
        REPLACE,
        blames=True,
    ),
    _rule(
        "node",
        r"(?i)fallen off the bus|uncorrectable (?:ECC|NVLink) error|over nvlink or a hardware error",
        REPLACE,
        blames=True,
    ),
    _rule("node", r"Unable to determine the device handle for GPU", REPLACE, blames=True),
    _rule("node", r"CUDA (?:error: unknown error|failure 999)", REPLACE, blames=True),
    _rule("node", r"Driver/library version mismatch|NVIDIA-SMI has failed because", DRIVER, blames=True),
    _rule("node", r"CUDA driver version is insufficient|NVIDIA driver on your system is too old", DRIVER, blames=True),
    # 802: system not yet initialised (its fabric manager), 803: driver mismatch, 804: forward compatibility.
    _rule("node", r"Error 80[234]: |unsupported display driver / cuda driver", DRIVER, blames=True),
    _rule("node", r"[Nn]o CUDA-capable device is detected|No CUDA GPUs are available", DRIVER, blames=True),
    _rule("node", r"CUDA-capable device\(s\) is/are busy or unavailable", REPLACE, blames=True),
    _rule(
        "node",
        r"CUDA error: invalid device ordinal|needs GPU \d+, but \d+ are visible",
        "Fewer GPUs are visible there than ranks were started: a GPU is lost, or the job got fewer than it asked for.",
        blames=True,
    ),
    # Before the rules for a GPU that is full: here it is another program's memory that fills it.
    _rule(
        "node",
        r"CUDA out of memory(?=.*this process has).*\bProcess \d+ has \d+\.\d+ GiB memory in use",
        "Another process holds that GPU's memory: end it (nvidia-smi shows its number), or take another GPU or node.",
        blames=True,
    ),
)
"""A node that cannot work. It explains all errors of its ranks and of their peers."""

CAUSES = (
    _rule("gpu_oom", r"(?:CUDA|HIP) out of memory|(?i:CUDA (?:error|failure)[^\n]{0,8} '?out of memory)", LESS_MEMORY),
    _rule("gpu_oom", r"CU(?:BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", LESS_MEMORY),
    # Registering memory with the network's card fails for want of locked memory: so before host_oom's ENOMEM.
    _rule("nccl", r"Call to ibv_\w+ failed with error Cannot allocate memory", LOCKED, more=1),
    _rule("nccl", r"NET/OFI Unable to register memory", LOCKED, more=1),
    # /dev/shm is a file system in memory: its "No space left" must match here, not among the rules for disks.
    _rule(
        "host_oom",
        r"(?i)(?:insufficient|out of) shared memory|No space left on device: '/dev/shm|/dev/shm\S*: No space left",
        SHM,
    ),
    _rule("host_oom", r"unable to (?:write to file|open shared memory object) </torch_", SHM),
    _rule("host_oom", r"shared memory segment /dev/shm/|/dev/shm/nccl-\S+.*No space left", SHM, more=1),
    _rule("host_oom", r"DataLoader worker .*is killed by signal: Killed", HOST_MEMORY),
    _rule("host_oom", r"DefaultCPUAllocator: (?:can't allocate|not enough) memory", HOST_MEMORY),
    _rule("host_oom", r"^(?:\S*: )?MemoryError\b|std::bad_alloc|\[Errno 12\] Cannot allocate memory", HOST_MEMORY),
    # A node's own disk is full, which another node's may not be; any other path is taken for the shared disk.
    _rule(
        "disk",
        r"No space left on device: '/(?:var/)?tmp/|^(?:galley: )?/(?:var/)?tmp/\S+: No space left on device; make room",
        SCRATCH,
        blames=True,
        retry=True,
    ),
    _rule("disk", r"No space left on device|StorageFull|the disk is full\b", DISK_ROOM),
    _rule("disk", r"Disk quota exceeded|\[Errno 122\]", DISK_ROOM),
    _rule("disk", r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+", DISK_ROOM),
    _rule("disk", r"; free some space, or set another cache folder", DISK_ROOM),
    # EIO, ENOTCONN (a FUSE mount whose server died) and ESTALE (NFS): errno(3).
    _rule(
        "node",
        r"\[Errno (?:5|107|116)\]|Stale file handle|Transport endpoint is not connected|: Input/output error",
        "A file system broke away under that node: have its mounts looked at.",
        blames=True,
    ),
    _rule(
        "hub",
        r"\b5\d\d Server Error|Server error '5\d\d|\b50[0-4] (?:Internal|Bad G|Service U|Gateway)",
        LATER,
        retry=True,
    ),
    _rule("hub", r"\b429 (?:Client Error|Too Many Requests)|Client error '429", LATER, retry=True),
    _rule("hub", r"\b(?:Read|Connect|Pool)Timeout\b|Max retries exceeded with url", LATER, retry=True),
    _rule("hub", r"RemoteProtocolError|without sending complete message body|IncompleteRead\(", LATER, retry=True),
    _rule("hub", r"is gated and this account|GatedRepoError|Cannot access gated repo", ACCESS),
    _rule(
        "hub",
        r"the hub has (?:none|nothing) of that name|has no revision '|(?:Repository|Revision|Entry)NotFoundError",
        ACCESS,
    ),
    _rule("hub", r"\b40[134] Client Error|Client error '40[134]|\b40[13] (?:Forbidden|Unauthorized)", ACCESS),
    _rule("hub", r"the hub refuses '", ACCESS),
    _rule("hub", r"the hub cannot be reached|OfflineModeIsEnabled|LocalEntryNotFoundError", OFFLINE),
    _rule("hub", r"We couldn't connect to 'https?://|offline mode is enabled", OFFLINE),
    # EADDRINUSE is 98 on Linux.
    _rule("port", r"EADDRINUSE|errno: 98\b|\[Errno 98\]", OTHER_PORT),
    _rule(
        "gloo",
        r"Unable to find address for: \S+",
        "No such network interface there: correct cluster.interface (GLOO_SOCKET_IFNAME).",
    ),
    _rule("nccl", r"Bootstrap ?: no socket interface found", LINKS),
    _rule("nccl", r"with family \d+ is neither AF_INET", LINKS),
    _rule(
        "code",
        r"CUDA error: (?:an illegal memory access|device-side assert|misaligned address|unspecified launch failure)",
        KERNEL,
    ),
    _rule("configuration", r"Duplicate GPU detected", "Two ranks got one GPU: no --gpus-per-task, no binding of GPUs."),
    _rule(
        "configuration",
        r"no kernel image is available for execution",
        "This torch was not built for these GPUs: install one that knows their compute capability.",
    ),
    # Lines that start with "galley:" are those of Galley's own job scripts.
    _rule("configuration", r"^galley: host_python: .*", HOST_PYTHON),
    _rule("configuration", r"^galley: export: .*", EXPORT),
    _rule("configuration", r"^galley: modules: .*", MODULES),
    _rule("configuration", r"^galley: environment: no Python at \S+", INSTALL, blames=True),
    _rule("node", r"^galley: scratch: .*", SCRATCH, blames=True),
    _rule("configuration", r"Lmod has detected the following error", MODULES, more=2),
    _rule("configuration", r"Unable to locate a modulefile for|\b(?:module|ml): command not found", MODULES),
    _rule("configuration", r"CondaError:|EnvironmentNameNotFound|\bconda: command not found", MODULES),
    _rule(
        "configuration",
        r"pyxis: (?:failed to import|couldn't start container|container start failed)",
        CONTAINER,
        more=3,
    ),
    _rule("configuration", r"FATAL: +(?:could not open image|container creation failed|while extracting)", CONTAINER),
    _rule(
        "configuration", r"\b(?:apptainer|singularity|enroot|pyxis)\b.*(?:command not found|No such file)", CONTAINER
    ),
    _rule("configuration", r"s(?:run|batch): unrecognized option '--container", CONTAINER),
    _rule("configuration", r"s(?:run|batch): (?:error: )?(?:unrecognized option|[Ii]nvalid option)", REQUEST),
    _rule("configuration", r"Unable to create step for job \d+: (?!.*(?:busy|timed out|already)).*", REQUEST),
    _rule(
        "configuration",
        r"\bpython[\d.]*['’]?: (?:cannot execute: )?(?:No such file|command not found|not found)",
        INSTALL,
    ),
    _rule("configuration", r"/activate: No such file|(?:env|execve\(\)): .*python.*: No such file", INSTALL),
    _rule("configuration", r"ModuleNotFoundError: No module named|: No module named [\w.'\"]+$", INSTALL),
    _rule("configuration", r"cannot open shared object file|version [`']\w+_[\d.]+' not found", INSTALL),
    _rule("configuration", r"ImportError: cannot import name", INSTALL),
    _rule(
        "configuration",
        r"Error building extension '|CUDA_HOME does not exist|does not match the version torch was",
        "DeepSpeed could not compile its operators: load the CUDA toolkit and compiler that torch was built with.",
    ),
    # EMFILE.
    _rule(
        "configuration", r"\[Errno 24\]|Too many open files", "Raise the limit of open files: ulimit -n, LimitNOFILE."
    ),
    _rule(
        "configuration",
        r"can't start new thread|pthread_create failed|libgomp: Thread creation failed",
        "The limit of processes is reached: ask for more cores, or set threads=1.",
    ),
    # EACCES and EROFS.
    _rule("configuration", r"\[Errno (?:13|30)\]|: Permission denied$", "Correct the permissions of that path."),
)
"""What breaks one rank or one stage by itself; the first in time is the cause."""

LOST = (
    _rule("node", r"Node failure on (?P<node>[\w.-]+)", REPLACE),
    _rule("node", r"\bNodes (?P<node>[\w.-]+) are still not ready", REPLACE),
    _rule("node", r"ON (?P<node>[\w.-]+) UNCORRECTABLE MEMORY ERROR AT", REPLACE),
    _rule("node", r"DUE TO NODE FAILURE", "Slurm lost a node: see its reason (scontrol show node, sinfo -R)."),
    _rule("node", r"Task launch for \S+ failed on node (?P<node>[\w.-]+): .*", REPLACE),
)
"""A node that Slurm has lost."""

MEMORY = (
    _rule("host_oom", r"Detected \d+ oom[_-]kill event", HOST_MEMORY),
    _rule("host_oom", r"srun: error: (?P<node>[\w.-]+): tasks? [\d,-]+: Out Of Memory", HOST_MEMORY),
    _rule("host_oom", r"[Oo]ut of memory: Killed process \d+", HOST_MEMORY),
    _rule("host_oom", r"oom-kill:constraint=", HOST_MEMORY),
    _rule("host_oom", r"[Ee]xceeded (?:job |step )?memory limit", HOST_MEMORY),
)
"""The kernel ended a process for want of memory; some of these lines are Slurm's reports of it."""

HANGS = (_rule("hang", r"galley: hang: (?P<node>[\w.-]+): rank \d+ has been silent", ""),)
"""A node's watcher ended ranks that hung."""

ENDINGS = (
    _rule("killed", r"CANCELLED\b.* DUE TO TIME LIMIT", "Time ran out: it goes on from the last checkpoint."),
    _rule("killed", r"CANCELLED\b.* DUE TO PREEMPTION", "The job was preempted: it goes on from the last checkpoint."),
    _rule("killed", r"CANCELLED\b.* DUE TO JOB REQUEUE", "The job was requeued: it goes on from the last checkpoint."),
    _rule(
        "killed",
        r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL \w+ )?\*\*\*",
        "Someone cancelled the job.",
        retry=False,
    ),
)
"""Slurm ended the job; the errors that follow in the logs are consequences."""

FABRIC = (
    _rule("nccl", r"Got completion from peer .* with (?:status|error)[ =]\S+", LINKS, more=1),
    _rule("nccl", r"Got (?:non-fatal |fatal )?async event ?: (?:port|device|local catastrophic) ", LINKS),
    _rule("nccl", r"Call to ibv_\w+ failed|NCCL WARN NET/OFI .*(?:failed|error)", LINKS, more=1),
)
"""What the network's hardware reports: a fault of its own, or that a peer is gone."""

SECONDARY = (
    _rule("nccl", r"Watchdog caught collective operation timeout", LATE_RANK),
    _rule("nccl", r"NCCL communicator was aborted|watchdog thread terminated with exception", PEERS),
    _rule("nccl", r"unhandled (?:system|cuda) error|NCCL error in:.*(?:internal error|invalid usage)", LINKS, more=3),
    _rule(
        "nccl",
        r"NCCL error in:|ncclRemoteError|ncclSystemError|ncclInternalError|ncclUnhandledCudaError",
        PEERS,
        more=3,
    ),
    _rule("nccl", r"NCCL WARN .*(?:closed by remote peer|[Cc]onnection (?:refused|reset|timed out)|failed)", PEERS),
    _rule("gloo", r"connectFullMesh failed", REACH_HEAD),
    _rule("gloo", r"[Tt]imed out waiting \d+ ?ms for (?:recv|send) operation|timed out in monitoredBarrier", LATE_RANK),
    _rule("gloo", r"gloo/\S+\.(?:cc|h):\d+\]", PEERS),
    _rule("gloo", r"Connection (?:closed|reset) by (?:remote )?peer|ConnectionResetError|BrokenPipeError", PEERS),
    _rule("port", r"Timed out after \d+ seconds waiting for (?:clients|workers)", REACH_HEAD),
    _rule("port", r"client socket has (?:timed out|failed) .*connect", REACH_HEAD),
    _rule("port", r"ranks could not reach each other within", REACH_HEAD),
    # Galley's ranks meet in a file: a node that does not come has no trouble with names and ports. The rules around
    # this one are for torchrun's own rendezvous and torch's TCP store.
    _rule("port", r"RendezvousTimeoutError", MEETING),
    _rule("port", r"network addresses of \(.*\) cannot be retrieved", REACH_HEAD),
    _rule("port", r"RendezvousConnectionError|RendezvousClosedError|RendezvousStateError", REACH_HEAD),
    _rule("killed", r"SignalException: Process \d+ got signal: 15|Received 15 death signal", KILLED),
    _rule("killed", r"error: (?P<node>[\w.-]+): tasks? [\d,-]+: (?:Killed|Terminated)|: line \d+: +\d+ Killed", KILLED),
    _rule("port", r"wait timeout after \d+ms, keys: |DistStoreError|DistNetworkError|Broken pipe", PEERS),
)
"""Errors of ranks whose peer is gone or late: all of them may follow from one failure elsewhere."""
