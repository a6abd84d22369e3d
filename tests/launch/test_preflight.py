"""Preflight with real processes and sockets: the nodes of a job are processes on 127.0.0.1."""

import json
import os
import random
import resource
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from galley.rundir import Attempt, RunDir
from galley_launch.job.preflight import bad_nodes
from galley_launch.job.preflight_checks import cgroup_limits

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"node{number}" for number in range(5)]
HEALTHY = "{}, GPU-aaaa-{}, NVIDIA H200, 143771, 3, {}, 31"

Start = Callable[..., subprocess.Popen[str]]


def free_port() -> int:
    """Above the range from which the kernel gives ports to others."""
    while True:
        port = random.randint(61001, 65000)
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return RunDir(tmp_path / "runs" / "x").begin_attempt()


@pytest.fixture
def start(attempt: Attempt, tmp_path: Path) -> Iterator[Start]:
    """Start preflight as one node of a job; ``under`` is a shell's command line, of which ``"$@"`` is preflight."""
    begun: list[subprocess.Popen[str]] = []
    base = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}",
        "PYTHONSAFEPATH": "1",
        "SLURM_JOB_ID": "7",
        "GALLEY_HEAD": "127.0.0.1",
    }

    def go(
        number: int, nodes: int, port: int, under: str = 'exec "$@"', options: str = "--loopback", **more: Any
    ) -> subprocess.Popen[str]:
        preexec, tried = more.pop("preexec", None), more.pop("attempt", attempt)
        node = {"SLURM_NODEID": number, "SLURMD_NODENAME": NAMES[number], "GALLEY_NODES": nodes, "GALLEY_PORT": port}
        env = base | {name: str(value) for name, value in (node | {"GALLEY_PREFLIGHT_S": 30} | more).items()}
        module = [sys.executable, "-m", "galley_launch.job.preflight", *options.split(), str(tried.root)]
        command = ["sh", "-c", under, "sh", *module]
        done = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=preexec)
        begun.append(done)
        return done

    yield go
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def smi(tmp_path: Path) -> Callable[[str], None]:
    """Put an ``nvidia-smi`` on the nodes' PATH: a shell script."""

    def put(script: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def rows(*lines: str) -> str:
    return "cat <<'E'\n" + "\n".join(lines) + "\nE"


def end(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def report(attempt: Attempt, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((attempt.preflight / f"node{number}.json").read_text())
    return found


def checks(attempt: Attempt, number: int = 0) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report(attempt, number)["checks"]}


def speak(port: int, said: bytes) -> socket.socket:
    """Connect to the head as soon as it listens, and say something."""
    until = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < until, "the head does not listen"
            time.sleep(0.02)
            continue
        connection.settimeout(10)
        connection.sendall(said)
        return connection


def test_three_nodes_meet_and_leave_the_port_to_torchrun(start: Start, attempt: Attempt, tmp_path: Path) -> None:
    port, scratch = free_port(), tmp_path / "scratch"
    ended = end(*(start(number, 3, port, GALLEY_SCRATCH=scratch, GALLEY_MEMORY_MB=1) for number in range(3)))
    assert ended == [(0, "")] * 3
    with socket.create_server(("", port)):
        assert bad_nodes(attempt, NAMES[:3]) == {}
    for number in range(3):
        found = checks(attempt, number)
        assert set(found) == {"devices", "memory", "disk", "name", "limits", "exchange", "clock"}
        assert all(check["ok"] and check["seconds"] >= 0 and check["detail"] for check in found.values())
        assert report(attempt, number)["node"] == NAMES[number]
    assert checks(attempt, 1)["exchange"]["detail"] == "the sum of all is 6 of 6"
    assert {peer["name"] for peer in checks(attempt)["exchange"]["peers"].values()} == {"node1", "node2"}
    assert not [*attempt.root.parent.parent.glob(".galley*"), *scratch.iterdir()], "a probe was left behind"


def test_strangers_and_garbage_do_not_count(start: Start, attempt: Attempt) -> None:
    port = free_port()
    head = start(0, 2, port)
    said = [b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 100000 + b"\n", b"\xff\xfe\n", b'{"token": 1, "node": 1}\n', b"7\n"]
    strangers = [speak(port, words) for words in said]
    time.sleep(0.2)
    assert head.poll() is None, "the head took a stranger for node 1"
    assert end(head, start(1, 2, port)) == [(0, ""), (0, "")]
    for stranger in strangers:
        stranger.close()


def test_the_head_names_who_is_missing_and_nobody_else_is_blamed(start: Start, attempt: Attempt) -> None:
    """Node 2 cannot reach the head's port; node 3 was never started."""
    port, limit = free_port(), {"GALLEY_PREFLIGHT_S": 2.5}
    head, good, lost = end(start(0, 4, port, **limit), start(1, 4, port, **limit), start(2, 4, free_port(), **limit))
    words = "1 of 3 other nodes came; missing: node 2, 3 of the job, counted from 0"
    assert head == (1, f"galley: preflight: node0: exchange: {words}\n")
    assert good == (0, "")
    assert lost[0] == 1
    assert checks(attempt)["exchange"]["missing"] == [2, 3]
    bad = bad_nodes(attempt, NAMES[:4])
    assert set(bad) == {"node2", "node3"}
    assert bad["node3"] == "left no report"
    assert bad["node2"].startswith("exchange: no answer from the head, 127.0.0.1 port ")
    assert "Connection refused" in bad["node2"]


def test_whose_fault_it_is_that_nobody_reaches_the_head(start: Start, attempt: Attempt) -> None:
    """In the first job the way is closed; in the second, a program that never answers holds the head's port."""
    limit = {"GALLEY_PREFLIGHT_S": 1.7}
    closed = [start(number, 3, free_port(), **limit) for number in range(3)]
    second = RunDir(attempt.root.parent.parent).begin_attempt()
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        head, other = end(*(start(number, 2, port, attempt=second, **limit) for number in (0, 1)))
    assert [status for status, _ in end(*closed)] == [1, 1, 1]
    assert bad_nodes(attempt, NAMES[:3]) == {"node0": "exchange: no other node reaches it"}
    (attempt.preflight / "node2.json").unlink()
    assert set(bad_nodes(attempt, NAMES[:3])) == {"node1", "node2"}
    (attempt.preflight / "node0.json").unlink()
    assert bad_nodes(attempt, NAMES[:2]) == {"node0": "left no report"}
    taken = f"port: port {port} cannot be used: Address already in use"
    assert head == (1, f"galley: preflight: node0: {taken}\n")
    assert other[0] == 1
    assert other[1].startswith("galley: preflight: node1: exchange: no answer from the head")
    assert bad_nodes(second, NAMES[:2]) == {"node0": taken}


@pytest.mark.parametrize(
    ("script", "environment", "detail"),
    [
        (rows(HEALTHY.format(0, 1, "[N/A]"), HEALTHY.format(1, 2, 0)), {}, ""),
        (rows(HEALTHY.format(0, 1, 0)), {}, "1 of 2 GPUs are visible"),
        ("echo No devices were found; exit 6", {}, "0 of 2 GPUs are visible; nvidia-smi: No devices were found"),
        (
            rows(HEALTHY.format(0, 1, 0), HEALTHY.format(1, 2, 3)),
            {},
            "GPU 1 (GPU-aaaa-2) has 3 uncorrected memory errors",
        ),
        (
            rows(HEALTHY.format(0, 1, 0), "1, GPU-b, NVIDIA H200, [GPU requires reset], [N/A], [N/A], 31"),
            {},
            "GPU 1 (GPU-b) does not answer: [GPU requires reset] [N/A] [N/A] 31",
        ),
        # The mask takes the broken one out, or leaves too few.
        (
            rows(*(HEALTHY.format(slot, slot, 9 if slot == 0 else 0) for slot in range(3))),
            {"CUDA_VISIBLE_DEVICES": "2,GPU-aaaa-1"},
            "",
        ),
        (
            rows(*(HEALTHY.format(slot, slot, 0) for slot in range(3))),
            {"CUDA_VISIBLE_DEVICES": "2,7,1"},
            "1 of 2 GPUs are visible",
        ),
        (
            rows(*(HEALTHY.format(slot, slot, 9 if slot == 0 else 0) for slot in range(3))),
            {"SLURM_JOB_GPUS": "1,2"},
            "",
        ),
        # A cgroup hides the others, and the driver counts from 0.
        (rows(HEALTHY.format(0, 1, 0), HEALTHY.format(1, 2, 0)), {"SLURM_STEP_GPUS": "4,5"}, ""),
        (rows(HEALTHY.format(0, 1, 0)), {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, ""),
    ],
)
def test_gpus(
    script: str, environment: dict[str, str], detail: str, start: Start, attempt: Attempt, smi: Callable[[str], None]
) -> None:
    smi(script)
    ((status, output),) = end(start(0, 1, 0, GALLEY_GPUS=2, **environment))
    assert output == (f"galley: preflight: node0: devices: {detail}\n" if detail else "")
    assert status == (1 if detail else 0)
    assert bad_nodes(attempt, ["node0"]) == ({"node0": f"devices: {detail}"} if detail else {})


def test_memory_of_a_process_on_its_way_out_is_waited_for(
    start: Start, attempt: Attempt, smi: Callable[[str], None], tmp_path: Path
) -> None:
    busy = "0, GPU-a, NVIDIA H200, 143771, {}, 0, 31"
    smi(f'if mkdir "{tmp_path}/once" 2>/dev/null; then echo "{busy.format(90000)}"; else echo "{busy.format(3)}"; fi')
    assert end(start(0, 1, 0, GALLEY_GPUS=1)) == [(0, "")]
    smi(f'echo "{busy.format(90000)}"')
    ((status, output),) = end(start(0, 1, 0, GALLEY_GPUS=1, GALLEY_PREFLIGHT_S=1.2))
    assert status == 1
    assert output.endswith("devices: GPU 0 (GPU-a): 90000 of 143771 MiB are taken by another process\n")


def test_a_hung_driver_and_a_hung_disk_do_not_hold_it_up(
    start: Start, attempt: Attempt, smi: Callable[[str], None]
) -> None:
    """To open a pipe that nobody reads blocks for ever, as a dead file server does."""
    smi("exec sleep 60")
    attempt.preflight.mkdir()
    pipe = f'mkfifo "{attempt.root.parent.parent}/.galley-disk-node0-$$" "{attempt.preflight}/.node0.json.$$.tmp"'
    begun = time.monotonic()
    ((status, output),) = end(start(0, 1, 0, under=f'{pipe} && exec "$@"', GALLEY_GPUS=1, GALLEY_PREFLIGHT_S=2))
    assert time.monotonic() - begun < 4
    assert status == 1
    lines = [line.removeprefix("galley: preflight: node0: ") for line in output.splitlines()]
    assert lines == [
        "devices: 0 of 1 GPUs are visible; nvidia-smi does not answer in 2 s",
        "disk: no answer in 2 s",
        "report: no answer in 2 s",
    ]
    assert bad_nodes(attempt, ["node0"]) == {"node0": "left no report"}


def test_too_little_memory_disk_and_files(
    start: Start, attempt: Attempt, smi: Callable[[str], None], tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace")
    run, small = attempt.root.parent.parent, tmp_path / "small"
    small.mkdir()
    mounts = f"mount -t tmpfs -o size=32m x /dev/shm && mount -t tmpfs -o size=300m x {small}"
    crowded = f"{mounts} && mount -t tmpfs -o size=2g,nr_inodes=500 x {small}"
    read_only = f"mount --bind {run} {run} && mount -o remount,ro,bind {run} {run}"

    def lines(inside: str, **environment: Any) -> list[str]:
        node = start(0, 1, 0, under=f'exec unshare -rm sh -c \'{inside} && exec "$@"\' sh "$@"', **environment)
        ((status, output),) = end(node)
        assert status == 1
        return [line.removeprefix("galley: preflight: node0: ") for line in output.splitlines()]

    memory, disk = lines(mounts, GALLEY_SCRATCH=small)
    assert memory.endswith("/dev/shm has 32 MiB, 32 MiB free")
    assert disk == f"disk: {small} has 300 MiB left"
    smi(rows(HEALTHY.format(0, 1, 0)))
    assert lines(mounts, GALLEY_SCRATCH=small, GALLEY_GPUS=1) == [disk], "one rank talks to nobody"
    _, files = lines(crowded, GALLEY_SCRATCH=small)
    assert files.startswith(f"disk: {small} has room for 49")
    first = lines(read_only)[0]
    assert first == f"disk: {run} cannot be written: Read-only file system"
    (nowhere,) = lines("true", GALLEY_SCRATCH=tmp_path / "not" / "mounted")
    assert nowhere.startswith("disk: FileNotFoundError: ")


def test_memory_that_is_asked_for(start: Start, attempt: Attempt) -> None:
    ((status, output),) = end(start(0, 1, 0, GALLEY_MEMORY_MB=10**9))
    assert status == 1
    assert output.startswith("galley: preflight: node0: memory: ")
    assert " MiB free" in output
    assert "; 1000000000 MiB needed; " in output


def test_limits_of_cgroups(tmp_path: Path) -> None:
    """The layouts of Slurm's own cgroup plug-ins, where the limit is the job's and not the task's."""
    first = tmp_path / "memory" / "slurm" / "uid_0" / "job_7" / "step_0"
    second = tmp_path / "system.slice" / "slurmstepd.scope" / "job_7" / "step_0"
    for folder, name, inner in ((first, "memory.limit_in_bytes", "9223372036854771712"), (second, "memory.max", "max")):
        folder.mkdir(parents=True)
        (folder / name).write_text(f"{inner}\n")
        (folder.parent / name).write_text("2147483648\n")
    assert min(cgroup_limits("4:cpu,cpuacct:/\n9:memory:/slurm/uid_0/job_7/step_0\n", tmp_path)) == 2 << 30
    assert cgroup_limits("0::/system.slice/slurmstepd.scope/job_7/step_0\n", tmp_path) == [2 << 30]
    assert cgroup_limits("0::/../../elsewhere\n3:pids:/slurm\n", tmp_path) == []


def test_a_name_that_leads_nowhere_and_limits_that_are_low(
    start: Start, attempt: Attempt, smi: Callable[[str], None]
) -> None:
    def low() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))

    smi(rows(HEALTHY.format(0, 1, 0)))
    own = start(1, 2, free_port(), options="", preexec=low, GALLEY_GPUS=1, GALLEY_PREFLIGHT_S=1.2)
    unknown = start(2, 3, free_port(), GALLEY_HEAD="no-such-host.invalid", GALLEY_PREFLIGHT_S=1.2)
    lines = [output.splitlines()[0] for _, output in end(own, unknown)]
    assert lines[0] == "galley: preflight: node1: name: 127.0.0.1 is 127.0.0.1, which is this node itself"
    assert lines[1].startswith("galley: preflight: node2: name: gaierror: ")
    found = checks(attempt, 1)["limits"]
    assert found["ok"]
    assert found["detail"].startswith("memlock 64 KiB, nofile ")
    assert "warning: too little locked memory" in found["detail"]


def test_a_clock_that_is_wrong(start: Start, attempt: Attempt, tmp_path: Path) -> None:
    """One of three nodes has a clock that is 100 s ahead: a shim between it and the kernel."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    shim = tmp_path / "shim.c"
    shim.write_text("""
        #include <sys/syscall.h>
        #include <time.h>
        #include <unistd.h>
        int clock_gettime(clockid_t which, struct timespec *now) {
            int status = syscall(SYS_clock_gettime, which, now);
            if (which == CLOCK_REALTIME) now->tv_sec += 100;
            return status;
        }""")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "shim.so", shim], check=True)
    port = free_port()
    wrong = start(2, 3, port, LD_PRELOAD=tmp_path / "shim.so")
    ended = end(start(0, 3, port), start(1, 3, port), wrong)
    words = "clock: 100.0 s ahead of the shared disk, 100.0 s ahead of the other nodes"
    assert ended == [(0, ""), (0, ""), (1, f"galley: preflight: node2: {words}\n")]
    assert bad_nodes(attempt, NAMES[:3]) == {"node2": words}
