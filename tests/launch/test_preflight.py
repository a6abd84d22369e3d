"""Preflight with real processes and sockets: nodes that meet, or do not, and whose fault that is."""

import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch.preflight_nodes import NAMES, Start, checks, end, free_port, report, starting

from galley.contract.rundir import Attempt, RunDir
from galley_launch.job.node.preflight import bad_nodes


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return RunDir(tmp_path / "runs" / "x").begin_attempt()


@pytest.fixture
def start(attempt: Attempt, tmp_path: Path) -> Iterator[Start]:
    yield from starting(attempt, tmp_path)


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
    said = [b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 100000 + b"\n", b"\xff\xfe\n", b"7\n", b"", b"{}\n"]
    said.append(
        json.dumps({"token": "another job's", "node": 1, "name": "x", "number": 2, "time": 0.0}).encode() + b"\n"
    )
    strangers = [speak(port, words) for words in said]
    time.sleep(0.2)
    assert head.poll() is None, "the head took a stranger for node 1"
    assert end(head, start(1, 2, port)) == [(0, ""), (0, "")]
    for stranger in strangers:
        stranger.close()


def test_who_knows_the_job_but_not_its_secret_is_a_stranger(start: Start, attempt: Attempt) -> None:
    """The attempt's path and the job's number are known to everybody who looks into the queue."""
    attempt.secret.write_text("0123456789abcdef")
    port = free_port()
    head = start(0, 2, port)
    guessed = hashlib.sha256(f"{attempt.root} 7".encode()).hexdigest()
    words = {"token": guessed, "node": 1, "name": "node1", "number": 99, "time": 0.0}
    stranger = speak(port, json.dumps(words).encode() + b"\n")
    time.sleep(0.2)
    assert head.poll() is None, "the head took a stranger for node 1"
    assert end(head, start(1, 2, port)) == [(0, ""), (0, "")]
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


@pytest.mark.parametrize(("missing", "blamed"), [([], {"node1"}), ([2], {"node2"}), ([1, 2], {"node0"})])
def test_an_answer_that_is_lost(missing: list[int], blamed: set[str], attempt: Attempt) -> None:
    """Node 1 has no sum. The head may have waited for another node, or may never have answered."""
    attempt.preflight.mkdir()
    for number in range(3):
        ok = number == 2 or (number == 0 and not missing)
        check = {"name": "exchange", "ok": ok, "detail": "no answer", **({} if number else {"missing": missing})}
        (attempt.preflight / f"node{number}.json").write_text(json.dumps({"checks": [check]}))
    assert set(bad_nodes(attempt, NAMES[:3])) == blamed


def test_a_clock_that_is_wrong(start: Start, attempt: Attempt, tmp_path: Path) -> None:
    """The head's is 100 s ahead, by a shim between it and the kernel: the other two agree, so it is not theirs."""
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
    wrong = start(0, 3, port, LD_PRELOAD=tmp_path / "shim.so")
    ended = end(start(1, 3, port), start(2, 3, port), wrong)
    words = "clock: 100.0 s ahead of the shared disk, 100.0 s ahead of the other nodes"
    assert ended == [(0, ""), (0, ""), (1, f"galley: preflight: node0: {words}\n")]
    assert bad_nodes(attempt, NAMES[:3]) == {"node0": words}
