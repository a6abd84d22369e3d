"""Optimizer state on a disk: the same numbers as in memory, in checkpoints too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy
from ranks import Ranks
from safetensors import safe_open
from toy import Train, make_documents, make_spec, metrics, rank_logs, write_data

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.ranks import operators
from galley.storage.cache import digest

pytestmark = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(16)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with tensors that DeepSpeed takes to be worth a disk: a mebibyte or more for each rank."""
    return toy.make_model(tmp_path_factory.mktemp("wide"), hidden=192, intermediate_size=1536)


def spec_of(run: RunDir, model: Path, world: int, disk: Path | None, **more: Any) -> RunSpec:
    """State in files of ``disk``, in sub-groups of a million weights or so; None: in memory."""
    zero: dict[str, Any] = {"sub_group_size": 700_000}
    if disk:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(disk), "pin_memory": False}
    settings: dict[str, Any] = {"dtype": "bfloat16", "steps": 4, "cadence": {"save_every": 2}} | more
    spec = make_spec(run, model, stage=3, offload=True, world=world, micro=1, zero=zero, **settings)
    write_data(run, model, SAMPLES, None, packed=False)
    operators.build_operators(spec)
    return spec


@pytest.mark.parametrize("world", [1, 2])
def test_state_on_a_disk(tmp_path: Path, wide: Path, train: Train, world: int) -> None:
    plain, run, disk = RunDir(tmp_path / "plain"), RunDir(tmp_path / "run"), tmp_path / "disk"
    train(plain, spec_of(plain, wide, world, None))
    spec = spec_of(run, wide, world, disk)
    train(run, spec)
    assert metrics(run) == metrics(plain)
    assert metrics(run, "grad_norm") == metrics(plain, "grad_norm")
    files = sorted(run.checkpoint(4).root.glob("rank-00000-*.safetensors"))
    assert len(files) > 2, "nothing was swapped"
    with safe_open(files[0], "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"weight", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
    assert not list(disk.iterdir()), "what was swapped stayed behind"
    run.checkpoint(4).manifest.unlink()  # go on from step 2
    train(run, spec)
    assert metrics(run) == metrics(plain)


def test_to_memory_and_back(tmp_path: Path, wide: Path, train: Train) -> None:
    plain, run = RunDir(tmp_path / "plain"), RunDir(tmp_path / "run")
    train(plain, spec_of(plain, wide, 2, None))
    for begin, world, disk in ((0, 2, tmp_path / "disk"), (2, 1, None), (2, 2, tmp_path / "disk")):
        for later in (each for each in run.checkpoints() if each.step > begin):
            later.manifest.unlink()
        train(run, spec_of(run, wide, world, disk))
        assert metrics(run) == pytest.approx(metrics(plain), rel=1e-3)


def test_a_place_that_cannot_be_written_to(tmp_path: Path, wide: Path, ranks: Ranks) -> None:
    run = RunDir(tmp_path / "run")
    spec_of(run, wide, 1, Path("/proc/none"))
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, run.root / "ranks.log") == [2]
    assert "deepspeed offload_optimizer: '/proc/none' does not do for direct access" in rank_logs(run)


def test_memory_that_may_not_be_locked() -> None:
    """Of root too, once it lacks the capability: DeepSpeed itself would only abort."""
    ask = f"import sys; sys.path[:0] = {sys.path!r}; from galley.engine.swap import may_lock; print(may_lock(1 << 20))"
    command = ["prlimit", "--memlock=65536", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    for words, answer in (([], "True"), (command, "False")):
        done = subprocess.run([*words, sys.executable, "-c", ask], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == answer


def test_what_a_killed_attempt_left(tmp_path: Path, wide: Path, train: Train) -> None:
    run = RunDir(tmp_path / "run")
    spec = spec_of(run, wide, 1, None, steps=1)
    spec.placement.deepspeed["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "pin_memory": False}
    run.spec.write_text(spec.to_json())
    for rank in (0, 5):
        (run.root / "swap" / f"galley-swap-{digest(str(run.root))}-{rank}" / "zero_stage_3").mkdir(parents=True)
    operators.build_operators(spec)
    train(run, spec)
    assert not list((run.root / "swap").iterdir())


def test_without_libaio(tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails stands for one that finds no headers."""
    spec = spec_of(RunDir(tmp_path / "run"), wide, 1, tmp_path / "disk")
    known, bare = operators.folder(), tmp_path / "operators"
    bare.mkdir()
    for made in known.glob("*-cpu-*"):
        if not made.name.startswith(operators.ASYNC_IO):
            shutil.copytree(made, bare / made.name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(bare))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="asynchronous file access, which offload to NVMe needs, cannot be compiled"):
        operators.build_operators(spec)


def test_ranks_need_no_compiler(tmp_path: Path, llama: Path) -> None:
    from train.test_operators import copy_operators, make_run, train_bare

    run, spec = make_run(tmp_path / "run", llama)
    spec.placement.deepspeed["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "pin_memory": False}
    run.spec.write_text(spec.to_json())
    operators.build_operators(spec)
    places = {"GALLEY_OPERATORS": copy_operators(tmp_path / "operators"), "TORCH_EXTENSIONS_DIR": tmp_path / "empty"}
    assert train_bare(tmp_path, run, **places) == 0, rank_logs(run)
    assert not list(tmp_path.rglob("build.ninja"))
