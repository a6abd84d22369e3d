"""What preflight finds on one node: a broken, hung or full one, with an ``nvidia-smi`` of the test's own on PATH."""

import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launch.preflight_nodes import HEALTHY, Start, checks, end, free_port, rows, smi_putter, starting

from galley.contract.rundir import Attempt, RunDir
from galley_launch.job.node.checks import cgroup_limits
from galley_launch.job.node.preflight import bad_nodes


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return RunDir(tmp_path / "runs" / "x").begin_attempt()


@pytest.fixture
def start(attempt: Attempt, tmp_path: Path) -> Iterator[Start]:
    yield from starting(attempt, tmp_path)


@pytest.fixture
def smi(tmp_path: Path) -> Callable[[str], None]:
    return smi_putter(tmp_path)


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
    assert output.endswith("devices: GPU 0 (GPU-a): 90000 of 143771 MiB are in use by another process\n")


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
    assert lines[1].startswith(
        "galley: preflight: node2: name: no-such-host.invalid, the head's name, does not resolve here ("
    )
    found = checks(attempt, 1)["limits"]
    assert found["ok"]
    assert found["detail"].startswith("memlock 64 KiB, nofile ")
    assert "warning: too little locked memory" in found["detail"]
