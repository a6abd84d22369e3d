"""``galley show``: every setting with its meaning, in YAML that reads back as the same recipe."""

import re

import pytest

from galley_launch import cli
from galley_launch.base import assets
from galley_launch.base.options import read
from galley_launch.base.yaml_text import read_yaml
from galley_launch.plan import request
from galley_launch.recipe.explained import text
from galley_launch.recipe.schema import Recipe, build, keys

RECIPES = sorted(path.stem for path in assets.folder("recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_shown_reads_back(name: str) -> None:
    recipe = request.resolve(name, read([])).recipe
    assert build(read_yaml(text(recipe), "show"), "show") == recipe


HARD = ["about=# not: a comment", "about='yes'", "about=é ☃ 日本", "about=a: [b", "targets=['a, b', \"c\"]"]


@pytest.mark.parametrize("word", HARD)
def test_hard_strings_read_back(word: str) -> None:
    recipe = request.resolve("demo", read([word])).recipe
    assert build(read_yaml(text(recipe), "show"), "show") == recipe


def test_every_setting_has_a_comment_right_above_it() -> None:
    recipe = request.resolve(
        "smollm2-135m-lora", read(["tracking.wandb.project=x", "tracking.mlflow.experiment=y"])
    ).recipe
    lines = text(recipe).splitlines()
    settings = [number for number, line in enumerate(lines) if re.match(r" *\w+:", line)]
    bare = [lines[number] for number in settings if not lines[number - 1].strip().startswith("#")]
    assert bare == []
    leaves = [lines[number].split(":")[0].strip() for number in settings]
    assert {key.rpartition(".")[2] for key in keys()} <= set(leaves)
    assert len(settings) == len({key for key in keys() if "." in key or key in Recipe.model_fields}) + 13
    assert max(map(len, lines)) <= 80


def test_show_ends_in_the_explained_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "smollm2-135m-lora", "lr=1e-5"]) == 0
    out = capsys.readouterr().out
    assert "  # Peak learning rate.\n  lr: 1.0e-05\n" in out
    assert "``" not in out
    assert out.endswith(text(request.resolve("smollm2-135m-lora", read(["lr=1e-5"])).recipe))
