"""A stranger on another node, who knows every port of a run, can neither run code in it nor end it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from slurm.runs import Kitchen

LISTENERS = Path(__file__).parents[1] / "listeners.py"


def listening(kitchen: Kitchen, node: str) -> dict[int, str]:
    """Port to command of every Python that listens on a node, seen from that node."""
    lines = kitchen.box.cluster("on", node, "ss", "-Hltnp").stdout.splitlines()
    found = {}
    for line in lines:
        owner = re.search(r"pid=(\d+)", line)
        port = int(line.split()[3].rpartition(":")[2])
        command = ""
        if owner:
            look = f"tr '\\0' ' ' </proc/{owner[1]}/cmdline"
            command = kitchen.box.cluster("on", node, "sh", "-c", look, check=False).stdout
        found[port] = command
    return found


@pytest.mark.cluster_slow
def test_a_client_that_knows_the_ports(kitchen: Kitchen, tmp_path: Path) -> None:
    made = kitchen.submit("slow", "nodes=2", "batch.samples=32")
    made.wait_step(5)
    nodes, port = made.facts(1)["nodes"], int(made.facts(1)["port"])
    stranger = next(node for node in ("node1", "node2", "node3") if node not in nodes)
    canary = tmp_path / "canary"
    for node in nodes:
        found = listening(kitchen, node)
        assert not [command for command in found.values() if "launch_ranks" in command], "torchrun listens nowhere"
        assert port not in found, "the port that follows from the job's number"
        ours = [str(number) for number, command in found.items() if "galley" in command]
        assert ours, f"gloo's own: {found}"
        words = [sys.executable, str(LISTENERS), node, str(canary), str(port), *ours]
        told = kitchen.box.cluster("on", stranger, *words, timeout=120).stdout
        assert told.strip() == "fallen:", told
    made.wait_step(made.step() + 5)
    kitchen.galley("stop", str(made.run.root))
    made.wait_ended(1)
    assert not canary.exists()
    assert made.endings() == [("stopped", "user", "")], made.story()
    meeting = next(made.run.attempt(1).root.glob("meeting-*"))
    assert meeting.stat().st_mode & 0o777 == 0o700
