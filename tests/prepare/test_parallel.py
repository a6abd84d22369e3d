"""Preparing in several processes: the same bytes as in one, the same first error, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import rows, write_jsonl

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import read_manifest
from galley.prepare import parallel
from galley.prepare.formats import encode
from galley.prepare.parallel import in_order
from galley.prepare.prepare import work
from galley.storage import sums

Make = Callable[..., tuple[RunSpec, RunDir]]
ROOT = Path(__file__).resolve().parents[2]


def square(number: int) -> int:
    if number == 7:
        raise UserError("row 7", "is seven", "use another")
    time.sleep(0.01 * (number % 3))
    return number * number


@pytest.mark.parametrize("count", [1, 2, 4])
def test_results_come_in_order_and_errors_in_their_turn(count: int) -> None:
    assert list(in_order(square, range(7), count)) == [(number, number * number) for number in range(7)]
    seen: list[int] = []
    with pytest.raises(UserError, match=r"^row 7: is seven; use another$"):
        seen.extend(number for number, _ in in_order(square, range(30), count))
    assert seen == list(range(7))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_of_two_errors_the_first_row_s_counts(count: int) -> None:
    def numbers() -> Iterator[int]:
        yield from range(9)
        raise UserError("row 9", "cannot be read", "mend it")

    with pytest.raises(UserError, match=r"^row 7: "):
        list(in_order(square, numbers(), count))
    with pytest.raises(UserError, match=r"^row 9: "):
        list(in_order(str, numbers(), count))


def test_reading_does_not_run_ahead() -> None:
    read = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    results = in_order(str, numbers(), 2)
    for _ in range(4):
        next(results)
    assert len(read) <= 4 + 2 * parallel.AHEAD + 2


def test_the_same_bytes_from_1_2_and_4_processes(
    make_run: Make, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = rows(300)
    for number in range(0, 300, 7):  # what the template leaves out is counted, and long rows are dropped
        records[number]["messages"][1]["reasoning_content"] = "because"
        records[number]["messages"][0]["content"] += " fox" * (number % 200)
    data = write_jsonl(tmp_path / "rows.jsonl", records)
    monkeypatch.setattr(encode, "BATCH", 16)
    found = []
    for count in (1, 2, 4):
        monkeypatch.setattr(encode, "processes", lambda count=count: count)
        name = f"with-{count}"
        spec, run = make_run(model_folder, data, name=name, cache=tmp_path / name, held_out=0.1, max_length=96)
        work(spec, run, run.attempt(1))
        manifest = read_manifest(run)
        found.append((sums.of_folder(run.data), manifest.train, manifest.held_out, manifest.warnings))
    assert found[0][1].dropped_overlong > 0
    assert any("`reasoning_content`" in line for line in found[0][3])
    for other in found[1:]:
        assert {**other[0], "manifest.json": ""} == {**found[0][0], "manifest.json": ""}
        assert other[1:] == found[0][1:]


def test_a_process_that_is_killed_is_one_line() -> None:
    def end(number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match=r"^prepare: one of 2 processes that prepare the data was killed"):
        list(in_order(end, range(20), 2))


def test_none_outlives_its_parent() -> None:
    script = (
        "import os, time\n"
        "from galley.prepare.parallel import in_order\n"
        "def slow(number):\n"
        "    if number >= 2: os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)\n"  # in one piece: both write there
        "list(in_order(slow, range(9), 2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while (alive := [child for child in children if is_alive(child)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended; nobody has asked how


def test_no_more_processes_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores: Any = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert parallel.processes() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert parallel.processes() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert parallel.processes() == cores
