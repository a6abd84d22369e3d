"""Names that mean something to a shell, to sbatch or to nobody, wherever a name can stand.

Each is refused in one line, or arrives as it is, as exactly one word. Rendered scripts are run by bash with commands
that only write down how they were called; nothing else may run.
"""

import itertools
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from launch.hostile import (
    ANY,
    BASES,
    HOSTILE,
    SECRET,
    check_folder,
    check_node,
    check_profile,
    is_file_name,
    planned,
    put,
    strings,
)
from launch.submitting import here, sourced, submission

from galley.contract.rundir import RunDir
from galley_launch import cli
from galley_launch.base.grammar import is_text
from galley_launch.cluster.profile import Cluster
from galley_launch.job import begin
from galley_launch.recipe.schema import Recipe
from galley_launch.submit import scripts as jobs
from galley_launch.submit import submission as submitting

__all__ = ["here"]
LONG = [pytest.mark.slow, pytest.mark.long]
TURNS = [0, *(pytest.param(number, marks=LONG) for number in (1, 2, 3))]


@pytest.fixture(autouse=True)
def _in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": "17", "JOB_NODELIST": "n[1-2]", "JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_every_field_that_takes_text_is_looked_at() -> None:
    found = {path for path, _ in strings(Cluster)}
    assert {"partition", "modules", "container.image", "side.partition", "variables", "directives"} <= found
    assert {"model.path", "data.split", "method.targets", "about"} <= {path for path, _ in strings(Recipe)}


@pytest.mark.parametrize("turn", TURNS)
def test_hostile_names_in_a_profile(turn: int, here: Path) -> None:
    """Each with one kind of profile; all with all kinds among the long tests."""
    bases = itertools.cycle([*sorted(BASES)[turn:], *sorted(BASES)[:turn]])
    for number, (text, base) in enumerate(zip(HOSTILE, bases, strict=False)):
        check_profile(text, base, here / str(number))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY, st.sampled_from(sorted(BASES)))
@example("--hold--hold", "apptainer")
def test_any_name_in_a_profile(here: Path, text: str, base: str) -> None:
    check_profile(text, base, Path(tempfile.mkdtemp(dir=here)) / "root")


FOLDERS = [text for text in HOSTILE if is_file_name(text) and "\ud800" not in text]


@pytest.mark.parametrize("turn", TURNS)
def test_hostile_names_of_folders(turn: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of every one; node.sh of a quarter of them in each turn."""
    monkeypatch.setenv("MY_TOKEN", SECRET)
    bases = itertools.cycle([*sorted(BASES)[turn:], *sorted(BASES)[:turn]])
    for number, (text, base) in enumerate(zip(FOLDERS, bases, strict=False)):
        run = check_folder(text, base, here / str(number), monkeypatch)
        if run and number % 4 == turn:
            check_node(run, here / str(number))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY.filter(is_file_name), st.sampled_from(sorted(BASES)))
def test_any_name_of_a_folder(here: Path, monkeypatch: pytest.MonkeyPatch, text: str, base: str) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    root = Path(tempfile.mkdtemp(dir=here))
    run = check_folder(text, base, root, monkeypatch)
    if run:
        check_node(run, root)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY.filter(is_text))
def test_what_bash_reads_is_what_was_written(here: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The files that jobs source: what begin leaves, and the secrets."""
    folder = Path(tempfile.mkdtemp(dir=here))
    attempt = RunDir(folder / text.replace("/", "|")[:50]).attempt(1)
    wanted = {"GALLEY_HEAD": text, "GALLEY_EXPORT_STEP": text}
    found = sourced(begin._open(attempt, None, wanted), *wanted, "GALLEY_ATTEMPT_DIR", "GALLEY_LOGS")
    logs = str(attempt.logs).replace("%", "%%")
    assert found == {
        name: os.fsencode(value)
        for name, value in {**wanted, "GALLEY_ATTEMPT_DIR": str(attempt.root), "GALLEY_LOGS": logs}.items()
    }
    monkeypatch.setenv("MY_TOKEN", text)
    run = RunDir(folder / "run")
    assert submitting.keep_secrets(run, ["MY_TOKEN", "ABSENT"]) == ["MY_TOKEN"]
    assert sourced(jobs.secrets_file(run), "MY_TOKEN") == {"MY_TOKEN": os.fsencode(text)}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether ``galley plan`` refuses, which it does in one line; no other line, and no plan."""
    capsys.readouterr()
    status = cli.main(["plan", *words])
    out, err = capsys.readouterr()
    assert status in (0, 2)
    assert (status == 0) == bool(out)
    if status:
        assert re.fullmatch(r"galley: [^\x00-\x1f\x7f\x85\u2028\u2029]+\n", err), err
    return status == 2


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=LONG)])
def test_hostile_names_in_a_recipe(every: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They reach run.json as they are, and scripts only where a container mounts them."""
    tree = yaml.safe_load((here / "my.yaml").read_text())
    scripts = {name: text for name, text in planned(BASES["host"])[1].items() if name.startswith("jobs/")}
    for number, (path, shape) in enumerate(strings(Recipe)):
        for text in filter(is_text, HOSTILE[number % every :: every]):
            (here / "my.yaml").write_text(yaml.safe_dump(put(tree, path, shape, text), allow_unicode=True))
            if refused(["my.yaml", "cluster=x"], capsys):
                continue
            made, todo = submission("my.yaml", "cluster=x")
            assert {name: todo.files[name] for name in scripts} == scripts
            assert json.loads(todo.files["run.json"]) == made.spec.model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize("key", ["name", "runs", "cluster", "cluster.account", "cluster.side.partition", "data.split"])
def test_hostile_words_on_the_command_line(key: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan or one line; a name that no file can have is refused too."""
    before = sorted(here.rglob("*"))
    for text in HOSTILE[len(key) % 2 :: 2] if key.startswith("cluster.") else HOSTILE:
        words = [f"{key}={text}"] if key == "cluster" else ["cluster=venv", f"{key}={text}"]
        assert refused(["my.yaml", *words], capsys) or is_text(text)
    assert sorted(here.rglob("*")) == before
