"""What cannot run: one line that says so before anything is queued or written, exit status 2."""

from __future__ import annotations

import pytest
from slurm.runs import Kitchen


def refused(kitchen: Kitchen, *words: str) -> str:
    """What ``galley submit`` says, which must be one line, and leave nothing behind."""
    status, out, err = kitchen.galley(
        "submit", "tiny.yaml", "cluster=box.yaml", "name=refused", "duration.steps=60", *words
    )
    assert (status, out) == (2, ""), out + err
    assert err.startswith("galley: ")
    assert len(err.splitlines()) == 1, err
    assert not (kitchen.folder / "runs" / "refused").exists()
    assert kitchen.box.sh("squeue", "-h", "-a") == ""
    return err.removeprefix("galley: ").strip()


HAS = "3 nodes of 8 cores, 62 GB, 4 h100 GPUs"
TRAIN, PREPARE = "Slurm refuses the train job", "Slurm refuses the prepare job"
TOO_MUCH = "sbatch: allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=4"], f"nodes: {TRAIN} (--nodes=4 --cpus-per-task=1 --mem=2048M): {TOO_MUCH}"),
        (
            ["nodes=2", "cluster.memory_per_rank=90G"],
            f"cluster.memory_per_rank: {TRAIN} (--nodes=2 --cpus-per-task=1 --mem=92160M): {TOO_MUCH}",
        ),
        (
            ["cluster.side.memory=90G"],
            f"cluster.side.memory: {PREPARE} (--nodes=1 --cpus-per-task=1 --mem=90G): {TOO_MUCH}",
        ),
        (
            ["cluster.device=cuda", "cluster.ranks_per_node=5", "batch.samples=10"],
            f"cluster.gpus_per_node: {TRAIN} (--nodes=1 --gpus-per-node=5 --cpus-per-task=5 --mem=10240M): {TOO_MUCH}",
        ),
    ],
    ids=["nodes", "memory", "side", "gpus"],
)
def test_an_impossible_request(kitchen: Kitchen, words: list[str], said: str) -> None:
    line = refused(kitchen, *words)
    assert line.startswith(said)
    assert line.endswith(f"; partition main is up and has {HAS}; ask for what there is (galley clusters)")


def test_a_feature_that_no_node_has(kitchen: Kitchen) -> None:
    said = f"cluster.constraint: {TRAIN} (--constraint=b200): sbatch: allocation failure: Invalid feature"
    assert refused(kitchen, "cluster.constraint=b200").startswith(said)


def test_drained_nodes(kitchen: Kitchen) -> None:
    kitchen.box.sh("scontrol", "update", "NodeName=node[2-3]", "State=DRAIN", "Reason=fan")
    line = refused(kitchen, "nodes=2")
    assert f"has {HAS}, 2 of them drained or down (sinfo -R); ask for what there is" in line


def test_an_unknown_partition(kitchen: Kitchen) -> None:
    line = refused(kitchen, "cluster.partition=fast")
    assert line.startswith("cluster.partition: no partition 'fast' (sbatch: ")
    assert line.endswith("; there are main, high, low, spot")


def test_no_environment(kitchen: Kitchen) -> None:
    line = refused(kitchen, "cluster.venv=/nowhere")
    assert line.startswith("cluster.venv: no Python at /nowhere/bin/python; ")


@pytest.mark.cluster_slow
def test_a_slurm_that_does_not_answer(kitchen: Kitchen) -> None:
    kitchen.box.cluster("kill-ctld")
    status, out, err = kitchen.galley(
        "submit", "tiny.yaml", "cluster=box.yaml", "name=refused", "duration.steps=60", timeout=120
    )
    kitchen.box.cluster("start-ctld")
    assert (status, out) == (2, ""), out + err
    assert err.startswith("galley: slurm: sbatch: ")
    assert err.endswith("; see that Slurm answers here: sinfo\n")
    assert len(err.splitlines()) == 1, err
    assert not (kitchen.folder / "runs" / "refused").exists()
