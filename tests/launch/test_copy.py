"""A copy of a recipe: the user's own, and it means what the recipe meant."""

from pathlib import Path

import pytest
from launch.test_catalogue import BASE, ON_CPU, here, write

from galley_launch import cli
from galley_launch.base import assets
from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.recipe import catalogue

__all__ = ["here"]


def test_a_copy_is_the_users_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["copy", "qwen3-4b-qlora"]) == 0
    out = capsys.readouterr().out
    assert out == (
        "recipes/qwen3-4b-qlora.yaml is yours to change; it is used instead of the shipped one\n"
        "next: galley show qwen3-4b-qlora; galley plan qwen3-4b-qlora\n"
    )
    copied, shipped = catalogue.find("qwen3-4b-qlora"), catalogue.read(assets.folder("recipes") / "qwen3-4b-qlora.yaml")
    assert copied.label == "recipes/qwen3-4b-qlora.yaml"
    assert copied.tree == shipped.tree
    assert copied.text.splitlines()[1:] == shipped.text.splitlines()[1:]
    schema = copied.text.splitlines()[0].partition("$schema=")[2]
    assert Path(schema).samefile(assets.folder("recipes") / "schema.json")


@pytest.mark.parametrize(
    ("to", "target", "word"),
    [
        ("mine", "recipes/mine.yaml", "mine"),
        ("mine.yaml", "mine.yaml", "mine.yaml"),
        ("sub/dir/mine.yml", "sub/dir/mine.yml", "sub/dir/mine.yml"),
        ("recipes", "recipes/smollm2-135m-lora.yaml", "smollm2-135m-lora"),
        ("other/", "other/smollm2-135m-lora.yaml", "other/smollm2-135m-lora.yaml"),
    ],
)
def test_its_commands_name_the_copy(
    to: str, target: str, word: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other").mkdir()
    assert cli.main(["copy", "smollm2-135m-lora", to]) == 0
    assert f"galley plan {word}\n" in capsys.readouterr().out
    text = Path(target).read_text()
    assert f"galley run {word}\n" in text
    assert f"galley run {word} device=cpu ranks=2 steps=20\n" in text
    assert f"runs/{Path(target).stem}/export" in text
    assert "smollm2-360m-full" in text
    assert cli.main(["plan", word, *ON_CPU]) == 0


def test_a_copy_overwrites_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("recipes/demo.yaml", BASE)
    assert cli.main(["copy", "demo"]) == 2
    assert (
        capsys.readouterr().err
        == "galley: recipes/demo.yaml: already exists; give another name: galley copy demo NAME\n"
    )
    assert Path("recipes/demo.yaml").read_text() == BASE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dmo"], "recipe: no recipe 'dmo'; did you mean 'demo'?"),
        (["demo", "x/y"], "copy: 'x/y' is not a recipe's file; write a name, or a path that ends in .yaml"),
        (["demo", "recipes/a.yaml/b.yaml"], "recipes/a.yaml/b.yaml: cannot be written (File exists)"),
        (["demo", "a", "b"], "copy: 'b' is an unexpected word"),
        (["demo", "lr=3"], "copy: takes no key 'lr'"),
        ([], "copy: RECIPE is missing"),
    ],
)
def test_what_cannot_be_copied_is_one_line(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("recipes/a.yaml", BASE)
    assert cli.main(["copy", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"galley: {message}")
    assert err.count("\n") == 1


def test_a_copy_finds_the_data_that_is_beside_the_recipe(here: Path) -> None:
    data = assets.folder("recipes") / "data" / "orders" / "train.jsonl"
    assert cli.main(["copy", "demo", "deep/er/mine.yaml"]) == 0
    assert compose.compose("deep/er/mine.yaml", read(ON_CPU), imagine=False).spec.placement.paths.data == str(data)


def test_a_copy_of_a_users_recipe_finds_all_that_it_names(here: Path) -> None:
    write("a/chats.jsonl", "{}\n")
    write("a/turns.jinja", "x")
    write("a/zero.json", '{"zero_optimization": {"stage": 1}}')
    write("a/base.yaml", BASE.replace("org/model", "Qwen/Qwen3-4B"))
    write(
        "a/child.yaml",
        "extends: base.yaml  # the base\nmodel: {chat_template: turns.jinja}\n"
        "data: {path: 'chats.jsonl', split: train}  # ours\ndeepspeed: ./zero.json\n",
    )
    first = compose.compose("a/child.yaml", read(ON_CPU), imagine=False).spec.placement
    assert cli.main(["copy", "a/child.yaml", "b/copy.yaml"]) == 0
    text = Path("b/copy.yaml").read_text()
    assert "  # the base\n" in text
    assert "split: train}  # ours\n" in text
    second = compose.compose("b/copy.yaml", read(ON_CPU), imagine=False).spec.placement
    assert second.deepspeed == first.deepspeed
    assert second.paths == first.paths.model_copy(update={"run": str(here / "runs" / "copy")})


def test_a_copy_leaves_paths_that_mean_the_same_there(here: Path) -> None:
    write("chats.jsonl", "{}\n")
    text = BASE.replace("org/data", "chats.jsonl").replace("org/model", "~/model")
    write("a/x.yaml", text)
    write("a/chats.jsonl", "{}\n")
    assert cli.main(["copy", "a/x.yaml", "b/x.yaml"]) == 0
    assert Path("b/x.yaml").read_text() == text
    assert cli.main(["copy", "a/x.yaml", "a/y.yaml"]) == 0
    assert Path("a/y.yaml").read_text() == text
