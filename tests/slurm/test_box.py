"""The cluster itself: what every other test of it relies on."""

import shutil
import subprocess
from pathlib import Path

import pytest
from slurm.box import CLUSTER, Box, install


def test_the_shell_scripts_are_clean() -> None:
    if not shutil.which("shellcheck"):
        install("shellcheck")
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not here and cannot be installed")
    scripts = [CLUSTER, CLUSTER.parents[2] / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def submit(slurm: Box, folder: Path, *options: str, script: str) -> str:
    options = ("--parsable", "--open-mode=append", "-o", "out", *options)
    return slurm.sh("sbatch", *options, "--wrap", script, cwd=folder).strip()


def test_two_nodes_are_two_machines(slurm: Box, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "-N2", "--gpus-per-node=4", script="srun -N2 -l sh -c 'hostname; hostname -I'")
    slurm.wait(job, "COMPLETED")
    words = (tmp_path / "out").read_text().split()
    assert {"node1", "node2", "10.77.0.1", "10.77.0.2"} <= set(words)


def test_a_dead_node_ends_its_job_and_comes_back(slurm: Box, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--no-requeue", "-w", "node3", script="sleep 300")
    slurm.wait(job, "RUNNING")
    slurm.fail_node("node3")
    assert slurm.wait(job, "NODE_FAIL", timeout=10)["Reason"] == "NodeDown"
    slurm.reset()
    assert slurm.sh("srun", "-w", "node3", "hostname").strip() == "node3"


def test_reset_ends_jobs_that_submit_others_and_frees_drained_nodes(slurm: Box, tmp_path: Path) -> None:
    again = tmp_path / "again.sh"
    again.write_text(f"#!/bin/bash\ntrap 'sbatch -o /dev/null {again}' TERM\nsleep 300 & wait\n")
    slurm.wait(slurm.sh("sbatch", "--parsable", "-o", "/dev/null", str(again)).strip(), "RUNNING")
    slurm.sh("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
    slurm.sh("scontrol", "update", "PartitionName=main", "State=DOWN")
    slurm.reset()
    assert slurm.sh("squeue", "-h", "-a") == ""
    assert sorted(slurm.sh("srun", "-N3", "hostname").split()) == ["node1", "node2", "node3"]


def test_a_failed_wait_tells_the_whole_story(slurm: Box, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "-J", "a-name-to-find", script="exit 3")
    slurm.wait(job, "FAILED")
    with pytest.raises(AssertionError, match=r"not RUNNING after 1 s:[\s\S]*a-name-to-find[\s\S]*ExitCode=3:0"):
        slurm.wait(job, "RUNNING", timeout=1)


@pytest.mark.cluster_slow
def test_a_power_cut_requeues(slurm: Box, tmp_path: Path) -> None:
    script = "echo run ${SLURM_RESTART_COUNT:-0}; [ ${SLURM_RESTART_COUNT:-0} = 1 ] || sleep 300"
    job = submit(slurm, tmp_path, "--requeue", "-w", "node3", script=script)
    slurm.wait(job, "RUNNING")
    slurm.cluster("kill-node", "node3")
    slurm.wait(job, "PENDING", timeout=90)
    slurm.cluster("boot-node", "node3")
    slurm.begin_now(job)
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    assert (tmp_path / "out").read_text().split("\n")[:2] == ["run 0", "run 1"]
