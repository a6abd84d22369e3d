"""Records of an attempt and rows of metrics are read back as written, and damaged ones as far as they are sound."""

import json
from pathlib import Path

from galley.contract.metrics import Follower, MetricsRow, drop_after, last_step, newest, parse_row, read_rows, row_line
from galley.contract.records import ExitRecord, JobRecord, read_exit, read_job, write_exit, write_job


def test_an_ending_is_read_back_with_what_this_version_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    record = ExitRecord("failed", "failure", 3, nodes=("n1",), kind="node", unknown={"from_the_future": [1]})
    write_exit(path, record)
    assert read_exit(path) == record
    assert json.loads(path.read_text()) == {
        "verdict": "failed", "reason": "failure", "step": 3, "kind": "node", "nodes": ["n1"], "from_the_future": [1],
    }  # fmt: skip


def test_a_damaged_ending_is_read_as_far_as_it_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    assert read_exit(path) is None
    path.write_text('{"verdict": ["done"], "step": "3", "steps": 9.0, "nodes": "n1", "ended": true, "message": 5}')
    assert read_exit(path) == ExitRecord("['done']", steps=9, message="5")
    path.write_text("[]")
    assert read_exit(path) is None


def test_a_job_says_that_nothing_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    assert read_job(path) == JobRecord()
    record = JobRecord("7", 0, ("n1", "n2"), started=1e9, ranks=4)
    write_job(path, record)
    assert json.loads(path.read_text())["successor"] is None
    assert read_job(path) == record


def test_rows_are_read_back_and_torn_ones_left_out(tmp_path: Path) -> None:
    path, row = tmp_path / "metrics.jsonl", MetricsRow(1, 9, loss=2.0, step_s=0.5)
    assert json.loads(row_line(row)) == {"step": 1, "steps": 9, "loss": 2.0, "mfu": None, "step_s": 0.5}
    path.write_text(row_line(row) + row_line(MetricsRow(1, held_out_loss=3.0)) + '{"step": 2, "loss": "x"}\n[]\n{"st')
    assert list(read_rows(path)) == [row, MetricsRow(1, held_out_loss=3.0), MetricsRow(2)]
    assert newest(read_rows(path)) == MetricsRow(2, 9, loss=2.0, step_s=0.5, held_out_loss=3.0)
    assert last_step(path) == 2
    drop_after(path, 1)
    assert last_step(path) == 1
    assert parse_row('{"step": true, "loss": 1e999, "tokens": 5.0}') == MetricsRow(loss=float("inf"), tokens=5)


def test_rows_are_followed_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.rows() == ([], False)
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert follower.rows() == ([MetricsRow(1)], False)
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    assert follower.rows() == ([MetricsRow(2, loss=2.0)], False)
    path.write_text('{"step": 1}\n')  # what came after a checkpoint was dropped
    assert follower.rows() == ([MetricsRow(1)], True)
