"""What ends an attempt: each time the run completes by itself, as if nothing had happened."""

from __future__ import annotations

import pytest
from slurm.runs import STEPS, Kitchen, Submitted, assert_sound

DONE = ("done", "finished", "")


@pytest.fixture
def alone(kitchen: Kitchen) -> list[float]:
    """The losses of an undisturbed run of the same recipe and as many ranks, on one box."""
    return kitchen.losses("long", 2)


def completes(made: Submitted, alone: list[float], *endings: tuple[str, str, str]) -> None:
    """The run is trained in one attempt more, and sound; ``endings`` are those of the attempts before."""
    made.wait_trained()
    assert made.endings() == [*endings, DONE], made.story()
    assert_sound(made, alone)


@pytest.mark.long
def test_a_rank_killed(kitchen: Kitchen, alone: list[float]) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    node, process = made.rank(1, 1)
    kitchen.box.cluster("on", node, "kill", "-KILL", str(process))
    end = made.wait_ended(1)
    assert end["message"].startswith(f"rank 1 on {node}"), made.story()
    assert 10 <= end["last_step"] < STEPS
    assert end["checkpoint"] == 8
    completes(made, alone, ("failed", "failure", "killed"))
    assert made.resumed_from() == [0, 8]


@pytest.mark.long
@pytest.mark.parametrize(
    "which", [0, pytest.param(1, marks=pytest.mark.cluster_slow)], ids=["the job script's", "another"]
)
def test_a_node_that_slurm_holds_for_dead(kitchen: Kitchen, alone: list[float], which: int) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    kitchen.box.fail_node(made.facts(1)["nodes"][which])
    made.wait_attempt(2)
    ending = made.endings()[0]
    # The node lives: its ranks can still save, and mostly say so before the job's script has to judge without them.
    assert ending in (("stopped", "node failure", ""), ("failed", "failure", "node")), made.story()
    completes(made, alone, ending)
    assert made.resumed_from()[1] > 8, "they saved where they were"


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [("--signal=USR1", "--batch"), pytest.param(("--signal=TERM",), marks=pytest.mark.cluster_slow)],
    ids=["script", "ranks"],
)
def test_a_signal(kitchen: Kitchen, alone: list[float], words: tuple[str, ...]) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    kitchen.box.sh("scancel", *words, made.job_of(1))
    completes(made, alone, ("stopped", "signal", ""))
    step = made.resumed_from()[1]
    assert step > 10, "it saved where it was, not where it would have"


@pytest.mark.long
def test_the_job_script_killed(kitchen: Kitchen, alone: list[float]) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    script = f"job{int(made.job_of(1)):05d}/slurm_script"
    kitchen.box.cluster("on", made.facts(1)["head"], "pkill", "-KILL", "-f", script)
    made.wait_attempt(2)
    ending = made.endings()[0]
    # the ranks have a few seconds until Slurm kills them, which mostly is enough to save
    assert ending in (("stopped", "signal", ""), ("failed", "failure", "killed")), made.story()
    completes(made, alone, ending)
