"""Time limits, pre-emption, and a controller that is away."""

from __future__ import annotations

import itertools
import time

import pytest
from slurm.runs import Kitchen, Submitted, assert_sound

from galley_launch.job import chain

pytestmark = [pytest.mark.cluster_slow, pytest.mark.timeout(1800)]
DONE = ("done", "finished", "")


def test_a_time_limit_of_two_minutes(kitchen: Kitchen) -> None:
    alone = kitchen.losses("slow", 2)
    made = kitchen.submit("slow", "cluster.time=2")
    made.wait_trained(timeout=1500)
    endings = made.endings()
    assert len(endings) >= 3, made.story()
    assert endings == [("stopped", "walltime", "")] * (len(endings) - 1) + [DONE], made.story()
    resumed = made.resumed_from()
    assert all(before < after for before, after in itertools.pairwise(resumed)), resumed
    # each saved where it was asked to; none lost a step
    assert [made.facts(number)["checkpoint"] for number in range(1, len(endings) + 1)] == resumed
    assert_sound(made, alone)


def take_nodes(kitchen: Kitchen, made: Submitted) -> str:
    """A more important job for the very nodes of attempt 1."""
    nodes = ",".join(made.facts(1)["nodes"])
    options = ("-p", "high", "-w", nodes, "--exclusive", "-t", "5", "-o", "/dev/null", "--wrap", "sleep 8")
    return kitchen.box.sh("sbatch", "--parsable", *options).strip()


@pytest.mark.parametrize("words", [("spot", "false"), ("low", "false"), ("low", "true")], ids="-".join)
def test_preemption(kitchen: Kitchen, words: tuple[str, str]) -> None:
    alone = kitchen.losses("long", 2)
    partition, requeue = words
    made = kitchen.submit("long", f"cluster.partition={partition}", f"cluster.requeue={requeue}")
    made.wait_step(10)
    other = take_nodes(kitchen, made)
    kitchen.box.wait(other, "COMPLETED", timeout=120)
    for job in chain.live(made.run, ["train"]):
        if job.reason == "BeginTime":
            kitchen.box.begin_now(job.id)
    made.wait_trained()
    assert made.endings() == [("stopped", "preemption", ""), DONE], made.story()
    assert made.resumed_from()[1] >= 10, "it saved in the time of grace"
    assert_sound(made, alone)


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_the_controller_restarts(kitchen: Kitchen, signal: str) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long")
    made.wait_step(10)
    time.sleep(6)  # Slurm writes its state every five seconds
    kitchen.box.cluster("kill-ctld", signal)
    time.sleep(3)
    kitchen.box.cluster("start-ctld")
    made.wait_trained()
    assert made.endings() == [DONE], made.story()
    assert_sound(made, alone)


def test_the_controller_is_away_as_training_ends(kitchen: Kitchen) -> None:
    made = kitchen.submit("long")
    made.wait_step(10)
    time.sleep(6)
    kitchen.box.cluster("kill-ctld")
    made.wait("the end of training", lambda: made.endings() == [DONE], timeout=90)
    time.sleep(10)
    kitchen.box.cluster("start-ctld")
    made.wait_over()
    assert made.endings() == [DONE], made.story()
    assert (made.run.export / "model" / "config.json").is_file(), made.story()
