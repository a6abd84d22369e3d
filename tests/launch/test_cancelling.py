"""``galley cancel`` of a run on this box: it ends at once, and nothing of it is left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch.test_supervision import STUBBORN, alive

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.base import locks
from galley_launch.local import cancelling
from launch import fakes


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "x")


def test_it_ends_every_process_at_once(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train=STUBBORN)
    fakes.wait_for(run.metrics.exists)
    rank = int((run.root / "rank.pid").read_text())
    said = cancelling.cancel(run)
    assert said == "ended x; nothing was saved, and the same command goes on from there"
    assert not alive(rank)
    assert not locks.is_live(run)
    out, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 130
    assert "stopped" in out
    assert fakes.verdict(run.attempt(1))["verdict"] == "stopped"


def test_stages_whose_launcher_is_gone_are_ended_too(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train=STUBBORN)
    fakes.wait_for(run.metrics.exists)
    launcher.kill()
    launcher.communicate()
    rank = int((run.root / "rank.pid").read_text())
    assert locks.is_live(run)
    assert alive(rank)
    cancelling._PATIENCE_S, before = 0.5, cancelling._PATIENCE_S
    try:
        cancelling.cancel(run)
    finally:
        cancelling._PATIENCE_S = before
    fakes.wait_for(lambda: not alive(rank))
    assert not locks.is_live(run)


def test_a_number_that_is_another_process_by_now_is_left_alone(run: RunDir) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        launcher = fakes.launch(run.root, train=STUBBORN)
        fakes.wait_for(run.metrics.exists)
        run.lock.write_text(run.lock.read_text().replace(str(launcher.pid), str(bystander.pid)))
        cancelling._PATIENCE_S, before = 0.5, cancelling._PATIENCE_S
        cancelling.cancel(run)
        assert bystander.poll() is None
        launcher.wait(timeout=20)
    finally:
        cancelling._PATIENCE_S = before
        bystander.kill()
        bystander.wait()


def test_a_run_that_is_not_running_is_refused(run: RunDir) -> None:
    with pytest.raises(UserError, match="is not running; see galley status"):
        cancelling.cancel(run)
    launcher = fakes.launch(run.root)
    launcher.communicate(timeout=60)
    with pytest.raises(UserError, match="is not running"):
        cancelling.cancel(run)


def test_what_was_saved_is_named(run: RunDir) -> None:
    launcher = fakes.launch(run.root, train="step(3); time.sleep(60)")
    fakes.wait_for(run.metrics.exists)
    run.checkpoint(2).root.mkdir(parents=True)
    run.checkpoint(2).manifest.write_text('{"files": {}}')
    began = time.monotonic()
    assert cancelling.cancel(run).startswith("ended x; step 2 was saved before")
    assert time.monotonic() - began < 10
    assert launcher.wait(timeout=20) in (130, -signal.SIGTERM)
