"""Two attempts at once, as after a network cut: the earlier one changes nothing that the later one reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import Checkpoint, RunDir
from galley.contract.spec import RunSpec

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(16)]
STEPS = 2
NOTICE = "attempt 1 is superseded"


def make_run(root: Path, model: Path) -> RunDir:
    """Two steps, each saved, the first pruned after the second; each start is a new attempt."""
    run = RunDir(root)
    make_spec(run, model, stage=2, steps=STEPS, cadence={"save_every": 1, "keep": 1})
    write_data(run, model, SAMPLES, None, packed=False)
    run.begin_attempt()
    return run


def shared(run: RunDir, pid: int) -> dict[str, tuple[int, int, int]]:
    """Everything but what is the own of the first attempt, process ``pid``: each file's inode, size and time."""
    own = (run.attempt(1).root, *(run.root / "checkpoints").glob(".attempt-0001-*"))
    own += tuple(run.tensorboard.glob(f"events.out.tfevents.*.{pid}.*"))
    paths = [path for path in run.root.rglob("*") if path.is_file() and not any(map(path.is_relative_to, own))]
    stats = {str(path): path.stat() for path in paths if path.name != "log"}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def content(run: RunDir) -> dict[str, bytes]:
    """The tensors of the last checkpoint, which must be the same to the bit."""
    return {path.name: path.read_bytes() for path in run.checkpoint(STEPS).root.glob("*.safetensors")}


def paused(pid: int) -> bool:
    """Wait until a process stops itself (True) or ends (False)."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state in "TZ":
            return state == "T"
        time.sleep(0.005)


def pause_at(faulty: Ranks, run: RunDir, number: int) -> int:
    """Start the first attempt, which stops itself before its file operation ``number``."""
    fault = {"GALLEY_FAULT_AT": f"{number}-pause", "GALLEY_FAULT_DIR": "/checkpoints", "GALLEY_ATTEMPT": "1"}
    pid = faulty.start("galley.train.train:main", [str(run.spec)], 1, run.root / "log", fault)[0]
    assert paused(pid), number
    return pid


def count(faulty: Ranks, run: RunDir) -> int:
    """File operations of a run that nothing disturbs."""
    fault = {"GALLEY_FAULT_COUNT": str(run.root / "count"), "GALLEY_FAULT_DIR": "/checkpoints"}
    assert faulty.run("galley.train.train:main", [str(run.spec)], 1, run.root / "log", fault) == [0]
    return (run.root / "count").stat().st_size


def is_whole(run: RunDir) -> bool:
    """Whether a checkpoint lacks nothing but its name."""
    staged = [Checkpoint(path) for path in (run.root / "checkpoints").glob(".attempt-0001-*")]
    return any(each.verifies() for each in staged)


def start(ranks: Ranks, run: RunDir) -> None:
    """Run the newest attempt to its end."""
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, run.root / "log") == [0]


def let_go(faulty: Ranks, run: RunDir, pid: int) -> bool:
    """Let the paused first attempt go on to its end; returns whether it published a checkpoint."""
    stood = len(run.checkpoints())
    os.kill(pid, signal.SIGCONT)
    assert faulty.wait() == [0]
    assert NOTICE in run.attempt(1).log("rank-0").read_text()
    assert not run.attempt(1).exit.exists()
    return len(run.checkpoints()) > stood


@pytest.mark.long
def test_a_later_attempt_has_ended_meanwhile(tmp_path: Path, llama: Path, ranks: Ranks, faulty: Ranks) -> None:
    """The first attempt is paused before each of its file operations, and the second one runs to its end."""
    whole = make_run(tmp_path / "whole", llama)
    nameless = 0
    for number in range(1, count(faulty, whole) + 1):
        run = make_run(tmp_path / f"paused-{number}", llama)
        pid = pause_at(faulty, run, number)
        nameless += is_whole(run)
        run.begin_attempt()
        start(ranks, run)
        before = shared(run, pid)
        let_go(faulty, run, pid)
        assert shared(run, pid) == before, number
        assert (metrics(run), content(run)) == (metrics(whole), content(whole)), number
        assert [each.step for each in run.checkpoints()] == [STEPS]
        shutil.rmtree(run.root)
    assert nameless == 2 * STEPS, "before the fsync and before the rename of each whole directory"


@pytest.mark.long
def test_a_later_attempt_has_begun_meanwhile(tmp_path: Path, llama: Path, ranks: Ranks, faulty: Ranks) -> None:
    """The first attempt is paused before each of its file operations, and ends before the second one looks."""
    whole = make_run(tmp_path / "whole", llama)
    published = 0
    for number in range(1, count(faulty, whole) + 1):
        run = make_run(tmp_path / f"paused-{number}", llama)
        pid = pause_at(faulty, run, number)
        run.begin_attempt()
        published += let_go(faulty, run, pid)
        start(ranks, run)
        assert (metrics(run), content(run)) == (metrics(whole), content(whole)), number
        assert os.listdir(run.root / "checkpoints") == [f"step-{STEPS:06d}"]  # noqa: PTH208
        shutil.rmtree(run.root)
    assert published == STEPS, "paused between the last look and the rename, and nowhere else"


@pytest.mark.parametrize("world", [1, 2])
def test_a_later_attempt_ends_training_without_a_save(tmp_path: Path, llama: Path, ranks: Ranks, world: int) -> None:
    run = RunDir(tmp_path)
    make_spec(run, llama, world=world, steps=100_000)
    write_data(run, llama, SAMPLES, None, packed=False)
    run.begin_attempt()
    ranks.start("galley.train.train:main", [str(run.spec)], world, tmp_path / "log", {"GALLEY_ATTEMPT": "1"})
    while not run.metrics.exists() or not metrics(run):
        time.sleep(0.01)
    run.begin_attempt()
    assert ranks.wait() == [0] * world
    assert not (run.root / "checkpoints").exists()
    assert not run.attempt(1).exit.exists()
    assert run.attempt(1).errors() == []
    for rank in range(world):
        assert NOTICE in run.attempt(1).log(f"rank-{rank}").read_text()


def test_a_later_attempt_ends_an_evaluation(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run = RunDir(tmp_path)
    make_spec(run, llama, world=2, steps=4, cadence={"eval_every": 2})
    write_data(run, llama, SAMPLES, [[document] for document in make_documents(20_000)], packed=False)
    run.begin_attempt()
    ranks.start("galley.train.train:main", [str(run.spec)], 2, tmp_path / "log", {"GALLEY_ATTEMPT": "1"})
    while not run.metrics.exists() or len(metrics(run)) < 2:
        time.sleep(0.005)
    time.sleep(0.2)
    run.begin_attempt()
    assert ranks.wait() == [0, 0]
    assert NOTICE in run.attempt(1).log("rank-0").read_text()
    assert (len(metrics(run)), metrics(run, "held_out_loss")) == (2, [])
    assert not (run.root / "checkpoints").exists()


def test_an_attempt_that_comes_too_late_drops_no_rows(tmp_path: Path, llama: Path, ranks: Ranks, train: Train) -> None:
    """Its ranks may have needed long to load the model."""
    run = make_run(tmp_path, llama)
    run.begin_attempt()
    train(run, RunSpec.read(run.spec))
    shutil.rmtree(run.checkpoint(STEPS).root)  # so that the first would start over, and drop every row
    before = shared(run, pid=0)
    env = {"GALLEY_ATTEMPT": "1"}
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log", env) == [0]
    assert NOTICE in run.attempt(1).log("rank-0").read_text()
    assert shared(run, pid=0) == before


def save_twice(argv: list[str]) -> int:
    """Run on each rank: save a step that stands, as when another attempt was quicker."""
    from galley.checkpoint.checkpoint import State
    from galley.checkpoint.saving import Writer
    from galley.data.prepared import TRAIN, open_split, read_manifest
    from galley.engine import engine
    from galley.model import model
    from galley.objective import sft
    from galley.objective.probes import measure
    from galley.ranks.world import join

    run = RunDir(Path(argv[0]).parent)
    spec = RunSpec.read(argv[0])
    world = join(spec.placement)
    made = engine.build(model.load(spec, read_manifest(run), world.device), spec)
    probes = measure(sft, made, open_split(run, TRAIN), world.device)
    writer = Writer(run, run.attempt(1), world, made, keep=1)
    for tokens in (1, 2):
        writer.begin(State(step=1, tokens=tokens), probes)
        assert writer.finish()
    return 0


def test_a_checkpoint_that_stands_is_not_replaced(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run = make_run(tmp_path, llama)
    make_spec(run, llama, world=2)
    assert ranks.run("test_fence:save_twice", [str(run.spec)], 2, tmp_path / "log") == [0, 0]
    assert os.listdir(run.root / "checkpoints") == ["step-000001"]  # noqa: PTH208
    assert json.loads(run.checkpoint(1).manifest.read_text())["state"]["tokens"] == 1
