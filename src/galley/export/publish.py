"""Put an export in its place: what is verified under ``export/``, what is not under ``export.unverified/``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from galley.contract.rundir import RunDir, fsync_path, write_atomic
from galley.export.checks import Facts


def publish(building: Path, run: RunDir, verified: dict[str, bool], facts: Facts) -> None:
    """Move the parts in ``building`` to where they belong. ``verified``: name of a folder there to whether it is.

    An earlier export stays until a verified part takes its place; unverified parts of earlier ones go.
    """
    aside = building.with_name(f"{building.name}.unverified")
    shutil.rmtree(aside, ignore_errors=True)
    for part, good in verified.items():
        if not good:
            aside.mkdir(exist_ok=True)
            (building / part).rename(aside / part)
    for place, folder in ((run.unverified, aside), (run.export, building)):
        if any(folder.glob("*")):
            write_atomic(folder / "export.json", json.dumps(facts, indent=1))
            _swap_in(folder, place)
        elif place == run.unverified:
            shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(building, ignore_errors=True)


def _swap_in(folder: Path, place: Path) -> None:
    """Put what was built in the place of an earlier export, which is there until then."""
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)
    before = place.with_name(f".{place.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():
        place.rename(before)
    folder.rename(place)
    fsync_path(place.parent)
    shutil.rmtree(before, ignore_errors=True)
