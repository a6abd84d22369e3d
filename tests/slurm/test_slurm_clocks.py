"""What takes Slurm's own time: grace, limits, and a controller that is gone."""

import time
from pathlib import Path

import pytest
from slurm.box import Box
from slurm.jobs import get, quiet, script

from galley_launch.job import slurm as api

pytestmark = pytest.mark.cluster_slow


def test_preemption_shows_while_the_job_still_runs(slurm: Box, tmp_path: Path) -> None:
    path = script(tmp_path, "sleep 300")
    again = api.submit(path, quiet(tmp_path, "-p", "low", "-N3", "--exclusive", "--requeue"))
    slurm.wait(again, "RUNNING")
    assert not get(again).preempted
    urgent = script(tmp_path, "sleep 2", "urgent"), quiet(tmp_path, "-p", "high", "-N3", "--exclusive")
    other = api.submit(*urgent)
    end = time.monotonic() + 10
    while not get(again).preempted and time.monotonic() < end:
        time.sleep(0.1)
    chosen = get(again)
    assert (chosen.state, chosen.preempted) == ("RUNNING", True)
    assert (api.now_left(chosen) or 99) <= 10  # the partition's grace time
    slurm.wait(other, "COMPLETED")
    requeued = get(again)
    assert (requeued.state, requeued.preempted, requeued.restarts) == ("PENDING", False, 1)

    ended = api.submit(path, quiet(tmp_path, "-p", "spot", "-N3", "--exclusive"))
    slurm.wait(ended, "RUNNING")
    api.submit(*urgent)
    slurm.wait(ended, "PREEMPTED")
    assert (get(ended).preempted, get(ended).is_over(), get(ended).exit_status) == (True, True, None)


def test_a_time_limit(slurm: Box, tmp_path: Path) -> None:
    job_id = api.submit(script(tmp_path, "sleep 300"), quiet(tmp_path, "-t", "1"))
    slurm.wait(job_id, "TIMEOUT", timeout=150)
    assert (get(job_id).exit_status, get(job_id).reason, get(job_id).limit_s) == (None, "TimeLimit", 60)


def test_no_controller(slurm: Box, tmp_path: Path) -> None:
    job_id = api.submit(script(tmp_path, "sleep 300"), quiet(tmp_path))
    slurm.wait(job_id, "RUNNING")
    slurm.cluster("kill-ctld")
    with pytest.raises(api.SlurmError, match=r"^squeue: no answer from Slurm within 10 s$"):
        api.job(job_id)
    with pytest.raises(api.SlurmError, match=r"^sbatch: .*Unable to contact slurm controller"):
        api.submit(tmp_path / "job.sh", quiet(tmp_path))
    with pytest.raises(api.SlurmError, match=r"^scontrol: no answer from Slurm's controller$"):
        api.update(job_id, TimeLimit="60")
    with pytest.raises(api.SlurmError, match=r"^scancel: .*Unable to contact slurm controller"):
        api.cancel([job_id])
    slurm.cluster("start-ctld")
    assert get(job_id).state == "RUNNING"
