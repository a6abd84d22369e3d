"""Ranks meet where nobody else can: no port is open to others, and nothing that others write is unpickled."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toy
from listeners import Listener, attack, listeners
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousTimeoutError

from galley import launch_ranks
from galley.contract.rundir import RunDir, read_json
from galley.ranks.store import STORE, meet_nodes, private
from galley_launch.base import locks
from galley_launch.local import supervise
from galley_launch.plan import plan

SAMPLES = [[document] for document in toy.make_documents(64)]
ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT / "src"), *(path for path in sys.path if "site-packages" in path)])


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def endured(found: list[Listener], canary: Path) -> list[Listener]:
    """Those behind which there is a rendezvous to overwrite; waits for what comes of it."""
    fallen = [each for each in found if attack("127.0.0.1", each.port, canary)]
    until(canary.exists, 30, "nothing was unpickled") if fallen else time.sleep(3)
    return fallen


@pytest.mark.slow
def test_the_attack_works_on_torchruns_own_rendezvous(tmp_path: Path) -> None:
    """Else the next test would show nothing."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "sleep", "60"]
    process = subprocess.Popen(torchrun, start_new_session=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(supervise.descendants(process.pid)) > 1, 60, "it does not start")
        found = listeners(supervise.descendants(process.pid))
        assert any(not each.is_loopback for each in found), "it listens on every interface"
        assert endured(found, tmp_path / "canary")
        assert (tmp_path / "canary").exists(), "code ran as the user"
    finally:
        supervise.end(process)


@pytest.mark.long
@pytest.mark.slow
def test_a_live_run_listens_nowhere_that_others_reach(tmp_path: Path, llama: Path) -> None:
    run = RunDir(tmp_path / "run")
    spec = toy.make_spec(run, llama, world=2, steps=100_000)
    toy.write_data(run, llama, SAMPLES, None, packed=False)
    todo = plan.make(spec, run, 1, PYTHONPATH)
    attempt = run.attempt(1)
    stage = todo.stages[1]
    process = supervise.start(stage, attempt.log("train"), None)
    try:
        until(lambda: run.metrics.exists() and run.metrics.read_text().count("\n") > 2, 90, toy.rank_logs(run))
        family = supervise.descendants(process.pid)
        found = listeners(family)
        assert len(found) >= 2, "gloo's two, one for each rank"
        assert not [each for each in found if not each.is_loopback]
        assert not [each for each in found if each.pid == process.pid], "the launcher listens nowhere"
        assert not endured(found, tmp_path / "canary")
        assert not (tmp_path / "canary").exists()
        before = run.metrics.read_text().count("\n")
        until(lambda: run.metrics.read_text().count("\n") > before, 30, "it trains on")
        attempt.request_stop("user")
        assert process.wait(60) == 0, toy.rank_logs(run)
    finally:
        supervise.end(process)
    assert (read_json(attempt.exit) or {})["verdict"] == "stopped"


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path: Path, llama: Path) -> None:
    """Else they would train on, and the run, which its user was told to resume, would be refused as in use."""
    run = RunDir(tmp_path / "run")
    spec = toy.make_spec(run, llama, world=2, steps=100_000)
    toy.write_data(run, llama, SAMPLES, None, packed=False)
    attempt = run.attempt(1)
    process = supervise.start(plan.make(spec, run, 1, PYTHONPATH).stages[1], attempt.log("train"), None)
    family = [process.pid]
    try:
        until(lambda: run.metrics.exists() and run.metrics.read_text(), 90, toy.rank_logs(run))
        family = supervise.descendants(process.pid)
        assert len(family) >= 3
        process.kill()
        process.wait(10)
        until(lambda: not any(map(alive, family)), 10, "ranks outlive torchrun")
        until(lambda: not locks.is_live(run), 10, "the lock outlives the ranks")
    finally:
        for pid in filter(alive, family):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def handler(nodes: int, rank: int, folder: Path | str) -> launch_ranks.FileRendezvous:
    return launch_ranks.FileRendezvous(RendezvousParameters("file", str(folder), "7.0", nodes, nodes, rank=str(rank)))


def test_a_node_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_ranks, "_PATIENCE_S", 0.2)
    monkeypatch.setenv(STORE, "")
    with pytest.raises(RendezvousTimeoutError, match=r"node 1, 2 of the job \(counted from 0\) did not come"):
        handler(3, 0, tmp_path / "store").next_rendezvous()


def meet_all(folder: Path, nodes: int) -> list[tuple[list[int], bool]]:
    """The nodes of a job, the head last."""
    with ThreadPoolExecutor(nodes) as pool:
        waiting = [pool.submit(meet_nodes, folder, rank, nodes, 10.0) for rank in range(1, nodes)]
        time.sleep(0.2)
        waiting.insert(0, pool.submit(meet_nodes, folder, 0, nodes, 10.0))
        return [each.result() for each in waiting]


def test_nodes_meet_and_see_that_locks_hold_between_them(tmp_path: Path) -> None:
    assert meet_all(private(tmp_path / "store"), 4) == [([], True)] * 4


@pytest.mark.slow
def test_two_launchers_number_their_ranks_in_a_shared_folder(tmp_path: Path) -> None:
    """As two nodes of a job do."""
    shared = tmp_path / "meeting"
    words = [sys.executable, "-m", "galley.launch_ranks", "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "7.0"]
    words += ["--rdzv-backend", "file", "--rdzv-endpoint", str(shared)]
    script = ["--no-python", "sh", "-c", "echo $RANK $WORLD_SIZE $GROUP_RANK $GALLEY_STORE"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    nodes = [
        subprocess.Popen([*words, "--rdzv-conf", f"rank={rank}", *script], stdout=subprocess.PIPE, text=True, env=env)
        for rank in range(2)
    ]
    told = [line for node in nodes for line in node.communicate(timeout=90)[0].splitlines()]
    assert [node.returncode for node in nodes] == [0, 0]
    assert sorted(told) == [f"{rank} 4 {rank // 2} {shared}/store" for rank in range(4)]
    assert (shared.stat().st_mode & 0o777, (shared / "store").stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.slow
def test_one_box_stays_on_its_loopback_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from galley.ranks.world import stay_inside

    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    stay_inside()
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["GLOO_SOCKET_IFNAME"]) == ("ib0", "lo")


def test_locks_that_hold_on_one_node_only_are_noticed_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As BeeGFS and Lustre's localflock have them: everybody gets the lock."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert [locks for _, locks in meet_all(private(tmp_path / "store"), 3)] == [False] * 3


def test_a_file_system_without_locks_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setenv("TORCH_ELASTIC_WORKER_IDENTICAL", "")
    monkeypatch.setenv("GALLEY_LAUNCHER", "")
    monkeypatch.setenv("GALLEY_ATTEMPT_DIR", str(tmp_path / "attempts" / "0001"))
    where = ["--rdzv-endpoint", str(tmp_path / "store"), "--rdzv-conf", "rank=0", "--rdzv-id", "7.0"]
    assert launch_ranks.main(["--rdzv-backend", "file", "--nnodes", "2", *where, "--no-python", "true"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"galley: {tmp_path}/store: file locks do not hold between nodes")
    assert len(line) < 500
    assert RunDir(tmp_path).attempt(1).errors()[0]["message"] == line.removeprefix("galley: ")


def test_the_file_is_the_owners_alone_and_goes_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE, "")
    alone = handler(1, 0, "")
    old = os.umask(0)
    try:
        alone.next_rendezvous()
    finally:
        os.umask(old)
    path = Path(os.environ[STORE])
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    alone.shutdown()
    assert not path.parent.exists()


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_folder_of_others_is_refused(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "store", tmp_path / "other"
    other.mkdir(mode=0o700)
    if kind == "open":
        folder.mkdir()
        folder.chmod(0o770)
    elif kind == "link":
        folder.symlink_to(other)
    else:
        folder.write_text("")
    with pytest.raises((PermissionError, FileExistsError)):
        private(folder)


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE, "")
    (tmp_path / "store").mkdir(mode=0o700)
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "store" / "store").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic"):
        handler(1, 0, tmp_path / "store").next_rendezvous()
    assert (tmp_path / "mine").read_text() == "precious"
