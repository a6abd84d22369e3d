"""Put an export in its place: what is verified under ``export/``, what is not under ``export.unverified/``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from galley.contract.files import follow_umask
from galley.contract.rundir import RunDir, fsync_path, write_atomic
from galley.export.checks import Facts


def publish(building: Path, run: RunDir, verified: dict[str, bool], facts: Facts) -> None:
    """Move the parts in ``building`` to where they belong. ``verified``: name of a folder there to whether it is.

    An earlier export stays until a verified part takes its place; unverified parts of earlier ones go.
    """
    unverified = building.with_name(f"{building.name}.unverified")
    shutil.rmtree(unverified, ignore_errors=True)
    for part, good in verified.items():
        if not good:
            unverified.mkdir(exist_ok=True)
            (building / part).rename(unverified / part)
    for target, folder in ((run.unverified, unverified), (run.export, building)):
        if any(folder.glob("*")):
            write_atomic(folder / "export.json", json.dumps(facts, indent=1))
            _swap_in(folder, target)
        elif target == run.unverified:
            shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(building, ignore_errors=True)


def _swap_in(folder: Path, target: Path) -> None:
    """Put what was built in the place of an earlier export, which is there until then."""
    follow_umask(folder)
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)
    before = target.with_name(f".{target.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():  # rename(2) replaces no directory that has files in it
        target.rename(before)
    folder.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(before, ignore_errors=True)
