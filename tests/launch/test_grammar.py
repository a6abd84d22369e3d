"""The command line's grammar: three ways to write a setting, and Fire's traps closed."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.contract.errors import UserError
from galley_launch import cli
from galley_launch.base import words
from galley_launch.base.grammar import Verb, parse
from galley_launch.base.options import RESERVED
from galley_launch.base.yaml_text import read_names, read_value, read_yaml
from galley_launch.plan import request
from galley_launch.recipe.schema import Recipe, keys, resolve_key
from galley_launch.verbs import VERBS

WORDS = st.from_regex(re.compile(r"[a-z][a-z_.]{0,8}", re.ASCII), fullmatch=True).filter(
    lambda key: key not in RESERVED and key not in words.known()
)
VALUES = st.from_regex(re.compile(r"[A-Za-z0-9./_\[\],+:-]{1,12}", re.ASCII), fullmatch=True).filter(
    lambda value: not value.startswith("-")
)


def nothing_happened(run: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad command line gives."""
    before = sorted(run.rglob("*"))
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("galley: ")
    assert sorted(run.rglob("*")) == before
    return err


@settings(max_examples=40)
@given(st.dictionaries(WORDS, VALUES, max_size=5), st.data())
def test_three_spellings_are_one(wanted: dict[str, str], data: st.DataObject) -> None:
    argv = ["plan", "x.yaml"]
    for key, value in wanted.items():
        forms = [[f"{key}={value}"], [f"--{key}={value}"], [f"--{key.replace('_', '-')}", value]]
        argv += data.draw(st.sampled_from(forms))
    command = parse(argv, VERBS)
    assert command.positionals == ("x.yaml",)
    assert command.settings == tuple(f"{key}={value}" for key, value in wanted.items())


@given(st.permutations(["RECIPE", "lr=1e-4", "--seed=3", "deepspeed=zero3"]))
def test_order_does_not_matter(words: list[str]) -> None:
    command = parse(["plan", *words], VERBS)
    assert command.positionals == ("RECIPE",)
    assert set(command.settings) == {"lr=1e-4", "seed=3", "deepspeed=zero3"}


@pytest.mark.parametrize("value", ["1e3", "12e4567", "None", "true", "[1,2]", "0123", "1_000", "{'a': 1}", "-1", "a=b"])
def test_fire_does_not_touch_a_value(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def plan(recipe: str, *settings: str) -> cli.Todo:
        seen.append((recipe, settings))
        return cli.Todo(int)

    monkeypatch.setitem(VERBS, "plan", Verb(plan, "RECIPE", overrides=True))
    assert cli.main(["plan", "1e3", f"x={value}", "--sha", "12e4567"]) == 0
    assert seen == [("1e3", (f"x={value}", "sha=12e4567"))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "smollm2-135m-lora", "--dry-rn"], "--dry-rn has no value; write dry_rn=VALUE"),
        (["run", "smollm2-135m-lora", "--dry-rnu", "lr=1e-4"], "--dry-rnu has no value; write dry_rnu=VALUE"),
        (["run", "--dry-rnu", "smollm2-135m-lora"], "run: RECIPE is missing; write: galley run RECIPE"),
        (["plan", "smollm2-135m-lora", "-x"], "'-x' is not an option"),
        (["plan", "smollm2-135m-lora", "-"], "'-' is not an option"),
        (["plan", "smollm2-135m-lora", "--"], "'--' is not an option"),
        (["status", "x", "extra"], "status: 'extra' is an unexpected word"),
        (["status", "x", "lr=3"], "status: takes no key 'lr'; known: runs"),
        (["recipes", "lr=3"], "recipes: takes no key 'lr'; see galley recipes --help"),
        (["plan", "demo", "x.jsonl"], "plan: 'x.jsonl' is an unexpected word; write data.path=x.jsonl"),
        (["plan", "./x.jsonl"], "recipe: ./x.jsonl is not a recipe, which is a .yaml file; write data.path=./x.jsonl"),
        (["run", "m.gguf"], "recipe: m.gguf is not a recipe, which is a .yaml file; write model.path=m.gguf after"),
        (["plan"], "plan: RECIPE is missing; write: galley plan RECIPE"),
        (["plna", "x"], "no such command: 'plna'; did you mean 'plan'?"),
        (["_do"], "no such command: '_do'"),
        (["plan", "smollm2-135m-lora", "lr=1", "--lr", "2"], "lr is given twice; keep one of them"),
        (["plan", "smollm2-135m-lora", "lr=1", "optimizer.lr=2"], "lr and optimizer.lr are the same key"),
        (["plan", "smollm2-135m-lora", "rank=8"], "write method.rank=N for the adapter's rank"),
    ],
)
def test_a_bad_command_line_does_nothing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in nothing_happened(tmp_path, argv, capsys)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"], ["--help", "plan"], ["run", "x", "--help"]])
def test_help_teaches(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "galley run smollm2-135m-lora" in out or "galley plan smollm2-135m-lora" in out
    assert max(map(len, out.splitlines())) <= 120


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert cli.main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"galley {verb}")
        assert out.count(f"galley {verb}") > 1


def test_every_launch_option_is_some_verbs() -> None:
    assert {key for verb in VERBS.values() for key in verb.keys} == RESERVED


def test_reserved_keys_are_no_recipe_keys() -> None:
    assert RESERVED & set(Recipe.model_fields) == {"deepspeed"}  # The recipe's pairing, which deepspeed= overrides.
    assert not RESERVED - {"deepspeed"} & set(keys())


def test_a_unique_leaf_is_its_path() -> None:
    assert resolve_key("lr") == resolve_key("optimizer.lr") == "optimizer.lr"
    assert resolve_key("micro_batch") == "micro_batch"
    with pytest.raises(UserError, match=r"'kind' could mean method.kind or schedule.kind; write the whole path"):
        resolve_key("kind")


@pytest.mark.parametrize("known", sorted(keys()))
def test_a_misspelt_key_gets_a_suggestion(known: str) -> None:
    with pytest.raises(UserError, match=r"did you mean|is called"):
        resolve_key(known + "z")


@settings(max_examples=40)
@given(st.lists(st.from_regex(re.compile(r"[a-z]_[a-z_]{1,8}", re.ASCII), fullmatch=True), min_size=1))
def test_lists_take_brackets(items: list[str]) -> None:
    assert read_value("targets", f"[{','.join(items)}]") == items
    assert read_names(",".join(items)) == read_names(f"[{', '.join(items)}]") == items


@given(st.text(st.characters(codec="ascii", exclude_characters="[", categories=["L", "N", "P"]), min_size=1))
def test_a_value_is_the_string_that_was_typed(text: str) -> None:
    assert read_value("key", text) == (None if text == "null" else text)


def test_yaml_guesses_nothing() -> None:
    text = (
        "a: 1e-4\nb: 12:00:00\nc: 0123\nd: on\ne: no\nf: 1_000\ng: 2026-01-02\nh: ~\ni:\nj: 'null'\nk: null\nl: [1, b]"
    )
    assert read_yaml(text, "x.yaml") == {
        **{"a": "1e-4", "b": "12:00:00", "c": "0123", "d": "on", "e": "no", "f": "1_000", "g": "2026-01-02"},
        **{"h": None, "i": None, "j": "null", "k": None, "l": ["1", "b"]},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: not readable as YAML: 'a' is given twice"),
        ("a:\n  b: 1\n  b: 2", "x.yaml:3: not readable as YAML: 'b' is given twice"),
        ("a: [1, 2", "x.yaml:1: not readable as YAML"),
        ("a: b: c", "x.yaml:1: not readable as YAML"),
        ("- a", "x.yaml: holds no settings"),
        ("", "x.yaml: holds no settings"),
    ],
)
def test_bad_yaml_names_the_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_yaml(text, "x.yaml")
    assert str(error.value).startswith(message)


def test_a_tag_makes_no_object() -> None:
    assert read_yaml("a: !!python/object/apply:os.getcwd []\nb: !!int 3", "x.yaml") == {"a": [], "b": "3"}


def test_an_own_recipe_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = request.find("smollm2-135m-lora")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "smollm2-135m-lora.yaml").write_text("about: mine\n")
    assert request.find("smollm2-135m-lora").tree == {"about": "mine"} != shipped.tree
