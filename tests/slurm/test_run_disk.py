"""The disk of the runs is full: said in a line, nothing torn, and the run goes on once there is room."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.runs import Kitchen, assert_sound

from galley.contract.rundir import read_json
from galley_launch.runs import runs

pytestmark = pytest.mark.cluster_slow
DONE = ("done", "finished", "")
NODES = ("node1", "node2", "node3")
CHECKPOINT_MB = 9


@pytest.fixture
def small(kitchen: Kitchen, tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.5 GB (a job's preflight wants one) that all nodes share: one block device, mounted everywhere."""
    if not (shutil.which("mkfs.ext4") and shutil.which("losetup")):
        pytest.skip("needs mkfs.ext4 and losetup")
    image, folder = tmp_path / "image", tmp_path / "small"
    with image.open("wb") as file:
        file.truncate(1536 << 20)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    found = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"needs a loop device: {found.stderr.strip()}")
    device, mounted = found.stdout.strip(), []
    try:
        subprocess.run(["mount", device, str(folder)], check=True)
        kitchen.box.cluster("exec", "mount", device, str(folder))
        for node in NODES:
            kitchen.box.cluster("on", node, "mount", device, str(folder))
            mounted.append(node)
        yield folder
    finally:
        kitchen.box.reset()
        for node in mounted:
            kitchen.box.cluster("on", node, "umount", "-l", str(folder), check=False)
        kitchen.box.cluster("exec", "umount", "-l", str(folder), check=False)
        subprocess.run(["umount", "-l", str(folder)], check=False)
        subprocess.run(["losetup", "-d", device], check=False)


def fill(folder: Path, leave_mb: int) -> Path:
    """Write a file that leaves so much room."""
    path = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1 << 20, free - (max(leave_mb, 1) << 20)))
        with contextlib.suppress(OSError):
            while leave_mb == 0:
                os.pwrite(file.fileno(), b"\1" * 4096, file.seek(0, os.SEEK_END))
    return path


def test_no_room_for_a_checkpoint(kitchen: Kitchen, small: Path) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long", f"runs={small}")
    made.wait_step(9)
    filler = fill(small, leave_mb=CHECKPOINT_MB // 2)
    made.wait_over()
    assert made.endings() == [("failed", "failure", "disk")], made.story()
    end = read_json(made.run.attempt(1).exit) or {}
    assert "the disk is full" in end["message"], end
    assert [each.step for each in made.run.checkpoints()] == [8], "what stood is intact"
    assert runs.state(made.run).state == "failed"

    filler.unlink()
    kitchen.submit("long", f"runs={small}")
    made.wait_trained()
    assert made.resumed_from() == [0, 8]
    assert_sound(made, alone)


def test_no_room_for_a_single_byte(kitchen: Kitchen, small: Path) -> None:
    alone = kitchen.losses("long", 2)
    made = kitchen.submit("long", f"runs={small}")
    made.wait_step(9)
    filler = fill(small, leave_mb=0)
    made.wait_over()
    assert runs.state(made.run).state in ("failed", "lost"), made.story()
    assert made.endings()[-1] != DONE

    filler.unlink()
    kitchen.submit("long", f"runs={small}")
    made.wait_trained()
    assert_sound(made, alone)
