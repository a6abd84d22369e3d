"""A stage that this test adds to the table is planned, run, logged and explained like Galley's own."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from launch.fakes import PRELUDE

from galley.contract import stages
from galley.contract.rundir import RunDir
from galley.contract.stages import Stage
from galley_launch.local import runner
from galley_launch.plan import plan
from galley_launch.plan.plan import Plan
from galley_launch.runs import runs, why
from launch import fakes

COUNT = Stage("count", "count_words", state="counting")
# Stand-ins for Galley's own modules: a model would have to be trained otherwise. Ranks run under torchrun.
STUBS = {
    "stub_prepare": PRELUDE,
    "stub_train": f"{PRELUDE}\n(attempt / 'logs' / 'rank-0.log').write_text('trained\\n'); leave('done', 9)\n",
    "stub_export": f"{PRELUDE}\n{fakes.GOOD_EXPORT}\n",
}
COUNTS = f"""{PRELUDE}
from galley.contract.errors import UserError
from galley.ranks.stage import run_stage
def work(spec, run, attempt):
    print(f"counting the words of {{spec.name}}, offline: {{os.environ['HF_HUB_OFFLINE']}}", flush=True)
    if (run.root / "broken").exists():
        raise UserError("words", "there are none", "write some")
sys.exit(run_stage("count", work, sys.argv[1:]))
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``PYTHONPATH`` of stages; ``count`` stands between ``prepare`` and ``train`` in the table."""
    for name, text in (STUBS | {COUNT.module: COUNTS}).items():
        (tmp_path / f"{name}.py").write_text(text)
    prepare, train, export = (replace(stage, module=f"stub_{stage.name}") for stage in stages.STAGES)
    monkeypatch.setattr(stages, "STAGES", (prepare, COUNT, train, export))
    return f"{tmp_path}:{fakes.PYTHONPATH}"


def start(run: RunDir, path: str) -> tuple[int, Plan]:
    spec, made = fakes.spec(run.root), []

    def make(attempt: int) -> Plan:
        made.append(plan.make(spec, run, attempt, path))
        return made[-1]

    return runner.start(spec, run, make), made[-1]


def test_a_new_stage_is_planned_run_and_logged(
    tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "x")
    status, made = start(run, path)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert [stage.name for stage in made.stages] == ["prepare", "count", "train", "export"]
    assert made.stages[1].argv[1:] == ("-m", "count_words", str(run.spec))
    assert "counting the words of x, offline: 1\n" in out
    assert "run x is done" in out
    logs = runs.log_paths(run, None, None)
    assert [path.stem for path in logs] == ["job", "prepare", "count", "rank-0", "export"]
    assert logs[2].read_text() == "counting the words of x, offline: 1\n"
    assert runs.state(run).state == "done"


def test_a_new_stage_that_fails_is_explained(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "x")
    run.root.mkdir()
    (run.root / "broken").touch()
    assert start(run, path)[0] == 2
    assert capsys.readouterr().err == "galley: words: there are none; write some\n"
    state = runs.state(run)
    assert (state.state, state.message) == ("failed", "words: there are none; write some")
    told = "\n".join(why.lines(run))
    assert re.search(r"^first +count$", told, re.MULTILINE)
    assert re.search(r"^shown by +.*words: there are none", told, re.MULTILINE)
    assert re.search(r"^to do +Write some\.$", told, re.MULTILINE)


def test_what_node_sh_runs_is_the_module_of_the_table() -> None:
    assert {stage.module for stage in stages.STAGES} == {f"galley.{stage.name}" for stage in stages.STAGES}
