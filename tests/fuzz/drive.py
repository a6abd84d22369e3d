"""Draw cases and judge them: ``python -m fuzz.drive COUNT [SEED [KIND …]]`` lists what fails, by kind of failure."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz import world
from fuzz.kinds import CONTROL, DATA, Kind, load

SHARES = {"recipe": 4, "words": 6, "profile": 3, "deepspeed": 3, "model": 2, "rundir": 4, "prepared_model": 2,
"gguf": 1,
          "rows": 2, "template": 1, "resumed": 2}  # fmt: skip


def base(root: Path, kinds: list[str]) -> Path:
    """The valid folder, with runs whose spec this Galley itself composed, for cases of ``kinds``."""
    if set(kinds) & set(DATA):
        load()
    before = Path.cwd()
    made = world.make(root / "first", "")
    os.chdir(made)
    try:
        from galley_launch.base.options import read
        from galley_launch.plan import compose

        spec = compose.compose("mine.yaml", read(["device=cpu", "ranks=1"]), imagine=True).spec.to_json()
    finally:
        os.chdir(before)
    return world.make(root / "base", spec)


def one(kind: str, seed: int, number: int, valid: Path, root: Path) -> list[str]:
    """Failures of one case, which is always the same for a seed and number."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    here = root / "case"
    shutil.copytree(valid, here, symlinks=True)
    os.chdir(here)
    try:
        made: Kind = ({**CONTROL, **DATA})[kind]
        done, calls = made(rng, here)
        found = [
            f"seed {seed}, {kind} {number}: {done}\n  {label}: {wrong}" for label, call in calls if (wrong := call())
        ]
    finally:
        os.chdir(root)
        shutil.rmtree(here, ignore_errors=True)
    return found


def schedule(count: int, kinds: list[str]) -> list[tuple[str, int]]:
    """``count`` cases of ``kinds`` by their shares, in a fixed order."""
    wheel = [kind for kind in kinds for _ in range(SHARES[kind])]
    numbers: Counter[str] = Counter()
    cases = []
    for place in range(count):
        kind = wheel[place % len(wheel)]
        cases.append((kind, numbers[kind]))
        numbers[kind] += 1
    return cases


def failures(count: int, seed: int, kinds: list[str], root: Path, enough: int = 20) -> list[str]:
    """What fails of ``count`` cases; ends early after ``enough``."""
    valid = base(root, kinds)
    found: list[str] = []
    for kind, number in schedule(count, kinds):
        found += one(kind, seed, number, valid, root)
        if len(found) >= enough:
            break
    return found


def signature(failure: str) -> str:
    """What failures of one cause share."""
    last = failure.strip().splitlines()[-1]
    frames = re.findall(r'File "[^"]*/(?:src|launch)/([^"]+)", line (\d+)', failure)
    return f"{frames[-1] if frames else ''} {re.sub(r'[0-9]+', 'N', last)[:90]}" if frames else last[:120]


def main(count: int, seed: int, kinds: list[str], seconds: float) -> int:
    """Draw ``count`` cases, or as many as ``seconds`` allow, and list the failures by cause."""
    groups: dict[str, list[str]] = {}
    began, drawn = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        valid = base(Path(folder), kinds)
        for kind, number in schedule(count, kinds):
            if time.monotonic() - began > seconds:
                break
            drawn += 1
            for failure in one(kind, seed, number, valid, Path(folder)):
                groups.setdefault(signature(failure), []).append(failure)
        os.chdir("/")
    for name, members in sorted(groups.items(), key=lambda pair: -len(pair[1])):
        print(f"=== {len(members)} x {name}\n{min(members, key=len)[:2500]}\n")
    print(f"{sum(map(len, groups.values()))} failures of {len(groups)} kinds in {drawn} inputs")
    return bool(groups)


if __name__ == "__main__":
    number, first = (int(word) for word in (sys.argv[1:3] if sys.argv[2:] else (sys.argv[1], "0")))
    sys.exit(main(number, first, sys.argv[3:] or [*CONTROL, *DATA], float(os.environ.get("SECONDS_AT_MOST", "inf"))))
