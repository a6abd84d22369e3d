"""One rank server and a few small models for all training tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
from ranks import Ranks

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.ranks.operators import build_operators

# Compiling what swapping needs takes minutes: make test-nvme.
NVME = [] if os.environ.get("GALLEY_NVME") == "1" else ["test_nvme.py"]
collect_ignore = NVME if importlib.util.find_spec("liger_kernel") else [*NVME, "test_liger_kernels.py"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    server = Ranks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks whose file operations can be counted, and made to kill them, to pause them or to fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    shim = tmp_path_factory.mktemp("shim") / "faults.so"
    source = Path(__file__).parents[1] / "faults" / "faults.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"], check=True)
    server = Ranks({"LD_PRELOAD": str(shim)})
    yield server
    server.close()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, tied embeddings, as small models are."""
    return toy.make_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    return toy.make_model(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


@pytest.fixture
def train(ranks: Ranks) -> toy.Train:
    """Train a run whose data and spec are written; fails with rank 0's log."""

    def run_it(run: RunDir, spec: RunSpec) -> None:
        world = spec.placement.data_parallel
        build_operators(spec)  # as prepare does: each is compiled once, not by DeepSpeed in ranks and again for others
        statuses = ranks.run("galley.train.train:main", [str(run.spec)], world, run.root / "ranks.log")
        assert statuses == [0] * world, toy.rank_logs(run)

    return run_it
