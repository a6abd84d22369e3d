"""A run from ``galley submit`` to its exported model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.runs import ROOT, Kitchen, Submitted, assert_sound, read

DONE = ("done", "finished", "")
SENTINEL = "hf_0the0sentinel0of0the0tests0"
SECRETS = {
    "HF_TOKEN": SENTINEL, "WANDB_API_KEY": SENTINEL, "GH_PAT": SENTINEL, "MLFLOW_TRACKING_PASSWORD": SENTINEL,
    "AWS_SECRET_ACCESS_KEY": SENTINEL, "DATABASE_URL": f"postgres://ada:{SENTINEL}@db.example/x",
    "SITE": f"https://hub.example/x?token={SENTINEL}", "NOTE": SENTINEL,
}  # fmt: skip
"""What a user's environment may hold, with names that tell and names that do not."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of our own, whose training says that it is it."""
    for name in ("launch", "src", "slurm", "recipes", "ds_configs"):
        ignored = shutil.ignore_patterns("__pycache__", *(["data"] if name == "recipes" else []))
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=ignored)
    begin = tmp_path / "checkout" / "src" / "galley" / "train" / "begin.py"
    text = begin.read_text()
    assert "trainable parameters (" in text
    begin.write_text(text.replace("trainable parameters (", "trainable parameters, says the copy ("))
    return tmp_path / "checkout"


def spoil(checkout: Path) -> None:
    """Leave nothing in it that works."""
    for path in [*checkout.rglob("*.py"), *checkout.rglob("*.sh"), *checkout.rglob("*.j2")]:
        path.write_text("exit 99 # spoilt\n")


@pytest.fixture
def held(kitchen: Kitchen) -> Iterator[None]:
    """A cluster that queues jobs and starts none."""
    kitchen.box.sh("scontrol", "update", "PartitionName=main", "State=DOWN")
    yield
    kitchen.box.sh("scontrol", "update", "PartitionName=main", "State=UP")


def assert_exported(made: Submitted) -> None:
    """The export is there, and is of the last checkpoint."""
    facts = json.loads((made.run.export / "export.json").read_text())
    assert facts["step"] == made.run.checkpoints()[-1].step
    assert (made.run.export / "model" / "config.json").is_file()


def environment_of(kitchen: Kitchen, module: str) -> str:
    """The environment of a process that runs ``module`` on some node, as soon as there is one."""
    look = f"for p in $(pgrep -f '^[^ ]*python[^ ]* -m {module} '); do cat /proc/$p/environ; done"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for node in ("node1", "node2", "node3"):
            found = kitchen.box.cluster("on", node, "sh", "-c", look, check=False).stdout
            if found:
                return found
    raise AssertionError(f"no process of {module}")


@pytest.mark.long  # two minutes, most of which compile DeepSpeed's operators on nodes that have none
def test_two_nodes_of_two_ranks_from_code_that_is_spoilt_later(
    kitchen: Kitchen, held: None, checkout: Path, tmp_path: Path
) -> None:
    alone = kitchen.losses("tiny", 4, "deepspeed=zero2")
    ours = {"PYTHONPATH": f"{checkout}/launch:{checkout}/src", **SECRETS}
    ours["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    made = kitchen.submit("tiny", "cluster.ranks_per_node=2", "deepspeed=zero2", **ours)
    spoil(checkout)
    status = kitchen.galley("status", str(made.run.root))[1]
    assert "queued" in status
    assert "(prepare) pending: PartitionDown" in status
    (secrets,) = (tmp_path / "config" / "galley" / "secrets").iterdir()
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert_secret(made, status)
    kitchen.box.sh("scontrol", "update", "PartitionName=main", "State=UP")

    follower = subprocess.Popen(
        [sys.executable, "-m", "galley_launch", "logs", str(made.run.root)],
        cwd=kitchen.folder, env=kitchen.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert f"HF_TOKEN={SENTINEL}\0" in environment_of(kitchen, "galley.prepare")
    made.wait_over()
    told = follower.communicate(timeout=30)[0]
    assert follower.returncode == 0
    positions = [told.index(text) for text in ("data: ready", "says the copy", "step 8/8", "exported")]
    assert positions == sorted(positions), told

    assert made.endings() == [DONE]
    assert_sound(made, alone)
    assert_exported(made)
    assert "done" in kitchen.galley("status", str(made.run.root))[1]
    assert len(made.run.submitted.read_text().splitlines()) == 4  # prepare, train, its successor, export
    assert_secret(made, told)
    assert not secrets.exists()


def assert_secret(made: Submitted, told: str) -> None:
    """The token is in no file of the run, no log, no file of Slurm's, and nothing that Slurm shows."""
    assert SENTINEL not in told + made.told
    for folder in (made.run.root, made.box.state):
        for path in folder.rglob("*"):
            assert not path.is_file() or SENTINEL not in read(path), path
    jobs = [json.loads(line)["job"] for line in made.run.submitted.read_text().splitlines()]
    shown = [made.box.sh("scontrol", "show", "job", "--detail", job) for job in jobs]
    shown += [made.box.sh("scontrol", "write", "batch_script", job, "-", check=False) for job in jobs]
    assert "JobId=" in shown[0]
    assert SENTINEL not in "".join(shown)


@pytest.mark.cluster_slow
def test_two_nodes_of_two_ranks_under_zero3(kitchen: Kitchen) -> None:
    alone = kitchen.losses("tiny", 4, "deepspeed=zero3")
    made = kitchen.submit("tiny", "cluster.ranks_per_node=2", "deepspeed=zero3")
    made.wait_over()
    assert made.endings() == [DONE]
    assert_sound(made, alone)
    assert_exported(made)
