"""A user ends a run: it ends, stays ended, and goes on when it is submitted again."""

from __future__ import annotations

import time

import pytest
from slurm.runs import STEPS, Kitchen, Submitted, assert_sound

from galley_launch.runs import runs


def state(made: Submitted) -> str:
    return runs.state(made.run).state


def stays_ended(made: Submitted, attempts: int) -> None:
    """Nothing comes back in the time in which a successor would have begun."""
    made.wait_over()
    time.sleep(3)
    assert not made.live(), made.story()
    assert len(made.endings()) == attempts, made.story()


@pytest.mark.long
def test_stop_saves_and_submitting_again_goes_on(kitchen: Kitchen) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long")
    made.wait_step(10)
    status, out, err = kitchen.galley("stop", str(made.run.root))
    assert (status, err) == (0, ""), out + err
    assert "to save and stop" in out
    stays_ended(made, 1)
    assert made.endings() == [("stopped", "user", "")]
    assert state(made) == "stopped"
    saved = made.run.checkpoints()[-1].step
    assert 10 <= saved < STEPS

    kitchen.submit("long", f"name={made.run.root.name}")
    made.wait_trained()
    assert made.endings() == [("stopped", "user", ""), ("done", "finished", "")]
    assert made.resumed_from() == [0, saved]
    assert_sound(made, alone)


@pytest.mark.long
def test_scancel_by_hand(kitchen: Kitchen) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    kitchen.box.sh("scancel", made.job_of(1))
    stays_ended(made, 1)
    assert made.endings() == [("stopped", "cancel", "")]
    assert state(made) == "stopped"


@pytest.mark.long
def test_cancel(kitchen: Kitchen) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    status, out, err = kitchen.galley("cancel", str(made.run.root))
    assert status == 0, out + err
    stays_ended(made, 1)
    assert made.endings() == [("stopped", "cancel", "")]


def test_stop_before_it_trains(kitchen: Kitchen) -> None:
    kitchen.box.sh("scontrol", "update", "PartitionName=main", "State=DOWN")
    made = kitchen.submit("tiny")
    assert len(made.live()) == 2
    assert kitchen.galley("stop", str(made.run.root))[0] == 0
    stays_ended(made, 0)
