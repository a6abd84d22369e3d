"""A recipe's text becomes typed values, or one clear line."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.contract.errors import UserError
from galley.contract.spec import Cadence, RunSpec, Task
from galley_launch import commands
from galley_launch.base import assets
from galley_launch.base.options import read
from galley_launch.base.yaml_text import Tree, read_yaml
from galley_launch.recipe import catalogue
from galley_launch.recipe.schema import Recipe, build, header, override
from launch import fakes

RECIPES = sorted(assets.folder("recipes").glob("*.yaml"))
LEAST: Tree = {
    "model": {"path": "org/model"},
    "data": {"path": "org/data"},
    "batch": {"samples": "16"},
    "duration": {"epochs": "1"},
}


def refusal(tree: Tree, *words: str) -> str:
    with pytest.raises(UserError) as error:
        build(override(tree, read(words).overrides), "x.yaml")
    return str(error.value)


def test_strings_get_the_types_of_the_schema() -> None:
    words = ["lr=1e-4", "betas=[0.8,0.99]", "packing=false", "targets=[q_proj,v_proj]", "revision=null", "threads=null"]
    words[4] = "model.revision=null"
    recipe = build(override(LEAST, read(words).overrides), "x.yaml")
    assert recipe.optimizer.lr == 1e-4
    assert recipe.optimizer.betas == (0.8, 0.99)
    assert recipe.data.packing is False
    assert recipe.method.targets == ["q_proj", "v_proj"]
    assert recipe.model.revision is None
    assert recipe.cadence == Cadence()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr=fast"], "optimizer.lr: 'fast' is not a number; it means: Peak learning rate"),
        (["lr=true"], "optimizer.lr: 'true' is not a number"),
        (["lr=inf"], "optimizer.lr: is not a finite number"),
        (["lr=nan"], "optimizer.lr: "),
        (["lr=0"], "optimizer.lr: '0' should be greater than 0"),
        (["lr="], "optimizer.lr: '' is not a number"),
        (["lr=null"], "optimizer.lr: None is not a number"),
        (["steps=3.7"], "duration.steps: '3.7' is not a whole number; it means: Optimizer steps"),
        (["seed=1e3"], "seed: '1e3' is not a whole number"),
        (["packing=maybe"], "data.packing: 'maybe' is not true or false"),
        (["dtype=float64"], "model.dtype: 'float64' should be 'bfloat16', 'float16' or 'float32'"),
        (["method.kind=int8"], "method.kind: 'int8' should be 'full', 'lora', 'qlora' or 'lora_int8'"),
        (
            ["targets=q_proj"],
            "'q_proj' should be 'all-linear' or 'all-linear+experts', or a list [a,b]",
        ),
        (["betas=[0.9]"], "optimizer.betas: has too few values"),
        (["betas=0.9"], "optimizer.betas: '0.9' should be a valid tuple"),
        (["held_out=1"], "data.held_out: '1' should be less than 1"),
        (["model.path=null"], "model.path: None should be a valid string"),
        (["batch.tokens=1000"], "batch.tokens 1000 is not a multiple of data.max_length 2048; try 2048"),
        (["epochs=1", "steps=4"], "duration: give exactly one of epochs, steps, tokens, not epochs and steps"),
        (["model=x"], "model is a section; set one of its keys: model.path"),
    ],
)
def test_a_wrong_value_is_one_line(words: list[str], message: str) -> None:
    line = refusal(LEAST, *words)
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": {"lr": "1"}}, "x.yaml: no such key: 'optimiser'; did you mean 'optimizer'?"),
        ({"optimizer": {"learning_rate": "1"}}, "x.yaml: optimizer: no such key: 'learning_rate'; here it is called"),
        ({"optimizer": {"beta": "1"}}, "x.yaml: optimizer: no such key: 'beta'; did you mean 'betas'?"),
        ({"optimizer": "adamw"}, "x.yaml: optimizer: 'adamw' is not a section; set its keys: optimizer.name"),
        ({"name": "x"}, "x.yaml: 'name' belongs on the command line; remove it and write name=…"),
        ({"model": {}}, "x.yaml: model.path: is missing; it means: Hub id, folder"),
        ({"tracking": {"wandb": {}}}, "x.yaml: tracking.wandb.project: is missing; it means: W&B project"),
        ({"tracking": {"wandb": {"projct": "x"}}}, "x.yaml: tracking.wandb: no such key: 'projct'; did you mean"),
        ({"tracking": {"wandb": "chats"}}, "x.yaml: tracking.wandb: 'chats' is not a section; set its keys: tracking."),
        ({"tracking": {"comet": {}}}, "x.yaml: tracking: no such key: 'comet'; set tracking.wandb.project=NAME"),
        (
            {"tracking": {"mlflow": {"experiment": "x", "uri": "https://ada:pw@host"}}},
            "x.yaml: tracking.mlflow.uri: holds a URL with a password; give it in MLFLOW_TRACKING_TOKEN, or MLF",
        ),
    ],
)
def test_a_wrong_key_gets_the_nearest(change: Tree, message: str) -> None:
    assert refusal(LEAST | change).startswith(message)


def test_trackers_can_be_asked_for_on_the_command_line_too() -> None:
    words = ["tracking.wandb.project=chats", "group=night", "uri=https://host:1", "experiment=e"]
    tracking = build(override(LEAST, read(words).overrides), "x.yaml").tracking
    assert tracking.names == ["wandb", "mlflow"]
    assert tracking.model_dump(exclude_none=True) == {
        "wandb": {"project": "chats", "group": "night"},
        "mlflow": {"experiment": "e", "uri": "https://host:1"},
    }
    off = LEAST | {"tracking": {"wandb": None, "mlflow": None}}  # as a run that goes on says it
    assert build(off, "x.yaml").tracking.names == []
    assert build(override(off, read(["project=p"]).overrides), "x.yaml").tracking.names == ["wandb"]


def test_a_missing_section_is_named() -> None:
    line = refusal({key: value for key, value in LEAST.items() if key != "duration"})
    assert line.startswith("x.yaml: duration: is missing; its keys: duration.epochs")


def test_plain_text_is_split_unless_it_is_said_otherwise() -> None:
    assert build(override(LEAST, read(["format=text"]).overrides), "x.yaml").data.overlong == "split"
    assert build(override(LEAST, read(["format=text", "overlong=drop"]).overrides), "x.yaml").data.overlong == "drop"
    assert build(LEAST, "x.yaml").data.overlong == "drop"


def test_an_override_replaces_the_other_ways_to_say_it() -> None:
    recipe = build(override(LEAST, read(["steps=20", "batch.tokens=4096"]).overrides), "x.yaml")
    assert (recipe.duration.steps, recipe.duration.epochs) == (20, None)
    assert (recipe.batch.tokens, recipe.batch.samples, recipe.samples_per_step) == (4096, None, 2)


def test_an_override_keeps_the_recipe_as_it_was() -> None:
    before = json.dumps(LEAST)
    override(LEAST, read(["samples=3", "lr=1"]).overrides)
    assert json.dumps(LEAST) == before


@settings(max_examples=40)
@given(st.floats(1e-8, 1e3), st.integers(1, 10**9), st.booleans(), st.integers(0, 2**31 - 1), st.floats(0, 0.999))
def test_values_come_back_as_they_were_written(lr: float, steps: int, packing: bool, seed: int, out: float) -> None:
    words = [f"lr={lr}", f"steps={steps}", f"packing={packing}", f"seed={seed}", f"held_out={out}"]
    recipe = build(override(LEAST, read(words).overrides), "x.yaml")
    found = (recipe.optimizer.lr, recipe.duration.steps, recipe.data.packing, recipe.seed, recipe.data.held_out)
    assert found == (lr, steps, packing, seed, out)


@settings(max_examples=25)
@given(st.floats(1e-8, 1e3), st.integers(1, 10**6))
def test_a_run_spec_comes_back_from_its_bytes(lr: float, steps: int) -> None:
    made = fakes.spec(Path("/runs/x"), lr, steps=steps)
    assert RunSpec.model_validate_json(made.to_json()) == made
    assert RunSpec.model_validate_json(made.to_json()).to_json() == made.to_json()


def test_a_recipe_has_every_field_of_a_task() -> None:
    assert set(Task.model_fields) < set(Recipe.model_fields)
    assert build(LEAST, "x.yaml").task().model_dump() == Task.model_validate(LEAST | {"seeding": 2}).model_dump()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_its_own_manual(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=./schema.json\n")
    manual = header(text)
    assert re.search(rf"galley (run|submit) {re.escape(path.stem)}\b", manual)
    assert all(word in manual for word in ("Needs", "Run", "Expect", "Instead")) or path.stem == "demo"
    assert build(catalogue.read(path).tree, str(path)).about


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_fits_the_schema(path: Path) -> None:
    recipe = build(catalogue.read(path).tree, str(path))
    body = recipe.model_dump(mode="json", exclude_unset=True)
    assert _faults(body) == []


def test_the_schema_refuses_what_the_recipe_refuses() -> None:
    body = {"model": {"path": "a/b"}, "data": {"path": "a/b"}, "batch": {"samples": 1}, "duration": {"steps": 1}}
    jsonschema.validate(body, _schema())
    wrongs: list[Tree] = [{"batch": {"samples": 0}}, {"optimizer": {"lrr": 1}}, {"model": {"path": "a", "dtype": "x"}}]
    for wrong in (*wrongs, {"model": {}}, {"extends": 3}, {"extends": "a", "data": {"pathh": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body | wrong, _schema())
    for missing in body:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in body.items() if key != missing}, _schema())


def test_the_schema_asks_less_of_a_recipe_that_extends_another() -> None:
    assert _faults({}) != []
    assert _faults({"extends": "demo"}) == []
    assert _faults({"extends": "demo", "model": {"dtype": "float32"}, "data": {"held_out": 0.1}}) == []
    assert _faults({"extends": "demo", "tracking": {"wandb": {"group": "a"}}}) == []


def test_the_shipped_schema_is_current() -> None:
    shipped = (assets.folder("recipes") / "schema.json").read_text()
    assert shipped == commands.schema_text(), "run: galley schema > recipes/schema.json"


def _schema() -> Any:
    return json.loads(commands.schema_text())


def _faults(body: Tree) -> list[Any]:
    return list(jsonschema.Draft202012Validator(_schema()).iter_errors(body))


def test_show_prints_the_manual_and_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.show("smollm2-135m-lora", read(["lr=3e-3"])) == 0
    out = capsys.readouterr().out
    assert out.startswith("SmolLM2-135M-Instruct trained")
    shown = build(read_yaml(out[out.index("model:") :], "show"), "show")
    assert shown.optimizer.lr == 3e-3
    assert shown.model_fields_set == set(Recipe.model_fields)


def test_older_degrees_of_parallelism_load_where_they_are_one(tmp_path: Path) -> None:
    old = fakes.spec(tmp_path)
    tree = json.loads(old.to_json())
    tree["placement"] |= {"sequence": 1, "tensor": 1, "expert": 1}
    assert RunSpec.model_validate_json(json.dumps(tree)) == old
    assert '"tensor"' not in old.to_json()
    tree["placement"]["tensor"] = 2
    with pytest.raises(ValueError, match="tensor is 2; there is no tensor parallelism, so take it out"):
        RunSpec.model_validate_json(json.dumps(tree))
