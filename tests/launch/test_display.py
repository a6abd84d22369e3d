"""What a run shows: a live line on a terminal, plain lines elsewhere."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from galley.contract.metrics import MetricsRow
from galley_launch.base.numbers import duration
from galley_launch.base.terminal import Lines, Tail, status
from launch import fakes


def test_a_tail_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text("one\ntw")
    assert tail.lines() == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert tail.lines() == ["two", "three"]
    assert tail.lines() == []


def test_a_tail_may_start_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("old\n")
    tail = Tail(path).skip()
    with path.open("a") as file:
        file.write("new\n")
    assert tail.lines() == ["new"]


def test_a_tail_reads_a_file_again_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("1\n2\n3\n")
    tail = Tail(path).skip()
    path.write_text("1\n")
    assert tail.lines() == ["1"]


def test_lines_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text("a\ngalley: data.jsonl:3: no messages; add them\n")
    screen = Lines([Tail(tmp_path / "a"), Tail(tmp_path / "b")])
    screen.show()
    (tmp_path / "b").write_text("b\n")
    screen.close()
    assert capsys.readouterr().out == "a\nb\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (90000, "25 h 00 min")],
)
def test_a_duration_reads_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_status_leaves_out_what_is_not_there() -> None:
    assert status(MetricsRow(step=1)) == ""
    row = MetricsRow(loss=1.25, tokens_per_s=1234.4, left_s=61.0)
    assert status(row) == "loss 1.2500 · 1,234 tokens/s · 1 min 01 s left"


def on_terminal(root: Path, train: str) -> str:
    """What a launcher on a pseudo-terminal of its own shows of a run with that training."""
    leader, follower = pty.openpty()
    launcher = subprocess.Popen(
        [sys.executable, "-c", fakes.LAUNCHER, str(root), json.dumps({"train": train})],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=os.environ | {"PYTHONPATH": fakes.PYTHONPATH, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # Linux says EIO where the last writer has gone.
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    assert launcher.wait(timeout=30) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


def test_a_terminal_gets_a_live_line(tmp_path: Path) -> None:
    slow = "step(1); time.sleep(0.6); step(5); time.sleep(0.6); step(9); leave('done', 9)"
    text = on_terminal(tmp_path / "x", slow)
    assert "9/9 loss 1.5000 · 100 tokens/s · 5 s left" in text
    assert "run x is done" in text


LOG = (
    "log = (attempt / 'logs' / 'rank-0.log').open('a');"
    "put = lambda text: (log.write(text + '\\n'), log.flush(), time.sleep(0.7));"
)


def test_the_live_line_says_what_goes_on_before_the_first_step_and_in_a_long_one(tmp_path: Path) -> None:
    train = (
        LOG + "put('loading org/model [x] on 1 rank'); put('step 1 of 9 begins'); step(1);"
        "put('step 1/9  loss 1.5'); put('step 2/9: micro-batch 1 of 4, 40 s so far'); step(9); leave('done', 9)"
    )
    text = on_terminal(tmp_path / "x", train)
    assert "loading org/model [x] on 1 rank" in text
    assert "step 1 of 9 begins" in text
    assert "5 s left · step 2/9: micro-batch 1 of 4, 40 s so far" in text
    assert "left · step 1/9" not in text
