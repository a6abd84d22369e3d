"""A run whose export was written but failed its check: the last line, the exit status, status, why and report agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch.attempts import attempted
from slurm.conftest import fakes as slurm_fakes

from galley.contract.errors import UserError
from galley.contract.rundir import UNVERIFIED, RunDir, write_atomic
from galley_launch.job import finish
from galley_launch.local import runner
from galley_launch.plan import resume
from galley_launch.recipe import paths
from galley_launch.report import history, page
from galley_launch.report.rows import read_curves
from galley_launch.runs import runs, table, why
from launch import fakes

__all__ = ["slurm_fakes"]

MESSAGE = "export: model is not verified: layer 1 differs; it is in x/export.unverified, whose README says how"
EXPORT = (
    "(run / 'export.unverified' / 'model').mkdir(parents=True);"
    "(run / 'export.unverified' / 'export.json').write_text('{\"checks\": [], \"step\": 9}');"
    f"fail('export', {UNVERIFIED}, {MESSAGE!r})"
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "x")


def start(run: RunDir, **scripts: str) -> int:
    made = fakes.spec(run.root)
    return runner.start(made, run, fakes.make(made, run, **scripts))


def test_all_say_that_the_export_is_not_verified(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(run, export=EXPORT) == 1
    assert capfd.readouterr().err == f"galley: run x is trained, but not verified: {MESSAGE}\n"
    end = json.loads(run.attempt(1).exit.read_text())
    assert (end["verdict"], end["exported"], end["unverified"], end["export_error"]) == ("done", False, True, MESSAGE)
    state = runs.state(run)
    assert (state.state, state.message) == ("unverified", MESSAGE)
    told = table.details(state, fakes.spec(run.root), run.root)
    assert any(line.split() == ["unverified", str(run.unverified)] for line in told)
    lines = why.lines(run)
    assert lines[0] == "run x failed in export: the export could not be verified"
    assert any("layer 1 differs" in line for line in lines)
    assert any("export.unverified" in line and "README" in line for line in lines)
    assert not any("a setting" in line for line in lines)
    text, _ = page.export(run, history.attempt_histories(run, read_curves(run.metrics), False, True, 0.0))
    assert text == f"Step 9 was exported, but is not verified: model in {run.unverified / 'model'}"


def test_an_export_that_succeeds_later_ends_that(run: RunDir) -> None:
    assert start(run, export=EXPORT) == 1
    assert not resume.is_exported(run)
    assert start(run, prepare="sys.exit(1)", train="sys.exit(1)") == 0
    assert runs.state(run).state == "done"
    assert why.lines(run) == ["run x did not fail: it is done"]
    end = json.loads(run.attempt(1).exit.read_text())
    assert end["exported"] is True
    assert not {"unverified", "export_error"} & end.keys()


def test_an_export_that_raised_is_no_done_run_either(run: RunDir) -> None:
    assert start(run, export="fail('export', 1, 'ValueError: no')") == 1
    state = runs.state(run)
    assert state.state == "unexported"
    assert "ValueError: no" in state.message
    assert why.lines(run)[0].startswith("run x failed in export")


def test_another_run_does_not_start_from_it_unasked(run: RunDir) -> None:
    run.root.mkdir()
    run.spec.write_text("{}")
    for place in (run.export, run.unverified):
        (place / "model").mkdir(parents=True)
        (place / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not verified .*use model.path=\S+/export.unverified/model or model.path="):
        paths.exported_model("x", run.root.parent)
    (run.unverified / "model" / "config.json").unlink()
    assert paths.exported_model("x", run.root.parent) == str(run.export / "model")


def test_a_cluster_says_the_same(run: RunDir) -> None:
    attempt = attempted(run, 1, said={"verdict": "done"})
    error = {"who": "export", "status": UNVERIFIED, "message": MESSAGE, "time": 1.0}
    attempt.error("export").parent.mkdir(parents=True, exist_ok=True)
    write_atomic(attempt.error("export"), json.dumps(error))
    assert finish.end_on_one_node(run, attempt, "export", UNVERIFIED) == UNVERIFIED
    assert runs.state(run).state == "unverified"
    assert runs.state(run).message == MESSAGE
    assert finish.end_on_one_node(run, attempt, "export", 0) == 0
    assert runs.state(run).state == "done"
