"""Disks as they are: closed folders, read-only and full file systems, a deleted working directory. One line each."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from fuzz import world

from galley.contract import rundir
from galley.contract.files import follow_umask, is_full, of_the_disk, shut_out_others, write_atomic
from galley.contract.rundir import RunDir
from galley_launch.job import box
from launch import fakes

VERBS = """
import contextlib, io, json, sys
from galley_launch import cli
from galley_launch.base import devices
devices.visible = list
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(words.split())
    print(json.dumps([words, status, out.getvalue(), err.getvalue()]))
"""
# Root may read and write whatever a mode says, by these capabilities (capabilities(7)).
ROOTS = "-dac_override,-dac_read_search,-fowner"
AS_USER = ["setpriv", f"--bounding-set={ROOTS}", f"--inh-caps={ROOTS}"] if os.geteuid() == 0 else []
READING = ["status", "status bad", "why bad", "logs bad", "report bad", "stop bad", "plan runs/bad device=cpu ranks=1"]


class Result(NamedTuple):
    """What a command line came to."""

    words: str
    status: int
    out: str
    err: str


def galley(here: Path, verbs: list[str], under: list[str] = AS_USER) -> dict[str, Result]:
    """Run each command line in ``here``, in one process started by ``under``, and check that none is a traceback."""
    command = [*under, sys.executable, "-c", VERBS, json.dumps(verbs)]
    variables = os.environ | {"PYTHONPATH": fakes.PYTHONPATH}
    done = subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    results = [Result(*json.loads(line)) for line in done.stdout.splitlines()]
    for result in results:
        assert result.status in (0, 2), result
        if result.status == 2:
            assert result.err.count("galley: ") == result.err.count("\n") == 1, result
            assert len(result.err) <= 500, result
    return {result.words: result for result in results}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    spec = fakes.spec(tmp_path / "x").to_json()
    for name in ("good", "bad"):
        world.run(tmp_path / "runs" / name, spec, submitted=False)
    return tmp_path


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root reads everything")
@pytest.mark.parametrize(
    "closed",
    ["", "attempts", "attempts/0002", "attempts/0002/logs", "attempts/0002/errors", "checkpoints",
     "checkpoints/step-000006", "run.json", "metrics.jsonl", "attempts/0002/exit.json", "data"],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_and_one_row(here: Path, closed: str) -> None:
    path = here / "runs" / "bad" / closed
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        results = galley(here, [*READING, "cancel bad"])
    finally:
        path.chmod(mode)
    table = results["status"]
    assert table.status == 0
    assert [line.split()[0] for line in table.out.splitlines()] == ["run", "bad", "good"]
    assert table.out.splitlines()[2].split()[1] == "failed"
    if closed in ("", "attempts", "checkpoints"):
        assert "damaged" in table.out
        assert "cannot be read (Permission denied)" in table.out
        assert "Permission denied; correct its permissions" in results["status bad"].err


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root reads everything")
@pytest.mark.parametrize("name", ["runs", "recipes", "clusters"])
def test_folders_that_are_closed(here: Path, name: str) -> None:
    (here / name).mkdir(exist_ok=True)
    (here / name).chmod(0)
    try:
        verbs = ["status", "logs bad", "recipes", "show a", "plan a", "clusters", "forget bad yes=true"]
        results = galley(here, [*verbs, "copy smollm2-135m-lora mine"])
    finally:
        (here / name).chmod(0o755)
    verb = {"runs": "status", "recipes": "recipes"}.get(name)
    if verb:
        assert results[verb].err.startswith(f"galley: {name}")
        assert "Permission denied" in results[verb].err


def mounted(options: str) -> list[str]:
    """What runs a command with its own ``runs``: the same folder once more, mounted with ``options``."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mounts here")
    mount = f"mount --bind runs runs && mount -o {options} runs"
    return ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def test_a_read_only_disk_is_read(here: Path) -> None:
    results = galley(here, [*READING, "run runs/bad device=cpu ranks=1"], mounted("remount,ro,bind"))
    assert {words: result.status for words, result in results.items() if words != "stop bad"} == {
        **dict.fromkeys(set(READING) - {"stop bad"}, 0), "run runs/bad device=cpu ranks=1": 2,
    }  # fmt: skip
    assert results["report bad"].out == "bad.report.html\n", "where it can be written"
    assert "<h1" in (here / "bad.report.html").read_text()
    assert not (here / "runs" / "bad" / "report.html").exists()
    assert "Read-only file system" in results["run runs/bad device=cpu ranks=1"].err


LIVE = """
import sys
from pathlib import Path
from galley.contract.rundir import RunDir
from galley_launch.base import locks
with locks.held(RunDir(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(run: RunDir) -> subprocess.Popen[bytes]:
    """A process that holds ``run`` until its input ends."""
    command = [sys.executable, "-c", LIVE, str(run.root)]
    variables = os.environ | {"PYTHONPATH": fakes.PYTHONPATH}
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_live_run_on_a_read_only_disk_cannot_be_asked_to_stop(here: Path) -> None:
    run = RunDir(here / "runs" / "bad")
    run.attempt(2).stop.unlink()
    holder = holding(run)
    try:
        results = galley(here, ["status", "stop bad"], mounted("remount,ro,bind"))
    finally:
        holder.communicate()
    assert "live" in results["status"].out
    assert "cannot be asked to stop here" in results["stop bad"].err
    assert f"end it where it runs: pid {holder.pid}, host " in results["stop bad"].err


def test_a_full_disk_takes_a_request_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name fits where content does not, and the name is what stops."""

    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(rundir, "write_atomic", fail)
    attempt = RunDir(tmp_path).attempt(1)
    attempt.request_stop("user")
    assert attempt.stop.exists()


def test_what_does_not_fit_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "record", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    gone = "import os, tempfile; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())\n"
    verbs = ["status", "recipes", "clusters", "logs x", "plan smollm2-135m-lora device=cpu ranks=1",
             "run smollm2-135m-lora device=cpu ranks=1", "copy smollm2-135m-lora x"]  # fmt: skip
    command = [sys.executable, "-c", gone + VERBS, json.dumps(verbs)]
    variables = os.environ | {"PYTHONPATH": fakes.PYTHONPATH}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    results = [Result(*json.loads(line)) for line in done.stdout.splitlines()]
    assert [result.status for result in results] == [0, 0, 0, 2, 2, 2, 2]
    for result in results[4:]:
        assert result.err == "galley: current directory: does not exist any more; change to one that does (cd)\n"


@pytest.mark.parametrize("words", ["status", "--help", "recipes"])
def test_output_to_a_full_disk(here: Path, words: str) -> None:
    command = [sys.executable, "-m", "galley_launch", words]
    variables = os.environ | {"PYTHONPATH": fakes.PYTHONPATH}
    variables.pop("PYTHONUNBUFFERED", None)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=here, env=variables, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (2, "galley: disk: No space left on device; make room there\n")


def test_errors_that_are_not_a_disks() -> None:
    assert of_the_disk(ProcessLookupError(3, "No such process")) is None
    assert of_the_disk(PermissionError(1, "Operation not permitted")) is None, "a signal's"
    assert of_the_disk(FileNotFoundError(2, "No such file or directory", "x")) is None, "our bug"
    assert of_the_disk(OSError("Can't load tokenizer")) is None


def test_errors_of_rust_are_a_disks_too() -> None:
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert str(of_the_disk(error)) == "disk: No space left on device; make room there"
    assert of_the_disk(RuntimeError("I/O error: No such file or directory (os error 2)")) is None


def test_a_stage_that_could_not_write_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = RunDir(tmp_path).attempt(1)
    attempt.logs.mkdir(parents=True)
    monkeypatch.setattr(box, "is_full", lambda _: True)
    assert box.failure(attempt, "prepare", 1) == (
        1, f"prepare failed and could not write why: the disk of {attempt.root} is full; make room there",
    )  # fmt: skip
    attempt.log("prepare").write_text("ValueError: x\n")
    assert "ValueError: x" in box.failure(attempt, "prepare", 1)[1]
    assert not is_full(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o000, 0o664, 0o775), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_the_umask_decides_who_reads_and_no_stranger_writes(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    before = os.umask(mask)
    try:
        shut_out_others()
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a").touch(0o600)  # as safetensors and tempfile make theirs
        (tmp_path / "b").touch(0o600)
        follow_umask(tmp_path / "sub")
        follow_umask(tmp_path / "b")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("sub", "sub/a", "b")]
    assert modes == [folder, file, file]
