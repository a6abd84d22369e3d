"""Small jobs for the tests of a live cluster, and slurm.py's view of them."""

import time
from pathlib import Path

from galley_launch.job import slurm as api


def script(folder: Path, body: str, name: str = "job") -> Path:
    path = folder / f"{name}.sh"
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    return path


def quiet(folder: Path, *options: str) -> list[str]:
    return ["-o", str(folder / "out"), *options]


def get(job_id: str) -> api.Job:
    found = api.job(job_id)
    assert found is not None
    return found


def wait_for(path: Path, content: str) -> None:
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text() == content):
        assert time.monotonic() < end, path.read_text() if path.exists() else "nothing"
        time.sleep(0.05)
