"""Ranks use the operators that prepare compiled, on nodes that have neither a compiler nor ninja."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import Train, make_documents, make_spec, metrics, rank_logs, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.ranks.operators import ADAM, build_operators, folder, library

pytestmark = pytest.mark.slow
LONG = pytest.mark.long

SAMPLES = [[document] for document in make_documents(16)]


def make_run(root: Path, model: Path) -> tuple[RunDir, RunSpec]:
    run = RunDir(root)
    spec = make_spec(run, model, stage=3, offload=True, steps=3)
    write_data(run, model, SAMPLES, None, packed=False)
    return run, spec


def copy_operators(target: Path) -> Path:
    """As a job copies them to a node."""
    for path in folder().glob("*/*.so"):
        copy = target / path.relative_to(folder())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return target


def bare_python(root: Path) -> Path:
    """This interpreter, with nothing else beside it: where its own folder comes first on ``PATH``, ninja is not."""
    (root / "bin").mkdir(parents=True)
    (root / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (root / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    return root / "bin" / "python"


def train_bare(root: Path, run: RunDir, **env: Path) -> int:
    """Train with one fresh rank that finds no program at all on its ``PATH``."""
    source = Path(__file__).parents[2] / "src"
    variables = {
        "PATH": str(root / "nothing"), "PYTHONPATH": os.pathsep.join([str(source), *filter(None, sys.path)]),
        "HOME": str(root), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GALLEY_STORE": str(root / f"store-{time.time_ns()}"),
    } | {name: str(path) for name, path in env.items()}  # fmt: skip
    command = [str(bare_python(root / "venv")), "-m", "galley.train", str(run.spec)]
    return subprocess.run(command, env=variables, cwd=root).returncode


@pytest.mark.parametrize("place", [pytest.param("node", marks=LONG), pytest.param("shared", marks=LONG), "nowhere"])
def test_ranks_need_no_compiler(tmp_path: Path, llama: Path, train: Train, place: str) -> None:
    """With offload, for CPU Adam; shared-memory communication is loaded by every rank on a CPU."""
    run, spec = make_run(tmp_path / "run", llama)
    build_operators(spec)
    copy, empty = copy_operators(tmp_path / "operators"), tmp_path / "empty"
    if place == "nowhere":
        assert train_bare(tmp_path, run, TORCH_EXTENSIONS_DIR=empty) == 1
        assert "ninja" in run.attempt(1).errors()[0]["message"], "the test's own assumption: there is none"
        return
    places = {
        "node": {"GALLEY_OPERATORS": copy, "TORCH_EXTENSIONS_DIR": empty},
        "shared": {"TORCH_EXTENSIONS_DIR": copy},
    }
    assert train_bare(tmp_path, run, **places[place]) == 0, rank_logs(run)
    assert "deepspeed_shm_comm_op built successfully" in run.attempt(1).log("rank-0").read_text()
    assert not list(tmp_path.rglob("build.ninja"))
    usual, spec = make_run(tmp_path / "usual", llama)
    train(usual, spec)
    assert metrics(run) == metrics(usual)


def test_a_copy_that_cannot_be_loaded_is_passed_over(tmp_path: Path, llama: Path) -> None:
    run, spec = make_run(tmp_path / "run", llama)
    build_operators(spec)
    copy, torn = copy_operators(tmp_path / "operators"), copy_operators(tmp_path / "torn")
    for path in torn.glob("*/*.so"):
        path.write_bytes(b"no library")
    assert train_bare(tmp_path, run, GALLEY_OPERATORS=torn, TORCH_EXTENSIONS_DIR=copy) == 0, rank_logs(run)
    log = run.attempt(1).log("rank-0").read_text()
    assert f"CPU Adam in {library(torn, ADAM, 'cpu')} cannot be loaded here" in log
    assert len(metrics(run)) == 3
