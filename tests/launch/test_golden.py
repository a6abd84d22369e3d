"""What every shipped recipe plans to, on one GPU and on two CPU ranks, byte for byte.

``make golden`` accepts what they plan to now; the change to ``tests/golden/`` then shows in review.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from galley.contract.spec import RunSpec
from galley_launch.base import assets, devices
from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.plan.plan import Plan, make

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
RECIPES = sorted(path.stem for path in assets.folder("recipes").glob("*.yaml") if path.stem != "demo")
PLACES = {"gpu": ["gpus=0"], "cpu2": ["device=cpu", "ranks=2", "micro_batch=1"]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory, a home and a box that are the same everywhere: one 24 GB GPU, eight cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(devices, "visible", lambda: [devices.Gpu("0", "GPU-0", "Test", 24576, 1)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    return tmp_path


def compiled(name: str, words: list[str], here: Path) -> tuple[RunSpec, Plan]:
    made = compose.compose(name, read(words), imagine=False)
    return made.spec, make(made.spec, made.run, 1, "SRC")


def plain(text: str, here: Path) -> str:
    """``text`` without what differs from one machine and one commit to the next."""
    for value, name in ((sys.executable, "PYTHON"), (str(here), "HERE"), (str(ROOT), "ROOT")):
        text = text.replace(value, name)
    text = re.sub(r'"commit": (null|"[^"]*")', '"commit": "COMMIT"', text)
    return re.sub(r'"version": "[^"]*"', '"version": "VERSION"', text)


def check(path: Path, text: str) -> None:
    if os.environ.get("GALLEY_BLESS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"{path} does not exist; run: make golden"
    assert text == path.read_text(), "look at the difference; if it is meant, run: make golden"


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_plans_to_what_it_did(recipe: str, place: str, here: Path) -> None:
    spec, plan = compiled(recipe, PLACES[place], here)
    text = plan.files["run.json"]
    assert RunSpec.model_validate_json(text) == spec
    stages = "".join(f"# {stage.name}\n{stage.shell()}\n" for stage in plan.stages)
    folder = GOLDEN / f"{recipe}@{place}"
    check(folder / "run.json", plain(text, here))
    check(folder / "stages.sh", plain(stages, here))


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_pairs_with_every_preset(recipe: str, preset: str, here: Path) -> None:
    spec, plan = compiled(recipe, [f"deepspeed={preset}", "device=cpu", "ranks=2", "micro_batch=1"], here)
    assert spec.placement.zero_stage == int(preset[4])
    assert [stage.name for stage in plan.stages] == ["prepare", "train", "export"]
    assert json.loads(plan.files["attempts/0001/placement.json"]) == spec.placement.model_dump(mode="json")


def test_no_golden_file_is_left_over() -> None:
    plans = {f"{recipe}@{place}" for recipe in RECIPES for place in PLACES}
    assert {path.name for path in GOLDEN.iterdir()} == {*plans, "jobs"}  # test_jobs.py looks after the jobs
