"""Recipes: found, put together with those that they extend, listed."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.contract.errors import UserError
from galley_launch import cli
from galley_launch.base import assets
from galley_launch.base.options import read
from galley_launch.base.yaml_text import Tree, merged, read_yaml
from galley_launch.plan import compose, request
from galley_launch.recipe import catalogue
from galley_launch.recipe.schema import Recipe, build

BASE = "model: {path: org/model}\ndata: {path: org/data}\nbatch: {samples: 16}\nduration: {epochs: 2}\n"
ON_CPU = ["device=cpu", "ranks=1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a folder of recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "recipes").mkdir()
    return tmp_path


def write(path: str, text: str) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path)


def refusal(name: str, *words: str) -> str:
    with pytest.raises(UserError) as error:
        compose.compose(name, read([*ON_CPU, *words]), imagine=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def settled(name: str, *words: str) -> Recipe:
    return request.resolve(name, read(words)).recipe


# Extending


def test_what_a_recipe_says_comes_before_what_it_extends(here: Path) -> None:
    write("recipes/base.yaml", BASE + "about: base\noptimizer: {lr: 1e-3, clip: 2}\nmicro_batch: 4\n")
    write("recipes/child.yaml", "extends: base\noptimizer: {lr: 1e-4}\ndata: {held_out: 0.1}\nmethod: {kind: full}\n")
    recipe = settled("child")
    assert (recipe.optimizer.lr, recipe.optimizer.clip, recipe.micro_batch) == (1e-4, 2, 4)
    assert (recipe.data.path, recipe.data.held_out, recipe.method.kind) == ("org/data", 0.1, "full")
    assert recipe.about == "base"
    assert settled("base").optimizer.lr == 1e-3


def test_one_answer_to_a_question_takes_the_place_of_another(here: Path) -> None:
    write("recipes/base.yaml", BASE)
    write("recipes/child.yaml", "extends: base\nbatch: {tokens: 8192}\nduration: {steps: 20, patience: 2}\n")
    recipe = settled("child")
    assert (recipe.batch.tokens, recipe.batch.samples) == (8192, None)
    assert (recipe.duration.steps, recipe.duration.epochs, recipe.duration.patience) == (20, None, 2)
    assert settled("child", "epochs=3").duration.steps is None
    write("recipes/kept.yaml", "extends: base\nduration: {patience: 2}\n")
    assert settled("kept").duration.epochs == 2


def test_lists_and_nulls_are_taken_whole(here: Path) -> None:
    write("recipes/base.yaml", BASE + "method: {targets: [a, b]}\ncadence: {save_every: 5}\n")
    write("recipes/child.yaml", "extends: base\nmethod: {targets: [c]}\ncadence: {save_every: null}\n")
    recipe = settled("child")
    assert (recipe.method.targets, recipe.cadence.save_every) == (["c"], None)


def test_a_chain_ends_in_a_shipped_recipe(here: Path) -> None:
    write("recipes/mine.yaml", "extends: qwen3-4b-qlora\noptimizer: {lr: 1e-5}\n")
    write("far/away/last.yaml", "extends: ../../recipes/mine.yaml\nseed: 7\n")
    recipe, source = settled("far/away/last.yaml"), catalogue.find("far/away/last.yaml")
    assert (recipe.model.path, recipe.optimizer.lr, recipe.seed) == ("Qwen/Qwen3-4B", 1e-5, 7)
    shipped = assets.folder("recipes") / "qwen3-4b-qlora.yaml"
    assert source.extends == ("far/away/../../recipes/mine.yaml", str(shipped))
    assert (source.label, source.stem) == ("far/away/last.yaml", "last")


def test_a_recipe_can_extend_the_shipped_one_of_its_own_name(here: Path) -> None:
    write("recipes/qwen3-4b-qlora.yaml", "extends: qwen3-4b-qlora\noptimizer: {lr: 1e-5}\n")
    assert settled("qwen3-4b-qlora").optimizer.lr == 1e-5
    assert settled("qwen3-4b-qlora").method.kind == "qlora"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a\n"}, "recipes/a.yaml: extends: goes round in a circle: recipes/a.yaml, which extends"),
        (
            {"a": "extends: b\n", "b": "extends: a\n"},
            "recipes/b.yaml: extends: goes round in a circle: recipes/a.yaml, which extends recipes/b.yaml, which "
            "extends recipes/a.yaml; remove one extends",
        ),
        (
            {"a": "extends: b\n", "b": "extends: c\n", "c": "extends: ./b.yaml\n"},
            "recipes/c.yaml: extends: goes round in a circle: recipes/b.yaml, which extends recipes/c.yaml, which "
            "extends recipes/b.yaml",
        ),
        ({"a": "extends: qwen3-4b-qlor\n"}, "extends: no recipe 'qwen3-4b-qlor'; did you mean 'qwen3-4b-qlora'?"),
        ({"a": "extends: no.yaml\n"}, "recipes/a.yaml: extends: no file recipes/no.yaml; correct the path"),
        ({"a": "extends: [b]\n"}, "recipes/a.yaml: extends: ['b'] is not a recipe; write a name (see galley recipes)"),
        ({"a": "extends:\n"}, "recipes/a.yaml: extends: None is not a recipe"),
        ({"a": "extends: b\n", "b": "x: [\n"}, "recipes/b.yaml:2: not readable as YAML"),
        ({"a": "extends: b\nsection: 1\n", "b": BASE}, "recipes/a.yaml: no such key: 'section'"),
        ({"a": "extends: b\n", "b": BASE + "optimzer: {lr: 1}\n"}, "recipes/b.yaml: no such key: 'optimzer'; did you"),
        (
            {"a": "extends: b\noptimizer: {clip: 1}\n", "b": BASE + "optimizer: {lrr: 1}\n"},
            "recipes/b.yaml: optimizer: no such key: 'lrr'; did you mean 'lr'?",
        ),
        (
            {"a": "extends: b\nseed: 1\n", "b": BASE + "optimizer: {lr: fast}\n"},
            "recipes/b.yaml: optimizer.lr: 'fast' is not a number",
        ),
        (
            {"a": "extends: b\noptimizer: {lr: slow}\n", "b": BASE + "optimizer: {lr: fast}\n"},
            "recipes/a.yaml: optimizer.lr: 'slow' is not a number",
        ),
        ({"a": "extends: b\ndata: 3\n", "b": BASE}, "recipes/a.yaml: data: '3' is not a section"),
    ],
)
def test_what_cannot_be_extended_is_one_line(files: dict[str, str], message: str, here: Path) -> None:
    for name, text in files.items():
        write(f"recipes/{name}.yaml", text)
    assert message in refusal("a")


def test_a_word_of_the_command_line_is_blamed_itself(here: Path) -> None:
    write("recipes/a.yaml", "extends: b\n")
    write("recipes/b.yaml", BASE + "optimizer: {lr: 1e-4}\n")
    assert refusal("a", "lr=fast").startswith("command line: optimizer.lr: 'fast' is not a number")


def test_each_file_names_what_is_beside_it(here: Path) -> None:
    """The same relative names in both folders: each means the file beside the recipe that wrote it."""
    for folder, stage in (("low", 1), ("high", 3)):
        write(f"{folder}/chats.jsonl", "{}\n")
        write(f"{folder}/held.jsonl", "{}\n")
        write(f"{folder}/zero.json", f'{{"zero_optimization": {{"stage": {stage}}}}}')
    text = BASE.replace("org/data", "chats.jsonl").replace("org/model", "Qwen/Qwen3-4B") + "deepspeed: ./zero.json\n"
    write("low/base.yaml", text)
    write("high/child.yaml", "extends: ../low/base.yaml\ndata: {held_out_path: held.jsonl}\n")
    placement = compose.compose("high/child.yaml", read(ON_CPU), imagine=False).spec.placement
    assert placement.paths.data == str(here / "low" / "chats.jsonl")
    assert placement.paths.held_out == str(here / "high" / "held.jsonl")
    assert placement.zero_stage == 1
    words = [*ON_CPU, "data.path=chats.jsonl", "deepspeed=./zero.json"]
    typed = compose.compose("high/child.yaml", read(words), imagine=False).spec
    assert (typed.placement.paths.data, typed.placement.zero_stage) == (str(here / "high" / "chats.jsonl"), 3)
    assert typed.task.data.path == "chats.jsonl"


def test_a_run_remembers_the_recipe_that_was_named(here: Path) -> None:
    write("recipes/a.yaml", "extends: b\n")
    write("recipes/b.yaml", BASE)
    spec = compose.compose("a", read([*ON_CPU, "deepspeed=zero0"]), imagine=False).spec
    assert (spec.origin.recipe, spec.name) == ("recipes/a.yaml", "a")


def test_show_prints_the_whole_recipe_and_what_it_extends(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("recipes/a.yaml", "# Mine.\nextends: b\nseed: 5\n")
    write("recipes/b.yaml", BASE)
    assert cli.main(["show", "a", "lr=1e-5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Mine.\nExtends  recipes/b.yaml\n\n# The pretrained model")
    assert "\n  path: org/model\n" in out
    shown = build(read_yaml(out[out.index("model:") :], "show"), "show")
    assert (shown.seed, shown.optimizer.lr, shown.batch.samples) == (5, 1e-5, 16)


KEYS = st.sampled_from(["batch", "samples", "tokens", "x", "y"])
LEAVES = st.sampled_from([None, "1", "2"])
TREES = st.dictionaries(KEYS, LEAVES | st.dictionaries(KEYS, LEAVES, max_size=3), max_size=3)


@settings(max_examples=50, deadline=None)
@given(TREES, TREES)
def test_merging_takes_what_was_said_last_and_changes_neither(base: Tree, over: Tree) -> None:
    before = repr((base, over))
    result = merged(base, over)
    assert repr((base, over)) == before
    assert merged(result, over) == result
    assert merged(base, {}) == base
    assert merged({}, over) == over
    for key, value in over.items():
        if not isinstance(value, dict) or not isinstance(base.get(key), dict):
            assert result[key] == value
    assert {key: result[key] for key in base if key not in over} == {key: base[key] for key in base if key not in over}


# Listing


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Names that ``galley recipes WORDS`` prints."""
    assert cli.main(["recipes", *words]) == 0
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]


def test_every_recipe_is_listed_by_family_and_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = listed(capsys)
    assert sorted(names) == sorted(catalogue.recipes())
    qwen = [name for name in names if name.startswith("qwen")]
    assert qwen.index("qwen3-0.6b-full") < qwen.index("qwen3-4b-qlora") < qwen.index("qwen3-32b-qlora")
    families = [name[:4] for name in names]
    assert families == sorted(families)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("smollm2-135m-lora", "smollm2-1.7b-full"),
        ("llama3.2-1b-lora", "llama3.1-8b-lora"),
        ("qwen3-4b-qlora", "qwen3-30b-a3b-lora"),
        ("llama3.1-8b-full", "llama3.1-8b-lora"),
        ("a-100b", "b-1b"),
        ("", "x"),
    ],
)
def test_sizes_are_numbers(small: str, large: str) -> None:
    assert catalogue.order(small) < catalogue.order(large)


def test_every_word_has_to_match_somewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"qwen3-4b-qlora", "qwen3-32b-qlora"} <= set(listed(capsys, "Qwen", "QLORA"))
    assert all("qwen" in name and "qlora" in name for name in listed(capsys, "Qwen", "QLORA"))
    assert set(listed(capsys, "meta-llama", "zero3", "full")) >= {"llama3.1-8b-full"}
    assert "qwen3-4b-qlora" in listed(capsys, "8 GB")
    for wrong in (["qwen", "zzz"], ["zzz"]):
        assert cli.main(["recipes", *wrong]) == 2
        assert f"recipes: none matches '{' '.join(wrong)}'" in capsys.readouterr().err


def test_memory_is_found_however_it_is_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = set(listed(capsys, "8GB"))
    assert small == set(listed(capsys, "8 GB")) == set(listed(capsys, "8gb")) == set(listed(capsys, "8-GB"))
    assert {"qwen3-4b-qlora", "gemma3-1b-lora"} <= small
    assert not small & set(listed(capsys, "24GB"))
    assert "llama3.1-8b-lora" in listed(capsys, "24GB", "lora")
    assert "mistral-7b-full" in listed(capsys, "2x24GB")
    assert set(listed(capsys, "nodes")) == {"qwen3-14b-full", "llama3.1-70b-full"} == set(listed(capsys, "multi-node"))


@pytest.mark.parametrize("word", ["moe", "MoE", "mixture", "mixture of experts", "a3b"])
def test_mixtures_of_experts_are_found(word: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, word) == ["qwen3-30b-a3b-lora"]


def test_the_table_has_gpus_and_memory_of_the_headers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row[0]: row[4:6] for row in catalogue.rows([])[0]}
    assert rows["qwen3-4b-qlora"] == ("1x8GB", "6.5GB")
    assert rows["llama3.1-70b-full"] == ("16x8x40GB", "23.0GB")
    assert rows["mistral-7b-full"] == ("2x24GB", "8.8GB")
    assert [name for name, row in rows.items() if not all(row)] == ["demo"]


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
def test_the_table_fits_the_terminal(columns: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.isatty", lambda _stream: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        catalogue.listing([])
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= max(min(columns, 120), 62)
    assert all(column in lines[0] for column in ("recipe", "method", "GPUs", "memory", "about"))
    assert ("model" in lines[0]) == (columns >= 110)


def test_the_columns_line_up_and_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("recipes/mine.yaml", BASE + f"about: {'very ' * 40}long\n")
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    starts = [lines[0].index(column) for column in ("recipe", "model", "method", "zero", "about")]
    for line in lines[1:]:
        assert all(line[start - 2 : start].isspace() and line[start] != " " for start in starts[1:]), line
    assert next(line for line in lines if line.startswith("mine ")).endswith("…")


def test_a_broken_recipe_hides_no_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("recipes/bad.yaml", "a: [\n")
    write("recipes/half.yaml", "model: 3\nmethod: [x]\nabout: {a: b}\n")
    write("recipes/own.yaml", BASE + "about: of my own\n")
    assert {"half", "own", "demo"} <= set(listed(capsys))
    assert listed(capsys, "of my own") == ["own"]
    assert cli.main(["recipes"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("galley: note: recipes/bad.yaml:2: not readable as YAML")
    assert err.count("\n") == 1


def test_defaults_in_the_table_are_those_of_a_recipe(here: Path) -> None:
    write("recipes/least.yaml", BASE)
    row = next(row for row in catalogue.rows([])[0] if row[0] == "least")
    recipe = settled("least")
    assert row == ("least", recipe.model.path, recipe.method.kind, recipe.deepspeed, "", "", recipe.about)


def test_listing_imports_nothing_heavy() -> None:
    """What keeps it under 0.4 seconds: pydantic alone takes a tenth of one."""
    code = (
        "import sys; from galley_launch.cli import main; main(['recipes', 'qwen']); "
        "print([name for name in ('pydantic', 'rich', 'jinja2', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": _path()})
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def _path() -> str:
    return ":".join(path for path in sys.path if path)
