"""A chain of jobs on a cluster whose controller is away for a while, or whose nodes may not submit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from slurm.runs import Kitchen, Submitted, assert_sound, read

from galley_launch.job import chain

GATE = """touch {folder}/at-$SLURM_JOB_ID
for _ in $(seq 900); do [[ -e {folder}/go-$SLURM_JOB_ID || -e {folder}/open ]] && break; sleep 0.1; done
"""
REFUSES = """#!/bin/bash
echo "Jobs cannot be submitted from this host; use a login node."
exit 1
"""


def appears(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.05)


def jobs(made: Submitted, stage: str) -> list[str]:
    return [str(each["job"]) for each in chain.submitted(made.run) if each["stage"] == stage]


def kill_a_rank(kitchen: Kitchen, made: Submitted) -> None:
    node, process = made.rank(1, 1)
    kitchen.box.cluster("on", node, "kill", "-KILL", str(process))


def undrained(kitchen: Kitchen, made: Submitted) -> bool:
    """Whether attempt 2 has begun. Slurm drains nodes whose step could not tell the controller that it had ended."""
    if "drain" in kitchen.box.sh("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False):
        kitchen.box.sh("scontrol", "update", "NodeName=node[1-3]", "State=RESUME", check=False)
    return made.run.attempt(2).job.exists()


@pytest.mark.long
def test_a_controller_that_is_away_when_the_successor_is_to_be_queued(kitchen: Kitchen, tmp_path: Path) -> None:
    """At the beginning of the attempt, and at its end once more, for somebody took the first successor away."""
    alone = kitchen.losses("long", 2)
    (tmp_path / "setup.sh").write_text(GATE.format(folder=tmp_path))
    made = kitchen.submit("long", f"cluster.setup={tmp_path}/setup.sh")
    (tmp_path / f"go-{jobs(made, 'prepare')[0]}").touch()
    first = jobs(made, "train")[0]
    appears(tmp_path / f"at-{first}", 120)
    kitchen.box.cluster("kill-ctld")
    (tmp_path / "open").touch()
    time.sleep(12)  # more than squeue's own patience: the first try has failed
    assert not made.run.attempt(1).root.exists()
    kitchen.box.cluster("start-ctld")
    made.wait_step(10)
    (second,) = jobs(made, "train")[1:]
    assert made.facts(1)["successor"] == second

    kitchen.box.sh("scancel", second)
    kitchen.box.cluster("kill-ctld")
    kill_a_rank(kitchen, made)
    appears(made.run.attempt(1).exit)
    time.sleep(12)
    assert jobs(made, "train")[1:] == [second]
    kitchen.box.cluster("start-ctld")
    made.wait("attempt 2", lambda: undrained(kitchen, made), 180)
    assert made.job_of(2) == jobs(made, "train")[2], made.story()
    made.wait_trained()
    assert [end[0] for end in made.endings()] == ["failed", "done"], made.story()
    assert_sound(made, alone)


@pytest.mark.long
def test_nodes_that_may_not_submit(kitchen: Kitchen, tmp_path: Path) -> None:
    """It is said at once, and a chain that was submitted beforehand goes on all the same, through the export."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(REFUSES)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    (tmp_path / "setup.sh").write_text(f"export PATH={tmp_path}/bin:$PATH\n")
    setup = f"cluster.setup={tmp_path}/setup.sh"
    told = kitchen.submit("long", setup, "name=told")
    told.wait_step(2)
    status = kitchen.galley("status", "told")[1]
    assert "nothing follows this attempt (sbatch: Jobs cannot be submitted from this host" in status, status
    assert "galley: chain: no job can be queued from node" in read(told.run.attempt(0).log("job"))
    kill_a_rank(kitchen, told)
    told.wait_over()
    for verb in ("status", "why"):
        said = " ".join(kitchen.galley(verb, "told")[1].split())
        assert "nothing follows (sbatch: Jobs cannot be submitted from this host" in said, said
        assert "submit again: galley submit runs/told" in said

    made = kitchen.submit("long", setup, "cluster.chain=login", "cluster.attempts=3", "name=beforehand")
    made.wait_step(10)
    kill_a_rank(kitchen, made)
    made.wait_over()
    assert [end[0] for end in made.endings()] == ["failed", "done"], made.story()
    assert json.loads((made.run.export / "export.json").read_text())
    assert (len(jobs(made, "train")), len(jobs(made, "export"))) == (3, 1)
    assert_sound(made, kitchen.losses("long", 2))
