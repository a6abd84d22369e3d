"""Ranks find each other, or say in good time which of them could not."""

from __future__ import annotations

import atexit
import os
import platform
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
from ranks import Ranks
from toy import make_documents, make_spec, rank_logs, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(16)]


def make_run(root: Path, model: Path, world: int) -> RunDir:
    run = RunDir(root)
    make_spec(run, model, world=world, steps=2)
    write_data(run, model, SAMPLES, None, packed=False)
    return run


def lose_the_last(argv: list[str]) -> int:
    """Run on each rank: the last one stops dead once all have met, as when its network is cut."""
    from galley.ranks import world
    from galley.train import train

    world.REACH = 2.0
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        world._connect = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    status = train.main(argv)
    atexit._run_exitfuncs()  # what the interpreter does at its end
    return 10 + status


def test_a_rank_that_does_not_answer_ends_the_others_in_time(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run = make_run(tmp_path, llama, world=4)
    started = time.monotonic()
    pids = ranks.start("test_join:lose_the_last", [str(run.spec)], 4, tmp_path / "log")
    while len(run.attempt(1).errors()) < 3:
        assert time.monotonic() < started + 15, rank_logs(run)
        time.sleep(0.05)
    os.kill(pids[3], signal.SIGKILL)
    assert ranks.wait() == [1, 1, 1, -signal.SIGKILL], "a thread that still waits holds none of them up"
    errors = {each["who"]: each for each in run.attempt(1).errors()}
    for rank in range(3):
        message, host = errors[f"rank-{rank}"]["message"], platform.node()
        assert f"rank {rank} on {host}: ranks could not reach each other within 2 s" in message
        assert len(message.splitlines()) == 1
        assert errors[f"rank-{rank}"]["host"] == host


def be_late(argv: list[str]) -> int:
    """Run on each rank: the last one comes late, and is late once more afterwards."""
    from galley.ranks import world

    world.REACH = 2.0
    spec, late = RunSpec.read(argv[0]), os.environ["RANK"] == "1"
    time.sleep(3 * late)
    joined = world.join(spec.placement)
    time.sleep(3 * late)
    return 0 if joined.gather(joined.rank) == [0, 1] and joined.sum(2.0) == [4.0] else 1


def test_ranks_are_waited_for_before_they_join_and_in_every_collective(
    tmp_path: Path, llama: Path, ranks: Ranks
) -> None:
    run = make_run(tmp_path, llama, world=2)
    started = time.monotonic()
    assert ranks.run("test_join:be_late", [str(run.spec)], 2, tmp_path / "log") == [0, 0], rank_logs(run)
    assert time.monotonic() - started > 6


def meet_on(argv: list[str]) -> int:
    """Run on each rank: meet, saying that rank N is on the N-th GPU of ``argv``."""
    import torch
    from torch.distributed import FileStore

    from galley.contract.errors import UserError
    from galley.ranks.world import World, meet

    rank = int(os.environ["RANK"])
    store = FileStore(os.environ["GALLEY_STORE"], -1)
    store.set_timeout(timedelta(seconds=20))
    try:
        meet(store, World(rank, len(argv), torch.device("cpu")), argv[rank])
    except UserError as error:
        print(error)
        return 2
    return 0


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        (["GPU-a of n1", "GPU-b of n1", "GPU-a of n2"], None),
        (["", "", ""], None),
        (["GPU-a of n1", "GPU-b of n1", "GPU-b of n1"], "gpus: ranks 1 and 2 are both on GPU-b of n1; "),
    ],
    ids=["own", "cpu", "shared"],
)
def test_two_ranks_on_one_gpu_are_refused_everywhere(
    tmp_path: Path, ranks: Ranks, gpus: list[str], told: str | None
) -> None:
    assert ranks.run("test_join:meet_on", gpus, 3, tmp_path / "log") == [2 if told else 0] * 3
    assert (tmp_path / "log").read_text().count(told or "ranks") == (3 if told else 0)
