"""Nodes that die, are cut off, or hang. Slurm notices on its own clock: half a minute and more."""

from __future__ import annotations

import re
import time

import pytest
from slurm.runs import Kitchen, Submitted, assert_sound, read

from galley.contract.rundir import read_json

pytestmark = [pytest.mark.cluster_slow, pytest.mark.timeout(1800)]
DONE = ("done", "finished", "")


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_a_power_cut(kitchen: Kitchen, which: int) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long")
    made.wait_step(10)
    node = made.facts(1)["nodes"][which]
    kitchen.box.cluster("kill-node", node)
    made.wait_trained()
    assert made.endings() == [("failed", "failure", "node"), DONE], made.story()
    assert node not in made.facts(2)["nodes"]
    assert made.resumed_from() == [0, 8]
    assert_sound(made, alone)


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_a_cable_cut(kitchen: Kitchen, which: int) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long")
    made.wait_step(10)
    node = made.facts(1)["nodes"][which]
    kitchen.box.cluster("net-down", node)
    made.wait_attempt(2)
    assert node not in made.facts(2)["nodes"]
    made.wait_trained()
    kitchen.box.cluster("net-up", node)
    made.wait_over()
    assert made.endings() == [("failed", "failure", "node"), DONE], made.story()
    assert_sound(made, alone)
    assert_quiet(made, node)


def test_a_rank_that_is_cut_off_but_lives(kitchen: Kitchen) -> None:
    """It can still write, and the next attempt runs elsewhere: it must see that, and leave the run alone."""
    alone = kitchen.losses("slow", 1, "batch.samples=32")
    made = kitchen.submit("slow", "nodes=1", "batch.samples=32")
    made.wait_step(10)
    node = made.facts(1)["head"]
    kitchen.box.cluster("net-down", node)
    before = made.step()
    made.wait_attempt(2)
    assert made.facts(2)["head"] != node
    at = int(made.facts(2)["checkpoint"])
    assert at > before, "the first attempt went on, for it needs no other node"
    made.wait_trained()
    log = read(made.run.attempt(1).log("rank-0"))
    assert "superseded: a later one has taken over" in log, made.story()
    assert saved(log)[-1] <= made.resumed_from()[1], "what it saved later would be a second writer's"
    kitchen.box.cluster("net-up", node)
    made.wait_over()
    assert [end[0] for end in made.endings()] == ["failed", "done"], made.story()
    assert_sound(made, alone)
    assert_quiet(made, node)


def saved(log: str) -> list[int]:
    """The steps that a rank says it saved."""
    return [int(step) for step in re.findall(r"saved step (\d+) in", log)]


def assert_quiet(made: Submitted, node: str) -> None:
    """A node that came back ends what it still ran of the run, and the run stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in made.run.root.glob("checkpoints/*/*")}
    metrics = read(made.run.metrics)
    end = time.monotonic() + 90
    while made.box.cluster("on", node, "pgrep", "-f", "galley.train|node.sh", check=False).stdout:
        assert time.monotonic() < end, made.story()
        time.sleep(0.5)
    assert made.endings()[-1] == DONE
    assert {path: path.stat().st_mtime_ns for path in made.run.root.glob("checkpoints/*/*")} == before
    assert read(made.run.metrics) == metrics


def test_a_rank_that_stands_still(kitchen: Kitchen) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long", "cluster.patience.step=12")
    made.wait_step(10)
    node, process = made.rank(1, 1)
    kitchen.box.cluster("on", node, "kill", "-STOP", str(process))
    end = made.wait_ended(1)
    assert re.search(r"rank [01] on node\d: silent for 1\d\.\d s in step \d+", end["message"]), made.story()
    made.wait_trained()
    assert made.endings() == [("failed", "failure", "hang"), DONE], made.story()
    assert_sound(made, alone)
    # of the rank that waited for it; the one that stands still can say nothing
    assert "File " in read(made.run.attempt(1).log("rank-0"))


def test_a_cable_cut_that_slurm_does_not_notice(kitchen: Kitchen) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long", "cluster.patience.step=12")
    made.wait_step(10)
    node = made.facts(1)["nodes"][1]
    kitchen.box.cluster("net-down", node)
    hangs = made.run.attempt(1).root
    made.wait("a hang on both nodes", lambda: len(list(hangs.glob("hang-*.json"))) == 2, timeout=40)
    kitchen.box.cluster("net-up", node)
    made.wait_trained()
    ending = made.endings()[0]
    assert ending in (("failed", "failure", "hang"), ("failed", "failure", "node")), made.story()
    assert made.endings() == [ending, DONE]
    assert_sound(made, alone)


def test_a_node_whose_scratch_cannot_be_written(kitchen: Kitchen) -> None:
    scratch = kitchen.folder / "scratch"
    scratch.mkdir()
    kitchen.box.cluster("on", "node2", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(scratch))
    try:
        made = kitchen.submit("tiny", f"cluster.scratch={scratch}")
        made.wait_trained()
    finally:
        kitchen.box.cluster("on", "node2", "umount", str(scratch))
    assert_avoids(made, "node2")


@pytest.mark.parametrize("node", ["node1", "node2"], ids=["head", "other"])
def test_a_node_that_knows_no_names(kitchen: Kitchen, node: str) -> None:
    hosts = kitchen.folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    kitchen.box.cluster("on", node, "mount", "--bind", str(hosts), "/etc/hosts")
    try:
        made = kitchen.submit("tiny")
        made.wait_trained()
    finally:
        kitchen.box.cluster("on", node, "umount", "/etc/hosts")
    assert_avoids(made, node)


def assert_avoids(made: Submitted, node: str) -> None:
    """The first attempt found the node unfit, the second did without it."""
    assert made.endings() == [("failed", "preflight", "node"), DONE], made.story()
    assert list(read_json(made.run.excluded) or {}) == [node]
    assert node in (read_json(made.run.attempt(1).exit) or {})["message"]
    assert sorted(made.facts(2)["nodes"]) == sorted({"node1", "node2", "node3"} - {node})
