"""The watch beside torchrun, with real processes: a parent, its ranks, and what they write."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from galley.contract.rundir import Attempt, RunDir
from galley_launch.job.node import watch

ROOT = Path(__file__).resolve().parents[2]

# Starts its ranks as torchrun does, and ends with a failure once one of them has died.
TORCHRUN = """
import os, subprocess, sys, time
folder, *bodies = sys.argv[1:]
first = int(os.environ.get("SLURM_NODEID", 0)) * len(bodies)
ranks = []
for number, body in enumerate(bodies, first):
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": str(number)}
    ranks.append(subprocess.Popen([sys.executable, "-c", os.environ["RANK_CODE"] + body, folder], env=env))
while all(rank.poll() is None or rank.returncode == 0 for rank in ranks):
    if os.path.exists(os.path.join(os.environ["ATTEMPT"], "finish")):
        break
    time.sleep(0.05)
statuses = [rank.poll() for rank in ranks]
for rank in ranks:
    rank.kill()
sys.exit(1 if any(statuses) else 0)
"""
# What every rank begins with: its heartbeats, and its log.
RANK = """
import contextlib, faulthandler, json, os, signal, subprocess, sys, time
from pathlib import Path
from galley.contract.rundir import write_atomic
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
faulthandler.register(signal.SIGUSR2, file=(folder / f"rank-{rank}.log").open("w"))
def beat(step, phase="step", pid=os.getpid()):
    body = {"rank": rank, "pid": pid, "host": "here", "phase": phase, "step": step, "time": time.time()}
    with contextlib.suppress(OSError):
        write_atomic(folder / f"rank-{rank}.json", json.dumps(body))
def go_on():
    for step in range(10**6):
        beat(step)
        time.sleep(0.05)
def stuck_in_a_collective():
    time.sleep(600)
"""
GOES_ON = "go_on()"
STUCK = "beat(17); stuck_in_a_collective()"
NEVER_BEGINS = "stuck_in_a_collective()"


@dataclass
class Job:
    """A fake torchrun, and the watch beside it."""

    torchrun: subprocess.Popen[bytes]
    watch: subprocess.Popen[str]
    folder: Path
    attempt: Attempt

    def end(self) -> tuple[int, str]:
        """The watch's exit status and what it printed."""
        output, _ = self.watch.communicate(timeout=30)
        return self.watch.returncode, output

    def hang(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.attempt.root / "hang-node2.json").read_text())
        return found

    def until(self, test: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not test():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)


def begin(root: Path, limits: str, *ranks: str, node: int = 0, under: str = 'exec "$@"', outside: int = 0) -> Job:
    """``under``: a shell's command line, of which ``"$@"`` is the watch. ``$ATTEMPT`` is the attempt there."""
    folder, attempt = root / "heartbeats", RunDir(root / "run").begin_attempt()
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}", "PYTHONSAFEPATH": "1", "RANK_CODE": RANK}
    env |= {
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": "node2",
        "OUTSIDE": str(outside),
        "ATTEMPT": str(attempt.root),
    }
    torchrun = subprocess.Popen([sys.executable, "-c", TORCHRUN, str(folder), *ranks], env=env)
    arguments = ["--parent", torchrun.pid, "--heartbeats", folder, "--attempt", attempt.root, "--every", 0.1]
    command = [
        sys.executable,
        "-m",
        "galley_launch.job.node.watch",
        *arguments,
        "--limits",
        limits,
        "--ranks",
        len(ranks),
    ]
    shell = ["sh", "-c", under, "sh", *map(str, command)]
    return Job(torchrun, subprocess.Popen(shell, env=env, stdout=subprocess.PIPE, text=True), folder, attempt)


def cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Every hang at once: each takes seconds of doing nothing."""
    outsider = subprocess.Popen(["sleep", "60"])
    child = "helper = subprocess.Popen(['sleep', '60']); (folder / 'helper').write_text(str(helper.pid)); "
    claim = "beat(1, pid=int(os.environ['OUTSIDE'])); "
    blocked = 'mkfifo "$ATTEMPT/.hang-node2.json.$$.tmp" && exec "$@"'
    made = {
        "stuck": ("start=60,step=1.5", (GOES_ON, child + STUCK), {"node": 1}),
        "silent": ("start=1.5,step=60", (claim + NEVER_BEGINS, NEVER_BEGINS), {"outside": outsider.pid}),
        "ending": ("start=60,end=0.8", ("beat(9, 'end')", "beat(9, 'end'); stuck_in_a_collective()"), {}),
        "disk": ("start=60,load=0.8", ("beat(None, 'load'); stuck_in_a_collective()",), {"under": blocked}),
    }
    begun = {
        name: begin(tmp_path_factory.mktemp(name), limits, *ranks, **more)  # type: ignore[arg-type]
        for name, (limits, ranks, more) in made.items()
    }
    yield begun
    for job in begun.values():
        (job.attempt.root / "finish").touch()
        job.watch.kill()
        job.watch.communicate()
        job.torchrun.wait(10)
    assert outsider.poll() is None, "a process that is not torchrun's was killed"
    outsider.kill()
    outsider.wait()


def test_ends_with_its_parent_and_not_before(tmp_path: Path, jobs: dict[str, Job]) -> None:
    """No hang: signals, half a heartbeat, a rank that has ended, a disk that is away, a job suspended for a while."""
    job = begin(tmp_path, "start=1,step=1,end=0.3", GOES_ON, "beat(9, 'end')")
    job.until(lambda: len([*job.folder.glob("rank-*.json")]) == 2 and (job.folder / ".watch").exists())
    time.sleep(0.3)
    (job.folder / "rank-1.json").write_text('{"rank": 1, "pha')
    (job.folder / "rank-x.json").write_text("not a rank")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        job.watch.send_signal(number)
    family = [*watch.descendants(job.torchrun.pid), job.torchrun.pid, job.watch.pid]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.2)
    for pid in family:
        os.kill(pid, signal.SIGCONT)
    time.sleep(0.3)
    away = job.folder.rename(tmp_path / "away")
    spent = [cpu_seconds(job.watch.pid)]
    time.sleep(1.2)
    spent.append(cpu_seconds(job.watch.pid))
    away.rename(job.folder)
    time.sleep(0.3)
    assert job.watch.poll() is None
    assert spent[1] - spent[0] < 0.15, "more than a tenth of a CPU at ten looks a second"
    (job.attempt.root / "finish").touch()
    assert job.torchrun.wait(10) == 0
    assert job.end() == (0, "")
    kept = [json.loads((job.attempt.heartbeats / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["phase"] for each in kept] == ["step", "end"]
    assert kept[0]["step"] == json.loads((job.folder / "rank-0.json").read_text())["step"]
    assert not (job.attempt.root / "hang-node2.json").exists()


def test_a_number_that_another_process_has_now_is_not_the_ranks(tmp_path: Path) -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert shell.stdout
    pid = int(shell.stdout.readline())
    parent = watch.process(shell.pid)
    assert parent is not None
    watched = watch.Watch(parent, tmp_path, Attempt(tmp_path), {"start": 1.0}, 1, 0.1, "node2")
    try:
        now, body = watch.process(pid), {"pid": pid}
        assert now is not None
        assert watch.rank_processes(watched, {0: watch.Beat(1, 99.5, body)}, 100.0) == {0: now}
        assert watch.rank_processes(watched, {0: watch.Beat(1, 10.0, body)}, 100.0) == {}
    finally:
        os.kill(pid, signal.SIGKILL)
        shell.wait(10)
    assert watch.process(pid) is None


def test_a_parent_that_is_gone_and_limits_that_are_wrong(tmp_path: Path) -> None:
    def run(limits: str) -> subprocess.CompletedProcess[str]:
        gone = subprocess.Popen(["true"])
        gone.wait()
        command = [sys.executable, "-m", "galley_launch.job.node.watch", "--parent", str(gone.pid), "--limits", limits]
        env = {**os.environ, "PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
        more = ["--heartbeats", str(tmp_path), "--attempt", str(tmp_path), "--ranks", "1"]
        return subprocess.run([*command, *more], env=env, capture_output=True, text=True, timeout=20, check=False)

    assert run("start=1,step=2").returncode == 0
    wrong = [run("step=1"), run("start"), run("start=soon")]
    assert [done.returncode for done in wrong] == [2, 2, 2]
    assert "start=SECONDS is missing" in wrong[0].stderr


def test_a_stuck_rank_is_named_and_all_are_killed(jobs: dict[str, Job]) -> None:
    job = jobs["stuck"]
    status, output = job.end()
    said = re.fullmatch(
        r"galley: hang: node2: rank 3 has been silent for (\d+) s in step 17; its stack is in logs/rank-3.log\n", output
    )
    assert status == 3
    assert said
    hang = job.hang()
    assert (hang["node"], hang["rank"], hang["phase"], hang["step"]) == ("node2", 3, "step", 17)
    assert 1.5 <= hang["silent_s"] < 4
    assert [rank["rank"] for rank in hang["ranks"]] == [2, 3]
    assert hang["ranks"][0]["silent_s"] < 1.5 <= hang["ranks"][1]["silent_s"]
    assert "in stuck_in_a_collective" in (job.folder / "rank-3.log").read_text()
    assert "in go_on" in (job.folder / "rank-2.log").read_text()
    assert job.torchrun.wait(10) == 1
    kept = json.loads((job.attempt.heartbeats / "rank-3.json").read_text())
    assert (kept["step"], kept["host"]) == (17, "here")
    # A rank's own helpers are torchrun's and Slurm's to clear away.
    helper = int((job.folder / "helper").read_text())
    os.kill(helper, signal.SIGKILL)


def test_ranks_that_never_write_are_found_and_killed(jobs: dict[str, Job]) -> None:
    """Rank 0 names a process that is not torchrun's, which the fixture sees alive to the end."""
    job = jobs["silent"]
    status, output = job.end()
    words = "rank 1 has been silent for 2 s in phase start; its stack is in logs/rank-1.log"
    assert (status, output) == (3, f"galley: hang: node2: {words}\n")
    assert "in stuck_in_a_collective" in (job.folder / "rank-1.log").read_text()
    assert "in stuck_in_a_collective" in (job.folder / "rank-0.log").read_text()
    assert job.torchrun.wait(10) == 1
    assert [path.name for path in job.attempt.heartbeats.iterdir()] == ["rank-0.json"]


def test_a_rank_that_ended_is_no_hang_and_one_that_does_not_end_is(jobs: dict[str, Job]) -> None:
    job = jobs["ending"]
    status, output = job.end()
    assert status == 3
    assert "rank 1 has been silent for 1 s in phase end, step 9; " in output
    assert job.hang()["rank"] == 1
    assert job.torchrun.wait(10) == 1


def test_ranks_are_killed_even_if_the_shared_disk_hangs(jobs: dict[str, Job]) -> None:
    job = jobs["disk"]
    status, output = job.end()
    assert status == 3
    assert "rank 0 has been silent for 1 s in phase load; " in output
    assert not (job.attempt.root / "hang-node2.json").exists()
    assert job.torchrun.wait(10) == 1
