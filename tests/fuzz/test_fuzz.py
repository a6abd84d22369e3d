"""Damaged inputs of every kind: no traceback, no hang, bounded memory, refusals of one short, plain line.

``GALLEY_FUZZ=recipe/17`` repeats one case; ``python -m fuzz.drive 1000 7`` (in ``tests``) draws others and groups what
fails by its cause.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fuzz.drive import base, failures, one
from fuzz.kinds import CONTROL, DATA

from galley_launch.base import devices

SEED = int(os.environ.get("GALLEY_FUZZ_SEED", "0"))


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this user or machine is read, and no GPU is there."""
    home = tmp_path_factory.mktemp("home")
    for name, path in {"HOME": home, "XDG_CONFIG_HOME": home / "config", "XDG_CACHE_HOME": home / "cache"}.items():
        monkeypatch.setenv(name, str(path))
    monkeypatch.setattr(devices, "visible", list)
    monkeypatch.chdir(home)


def judge(kinds: list[str], count: int, seed: int, root: Path) -> list[str]:
    """What failed, a text for each input; of one case where ``GALLEY_FUZZ`` names it."""
    asked = os.environ.get("GALLEY_FUZZ", "")
    if asked:
        kind, number = asked.split("/")
        return one(kind, seed, int(number), base(root, kinds), root) if kind in kinds else []
    return failures(count, seed, kinds, root)


def shown(failed: list[str]) -> str:
    return f"{len(failed)} failures:\n\n" + "\n\n".join(failed[:10])


def test_damaged_inputs_of_the_control_plane(tmp_path: Path) -> None:
    failed = judge([*CONTROL], 400, SEED, tmp_path)
    assert not failed, shown(failed)


def test_damaged_inputs_of_the_data_plane(tmp_path: Path) -> None:
    failed = judge([*DATA], 100, SEED, tmp_path)
    assert not failed, shown(failed)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_damaged_inputs(tmp_path: Path, part: int) -> None:
    failed = judge([*CONTROL, *DATA], 2500, 1000 + SEED + part, tmp_path)
    assert not failed, shown(failed)
