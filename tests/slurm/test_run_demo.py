"""The demo's recipe, a pretrained model, on two nodes of two ranks: as a user's first run on a cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest
from slurm.runs import ROOT, Kitchen, losses, rows

from galley.contract.rundir import RunDir
from galley_launch.recipe.paths import cache

pytestmark = [pytest.mark.cluster_slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's model, from where the demo has it."""
    look = f"import sys; sys.path.insert(0, {str(ROOT / 'demo')!r}); import model; from pathlib import Path; "
    look += "from galley.contract.rundir import RunDir; "
    look += f"print(model.find(RunDir(Path('none')), Path({str(cache() / 'demo')!r}))[0])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_the_demo(kitchen: Kitchen, smollm: str, zero: str) -> None:
    words = (f"model.path={smollm}", f"deepspeed={zero}", "micro_batch=1", "cluster.ranks_per_node=2")
    made = kitchen.submit(str(ROOT / "recipes" / "demo"), *words, "cluster.time=60")
    follower = subprocess.Popen(
        [sys.executable, "-m", "galley_launch", "logs", str(made.run.root)],
        cwd=kitchen.folder, env=kitchen.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    told = follower.communicate(timeout=3000)[0]
    assert follower.returncode == 0, told
    made.wait_over()
    assert made.endings() == [("done", "finished", "")], made.story()
    for text in ("data: ready", "step 1/", "held-out loss", "exported"):
        assert text in told
    held_out = [row["held_out_loss"] for row in rows(made.run) if "held_out_loss" in row]
    assert losses(made.run)[0] > 0.5
    assert held_out[-1] < 0.2, held_out
    assert (made.run.export / "model" / "model.safetensors").is_file()
    assert (made.run.export / "adapter" / "adapter_config.json").is_file()
    assert RunDir(made.run.root).checkpoints()
