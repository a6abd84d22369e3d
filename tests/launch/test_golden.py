"""What every shipped recipe plans to, on one GPU and on two CPU ranks.

``tests/golden/`` has eight whole plans (``plans/``), the contract's defaults (``defaults.txt``), the commands of the
stages, which are the same for all recipes, and for each recipe what differs from the defaults (``recipes/``): so a new
field of the contract changes five files there, and a changed setting the file of its recipe. ``make golden`` accepts
what they plan to now; the change then shows in review.
"""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import create_model

from galley.contract.spec import Data, Part, Placement, RunSpec, Task
from galley_launch.base import assets, devices
from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.plan.plan import Plan, make

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
RECIPES = sorted(path.stem for path in assets.folder("recipes").glob("*.yaml") if path.stem != "demo")
PLACES = {"gpu": ["gpus=0"], "cpu2": ["device=cpu", "ranks=2", "micro_batch=1"]}
WHOLE = {
    "full": ["llama3.1-8b-full gpus=0", "smollm2-360m-full device=cpu ranks=2 micro_batch=1 deepspeed=zero0"],
    "lora": ["qwen3-8b-lora gpus=0", "smollm2-135m-lora device=cpu ranks=2 micro_batch=1 deepspeed=zero1"],
    "qlora": ["qwen3-4b-qlora gpus=0", "llama3.2-3b-qlora device=cpu ranks=2 micro_batch=1 deepspeed=zero3"],
    "more": [
        "qwen3-30b-a3b-lora gpus=0 deepspeed=zero3_offload_cpu tracking.wandb.project=p profile=3",
        "olmo2-1b-full device=cpu ranks=2 micro_batch=1 format=text chat_template=null optimizer.name=lion",
    ],
}
"""Whole plans, two in a file: every method, ZeRO stage and kind of device."""


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


def stage_commands(plan: Plan) -> str:
    return "".join(f"# {stage.name}\n{stage.shell()}\n" for stage in plan.stages)


def flat(value: Any, path: str = "") -> dict[str, str]:
    """Dotted path to JSON value, for each leaf of a tree of dictionaries."""
    if not isinstance(value, dict) or not value:
        return {path: json.dumps(value, ensure_ascii=False)}
    leaves: dict[str, str] = {}
    for key, inner in value.items():
        leaves |= flat(inner, f"{path}.{key}" if path else key)
    return leaves


def settings(spec: RunSpec, here: Path) -> dict[str, str]:
    """What of ``run.json`` is not a default of the contract."""
    return flat(json.loads(plain(json.dumps(spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)), here)))


def summary(specs: dict[str, RunSpec], here: Path) -> str:
    """One recipe on one GPU, and what is different on two CPU ranks."""
    gpu, cpu = settings(specs["gpu"], here), settings(specs["cpu2"], here)
    lines = ["# gpus=0", *(f"{key} = {value}" for key, value in gpu.items())]
    lines += ["", f"# {' '.join(PLACES['cpu2'])}"]
    lines += [f"{key} = {value}" for key, value in cpu.items() if gpu.get(key) != value]
    lines += [f"{key}: not set" for key in gpu if key not in cpu]
    return "\n".join(lines) + "\n"


def defaults(part: type[Part], path: str = "") -> list[str]:
    """Every field below ``part`` with its default, depth first."""
    lines = []
    for name, field in part.model_fields.items():
        at = f"{path}.{name}" if path else name
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, Part)]
        if inner:
            lines += defaults(inner[0], at)
        else:
            value = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            lines.append(f"{at}: {value}")
    return lines


def whole(lines: list[str], here: Path, contract: type[RunSpec] = RunSpec) -> str:
    """``run.json`` and the commands of several plans."""
    texts = []
    for line in lines:
        recipe, *words = line.split()
        spec, plan = compiled(recipe, words, here)
        assert RunSpec.model_validate_json(plan.files["run.json"]) == spec
        run_json = contract.model_validate_json(plan.files["run.json"]).to_json()
        texts.append(plain(f"# {line}\n{run_json}{stage_commands(plan)}", here))
    return "\n".join(texts)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_plans_to_what_it_did(recipe: str, here: Path) -> None:
    specs = {}
    for place, words in PLACES.items():
        specs[place], plan = compiled(recipe, words, here)
        assert RunSpec.model_validate_json(plan.files["run.json"]) == specs[place]
        commands = plain(stage_commands(plan), here).replace(f"/runs/{recipe}/", "/runs/RECIPE/")
        check(GOLDEN / f"stages@{place}.sh", commands)
    check(GOLDEN / "recipes" / f"{recipe}.txt", summary(specs, here))


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_whole_plan_is_what_it_was(name: str, here: Path) -> None:
    check(GOLDEN / "plans" / f"{name}.txt", whole(WHOLE[name], here))


def test_the_defaults_are_what_they_were() -> None:
    check(GOLDEN / "defaults.txt", "\n".join(defaults(RunSpec)) + "\n")


def test_whole_plans_cover_every_method_stage_and_device(here: Path) -> None:
    specs = [compiled(line.split()[0], line.split()[1:], here)[0] for lines in WHOLE.values() for line in lines]
    assert {spec.task.method.kind for spec in specs} == {"full", "lora", "qlora"}
    assert {spec.placement.zero_stage for spec in specs} == {0, 1, 2, 3}
    assert {spec.placement.device for spec in specs} == {"cpu", "cuda"}


def test_a_new_field_of_the_contract_changes_few_files(here: Path) -> None:
    """Of all golden files fewer than eight: with the contract itself and recipes/schema.json fewer than ten."""
    data = create_model("Data", __base__=Data, shuffle=(int, 3))
    task = create_model("Task", __base__=Task, data=(data, ...))
    new = create_model("RunSpec", __base__=RunSpec, task=(task, ...))
    changed = [name for name, lines in WHOLE.items() if whole(lines, here, new) != whole(lines, here)]
    changed += ["defaults"] * (defaults(new) != defaults(RunSpec))
    for recipe in RECIPES:
        specs = {place: compiled(recipe, words, here)[0] for place, words in PLACES.items()}
        newer = {place: new.model_validate_json(spec.to_json()) for place, spec in specs.items()}
        changed += [recipe] * (summary(newer, here) != summary(specs, here))
    assert sorted(changed) == [*sorted(["defaults", *WHOLE])]
    assert len(changed) < 8


def planted(spec: RunSpec, path: str, value: object) -> RunSpec:
    """``spec`` with one value in its ``run.json`` changed, whatever the contract thinks of it."""
    tree = spec.model_dump()
    *parents, last = path.split(".")
    part = tree
    for key in parents:
        part = part[key]
    assert part[last] != value
    part[last] = value
    task = Task.model_construct(**{name: _built(spec.task, tree["task"], name) for name in Task.model_fields})
    placement = Placement.model_construct(**tree["placement"] | {"paths": spec.placement.paths})
    return spec.model_copy(update={"task": task, "placement": placement})


def _built(task: Task, tree: dict[str, Any], name: str) -> Any:
    part = getattr(task, name)
    return type(part).model_construct(**tree[name]) if isinstance(part, Part) else tree[name]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.optimizer.lr", 3e-4),
        ("task.method.rank", 8),
        ("task.seed", 1),
        ("task.data.packing", False),
        ("placement.micro_batch", 16),
        ("placement.activation_checkpointing", False),
        ("placement.deepspeed.zero_optimization.stage", 1),
        ("placement.deepspeed.gradient_clipping", 0.5),
    ],
)
@pytest.mark.parametrize("place", sorted(PLACES))
def test_a_wrong_value_shows_in_the_file_of_its_recipe(place: str, path: str, value: object, here: Path) -> None:
    recipe = "gemma3-1b-lora"
    specs = {name: compiled(recipe, words, here)[0] for name, words in PLACES.items()}
    wrong = specs | {place: planted(specs[place], path, value)}
    golden = (GOLDEN / "recipes" / f"{recipe}.txt").read_text()
    assert summary(specs, here) == golden
    assert summary(wrong, here) != golden


def test_a_wrong_variable_or_word_of_a_command_shows(here: Path) -> None:
    _, plan = compiled("gemma3-1b-lora", PLACES["cpu2"], here)
    golden = (GOLDEN / "stages@cpu2.sh").read_text()
    train = plan.stages[1]
    for wrong in (replace(train, env=train.env | {"OMP_NUM_THREADS": "3"}), replace(train, argv=train.argv[:-1])):
        text = stage_commands(replace(plan, stages=(plan.stages[0], wrong, plan.stages[2])))
        assert plain(text, here).replace("/runs/gemma3-1b-lora/", "/runs/RECIPE/") != golden


@pytest.mark.parametrize("preset", ["zero0", "zero1", "zero2", "zero3", "zero3_offload_cpu"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_pairs_with_every_preset(recipe: str, preset: str, here: Path) -> None:
    spec, plan = compiled(recipe, [f"deepspeed={preset}", "device=cpu", "ranks=2", "micro_batch=1"], here)
    assert spec.placement.zero_stage == int(preset[4])
    assert [stage.name for stage in plan.stages] == ["prepare", "train", "export"]
    assert json.loads(plan.files["attempts/0001/placement.json"]) == spec.placement.model_dump(mode="json")


def test_no_golden_file_is_left_over() -> None:
    files = {"defaults.txt", *(f"stages@{place}.sh" for place in PLACES), *(f"plans/{name}.txt" for name in WHOLE)}
    files |= {f"recipes/{recipe}.txt" for recipe in RECIPES}
    found = {str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*") if path.is_file()}
    assert {path for path in found if not path.startswith("jobs/")} == files  # test_jobs.py looks after the jobs
