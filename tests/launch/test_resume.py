"""Running again: what goes on, what is finished, what is refused. Fake stages, in this process."""

import json
from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.local import runner
from galley_launch.plan import resume
from launch import fakes


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "x")


def start(run: RunDir, lr: float = 2e-4, duration: dict[str, float] | None = None, **scripts: str) -> int:
    made = fakes.spec(run.root, lr, **(duration or {}))
    return runner.start(made, run, fakes.make(made, run, **scripts))


def test_a_finished_run_says_so_and_does_nothing(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(run) == 0
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.name != run.lock.name}
    capfd.readouterr()
    assert start(run) == 0
    assert capfd.readouterr().out.startswith("run x is finished: model in ")
    after = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.name != run.lock.name}
    assert after == before


def test_a_longer_duration_goes_on(run: RunDir) -> None:
    assert start(run) == 0
    assert start(run, duration={"steps": 20}) == 0
    assert [attempt.number for attempt in run.attempts()] == [1, 2]
    assert json.loads(run.spec.read_text())["task"]["duration"]["steps"] == 20


def test_an_earlier_attempts_export_does_not_count(run: RunDir) -> None:
    assert start(run) == 0
    assert start(run, duration={"steps": 20}, export="sys.exit(1)") == 1
    assert (run.export / "export.json").exists()
    assert not resume.is_exported(run)


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ({"steps": 3}, "duration.steps would shrink: 9 → 3"),
        ({"epochs": 2}, "its duration is in steps, not epochs"),
    ],
)
def test_a_shorter_or_other_duration_is_refused(run: RunDir, duration: dict[str, float], message: str) -> None:
    assert start(run) == 0
    with pytest.raises(UserError, match=message):
        start(run, duration=duration)
    assert len(run.attempts()) == 1


def test_another_task_is_refused_with_the_difference(run: RunDir) -> None:
    assert start(run, train="step(1); sys.exit(1)") == 1
    with pytest.raises(UserError, match=r"trains another task \(optimizer.lr: 0.0002 → 0.0001\)"):
        start(run, lr=1e-4)
    assert len(run.attempts()) == 1


def test_another_task_replaces_one_that_never_trained(run: RunDir) -> None:
    assert start(run, prepare="fail('prepare', 2, 'no')") == 2
    assert start(run, lr=1e-4) == 0
    assert json.loads(run.spec.read_text())["task"]["optimizer"]["lr"] == 1e-4


def test_a_checkpoint_alone_means_that_training_has_begun(run: RunDir) -> None:
    run.checkpoint(5).root.mkdir(parents=True)
    assert not resume.has_begun(run)
    run.checkpoint(5).manifest.write_text("{}")
    assert resume.has_begun(run)


def test_a_failed_export_is_all_that_runs_again(run: RunDir) -> None:
    assert start(run, export="sys.exit(1)") == 1
    assert json.loads(run.attempt(1).exit.read_text())["verdict"] == "done"
    assert start(run, prepare="sys.exit(1)", train="sys.exit(1)") == 0
    assert resume.is_exported(run)
    assert len(run.attempts()) == 1


def test_a_failed_export_can_move_to_another_device(run: RunDir) -> None:
    first = fakes.spec(run.root)
    on_gpu = first.model_copy(
        update={"placement": first.placement.model_copy(update={"device": "cuda", "gpus": ["0"]})}
    )
    assert runner.start(on_gpu, run, fakes.make(on_gpu, run, export="sys.exit(1)")) == 1
    body = "assert json.loads((run / 'run.json').read_text())['placement']['device'] == 'cpu'; " + fakes.GOOD_EXPORT
    assert start(run, train="sys.exit(1)", export=body) == 0
    assert json.loads(run.spec.read_text())["placement"]["device"] == "cpu"
    assert json.loads(run.attempt(1).placement.read_text())["device"] == "cuda"
    assert len(run.attempts()) == 1


def test_a_run_of_another_version_is_left_alone(run: RunDir) -> None:
    assert start(run) == 0
    foreign = run.spec.read_text().replace('"schema": 1', '"schema": 2')
    run.spec.write_text(foreign)
    with pytest.raises(UserError, match="it was written by another version"):
        start(run)
    assert run.spec.read_text() == foreign


def test_a_stopped_run_goes_on_in_a_new_attempt(run: RunDir) -> None:
    assert start(run, train="step(3); leave('stopped', 3, 'walltime')") == 0
    assert not resume.is_exported(run)
    assert start(run) == 0
    assert len(run.attempts()) == 2


def test_each_attempt_keeps_the_files_of_its_plan(run: RunDir) -> None:
    start(run)
    assert run.spec.read_text() == fakes.spec(run.root).to_json()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = RunDir(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="cannot be written to"):
        start(blocked)


def test_export_wants_a_checkpoint(run: RunDir) -> None:
    run.root.mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        runner.export(run, lambda attempt: fakes.plan(fakes.spec(run.root), run, attempt).stages[-1])


def test_export_of_a_stopped_run(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(run, train="step(3); leave('stopped', 3, 'user')") == 0
    run.checkpoint(3).root.mkdir(parents=True)
    run.checkpoint(3).manifest.write_text(json.dumps({"files": {}}))
    capfd.readouterr()
    made = fakes.spec(run.root)
    assert runner.export(run, lambda attempt: fakes.plan(made, run, attempt).stages[-1]) == 0
    assert capfd.readouterr().out.startswith("run x is exported: model in ")
    assert json.loads(run.attempt(1).exit.read_text())["verdict"] == "stopped"
    assert start(run) == 0
    assert len(run.attempts()) == 2


def test_export_runs_in_the_last_attempt(run: RunDir) -> None:
    assert start(run, export="sys.exit(1)") == 1
    checkpoint = run.checkpoint(9)
    checkpoint.root.mkdir(parents=True)
    checkpoint.manifest.write_text(json.dumps({"files": {}}))
    made = fakes.spec(run.root)
    assert runner.export(run, lambda attempt: fakes.plan(made, run, attempt).stages[-1]) == 0
    assert resume.is_exported(run)
