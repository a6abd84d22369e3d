"""DeepSpeed JSONs as they are in the world: each has its right outcome, at the first plan where that can be."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from launch.world_jsons import ACCEPTED, DIFFERS, OFF, REFUSED, WORLD, World

from galley.contract.errors import UserError
from galley_launch.base.options import read
from galley_launch.deepspeed.settle import TAKE
from galley_launch.plan.compose import Composed, compose

LONGEST = 500
_RECIPE_SETTLES = ("autocast under stage 2", "fp16 without stages")  # no setting takes these, but they can be dropped


_SEEN: dict[tuple[str, ...], Composed | str] = {}


def planned(world: World, folder: Path, *more: str) -> Composed | str:
    """What a plan gives: the run, or its refusal."""
    key = (world.name, *more)
    if key not in _SEEN:
        _SEEN[key] = _plan(world, folder, *more)
    return _SEEN[key]


def _plan(world: World, folder: Path, *more: str) -> Composed | str:
    path = folder / "ds.json"
    path.write_text(world.text, encoding="utf-8")
    try:
        words = ["gpus=0", f"deepspeed={path}", f"runs={folder / 'runs'}", *world.words, *more]
        return compose("smollm2-135m-lora", read(words), imagine=True)
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) <= LONGEST
        return line


def test_there_are_a_hundred_and_their_names_differ() -> None:
    assert len(WORLD) >= 100
    assert len({world.name for world in WORLD}) == len(WORLD)


@pytest.mark.parametrize("world", WORLD, ids=lambda world: world.name)
def test_a_json_of_the_world_has_its_right_outcome(world: World, tmp_path: Path) -> None:
    first = planned(world, tmp_path)
    if world.outcome == ACCEPTED:
        assert isinstance(first, Composed), first
        notes = " ".join(first.notes)
    else:
        assert isinstance(first, str), "it was accepted"
        notes = first
    for part in world.says:
        assert part in notes
    for take in TAKE:
        taken = planned(world, tmp_path, f"take={take}")
        settled = world.name in _RECIPE_SETTLES and take == "recipe"
        assert isinstance(taken, Composed) == (world.outcome != REFUSED or settled), taken
        if world.outcome in (DIFFERS, OFF):
            assert isinstance(taken, Composed)
            assert any("ds.json: " in note for note in taken.notes), "nothing says what was taken"


@pytest.mark.parametrize("world", [each for each in WORLD if each.outcome == DIFFERS], ids=lambda world: world.name)
def test_the_words_that_a_refusal_offers_are_enough(world: World, tmp_path: Path) -> None:
    """Typed as they stand, they settle every difference that a setting can settle: the second plan is accepted."""
    line = planned(world, tmp_path)
    assert isinstance(line, str)
    offered = line.partition("take=deepspeed sets ")[2].partition(" (")[0].partition(", take=recipe")[0]
    words = (offered or line.partition("; add ")[2].partition(" or take=")[0]).split()
    assert words
    second = planned(world, tmp_path, *words)
    if "cannot take" in line:
        assert "number is not known yet" in str(second)
    else:
        assert isinstance(second, Composed), second


def test_plans_until_a_json_is_accepted(tmp_path: Path) -> None:
    """Of the files that can be accepted as they are: one plan with take=deepspeed, at most two without."""
    good = [world for world in WORLD if world.outcome != REFUSED]
    takes = [isinstance(planned(world, tmp_path, "take=deepspeed"), Composed) for world in good]
    assert all(takes), "take=deepspeed is not always enough"
    plain = [1 if isinstance(planned(world, tmp_path), Composed) else 2 for world in good]
    assert statistics.median(plain) == 1
    assert sum(plain) / len(plain) < 1.6


_PARSE = """
import json, logging, sys
logging.disable(logging.CRITICAL)
from deepspeed.runtime.config import DeepSpeedConfig
for name, config in json.load(open(sys.argv[1])).items():
    try:
        DeepSpeedConfig(config)
    except BaseException as error:
        print("REFUSED", name, repr(error)[:300])
print("PARSED")
"""


@pytest.mark.slow
def test_deepspeed_itself_takes_what_a_plan_accepted(tmp_path: Path) -> None:
    """Its own parser, in a process without ranks: none of these configurations is what a rank would die of."""
    found = {}
    for world in WORLD:
        for take in ("", *TAKE):
            made = planned(world, tmp_path, *([f"take={take}"] if take else []))
            if isinstance(made, Composed):
                found[f"{world.name} {take}"] = made.spec.placement.deepspeed
    assert len(found) > 200
    (tmp_path / "found.json").write_text(json.dumps(found, allow_nan=False))
    command = [sys.executable, "-c", _PARSE, str(tmp_path / "found.json")]
    env = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=True)
    assert "PARSED" in done.stdout
    assert "REFUSED" not in done.stdout, done.stdout
