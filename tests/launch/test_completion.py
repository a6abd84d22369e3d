"""Completion: the words after ``galley``, from the shells themselves where they are installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from galley_launch import cli
from galley_launch.completion import SCRIPTS, _settings, candidates
from galley_launch.recipe import catalogue
from galley_launch.recipe.schema import keys
from galley_launch.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text("about: x\n")
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "hpc.yaml").write_text("about: x\n")
    return tmp_path


def test_a_verb_comes_first() -> None:
    assert set(candidates([""], VERBS)) == {*VERBS, "--help", "--version"}
    assert candidates(["st"], VERBS) == ["status", "stop"]
    assert candidates(["nothing", ""], VERBS) == []


@pytest.mark.parametrize("verb", ["plan", "run", "submit"])
def test_recipes_and_runs_follow(verb: str) -> None:
    assert set(candidates([verb, ""], VERBS)) == {*catalogue.recipes(), "own", "mine", "other"}
    assert candidates([verb, "smollm2-1.7"], VERBS) == ["smollm2-1.7b-full"]


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "cancel", "why", "report", "export", "forget"])
def test_runs_follow(verb: str) -> None:
    assert candidates([verb, ""], VERBS) == ["mine", "other"]


def test_further_places() -> None:
    assert candidates(["forget", "mine", "o"], VERBS) == ["other"]
    assert candidates(["status", "mine", "o"], VERBS) == []
    assert {"venv", "hpc"} <= set(candidates(["clusters", ""], VERBS))
    assert candidates(["copy", "cluster", "hp"], VERBS) == ["hpc"]
    assert candidates(["completion", ""], VERBS) == sorted(SCRIPTS)
    assert "own" in candidates(["show", ""], VERBS)
    assert "mine" not in candidates(["show", ""], VERBS)


def test_keys_follow_a_recipe() -> None:
    found = candidates(["run", "own", ""], VERBS)
    assert {"lr=", "optimizer.lr=", "gpus=", "deepspeed=", "tracking.wandb.project="} <= set(found)
    assert "lr=" not in candidates(["run", "own", "lr=1", ""], VERBS)
    assert candidates(["run", "own", "--optimizer.l"], VERBS) == ["--optimizer.layer_decay=", "--optimizer.lr="]
    assert candidates(["status", "mine", "ru"], VERBS) == ["runs="]


def test_every_key_of_a_recipe_is_offered() -> None:
    assert set(_settings()) == {key for key, paths in keys().items() if len(paths) == 1}


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("method.kind=q", ["method.kind=qlora"]),
        ("packing=", ["packing=false", "packing=true"]),
        ("deepspeed=zero3_o", ["deepspeed=zero3_offload_cpu", "deepspeed=zero3_offload_nvme"]),
        ("--deepspeed=zero1", ["--deepspeed=zero1"]),
        ("cluster=h", ["cluster=hpc"]),
        ("init_from=m", ["init_from=mine"]),
        ("device=", ["device=cpu", "device=cuda"]),
        ("lr=", []),
        ("nonsense=", []),
    ],
)
def test_values_follow_a_key(word: str, found: list[str]) -> None:
    assert candidates(["plan", "own", word], VERBS) == found


def test_a_value_may_stand_apart() -> None:
    assert candidates(["plan", "own", "--method.kind", "ql"], VERBS) == ["qlora"]


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert capsys.readouterr().err == "galley: completion: 'tcsh' is not a known shell; use one of bash, zsh, fish\n"


def test_tab_does_not_wait_for_pydantic() -> None:
    code = (
        "import sys; from galley_launch.cli import main; main(['completion', 'words', 'plan', 'own', 'l']); "
        "print(json.dumps([name for name in ('pydantic', 'fire', 'rich') if name in sys.modules]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, env=environment, check=True
    )
    assert "lr=" in done.stdout.split()
    assert json.loads(done.stdout.splitlines()[-1]) == []


# The shells themselves


@pytest.fixture
def shell(here: Path) -> dict[str, str]:
    """An environment whose ``galley`` is this checkout's."""
    binary = here / "bin" / "galley"
    binary.parent.mkdir()
    code = "import sys; from galley_launch.cli import main; sys.exit(main())"
    binary.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    binary.chmod(0o755)
    path = f"{binary.parent}:{os.environ['PATH']}"
    return dict(os.environ) | {"PATH": path, "PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}


LINES = [
    ("galley rep", ["report"]),
    ("galley run smollm2-1.7", ["smollm2-1.7b-full"]),
    ("galley logs ", ["mine", "other"]),
    ("galley logs mine --ra", ["--rank="]),
    ("galley plan own lr", ["lr="]),
]


@pytest.mark.parametrize(("line", "found"), [*LINES, ("galley plan own deepspeed=zero3_h", ["zero3_hpz"])])
def test_bash(line: str, found: list[str], shell: dict[str, str]) -> None:
    """Sourced, and asked as bash asks; after an equals sign it wants the rest only."""
    script = (
        'eval "$(galley completion bash)"; COMP_LINE=$1; COMP_POINT=${#1}; _galley; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script, "_", line], capture_output=True, text=True, env=shell, check=True)
    assert (done.stdout.split(), done.stderr) == (found, "")
    registered = 'eval "$(galley completion bash)"; complete -p galley'
    done = subprocess.run(["bash", "-c", registered], capture_output=True, text=True, env=shell, check=True)
    assert done.stdout == "complete -o default -F _galley galley\n"


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(("line", "found"), [*LINES, ("galley plan own deepspeed=zero3_h", ["deepspeed=zero3_hpz"])])
def test_fish(line: str, found: list[str], shell: dict[str, str], here: Path) -> None:
    script = f"galley completion fish | source; complete -C '{line}'"
    done = subprocess.run(["fish", "-c", script], capture_output=True, text=True, env=shell | {"HOME": str(here)})
    assert done.stdout.split() == found


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh(shell: dict[str, str]) -> None:
    """Its own completion cannot be asked without a terminal: the script is read, and its function called."""
    script = (
        'compdef() { print "registered $*" }; _files() { print files }; compadd() { print -r -- "$@" }\n'
        'eval "$(galley completion zsh)"; words=(galley plan own lr); CURRENT=4; _galley\n'
        'words=(galley logs ""); CURRENT=3; _galley; words=(galley nothing x); _galley'
    )
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, env=shell, check=True)
    assert done.stdout.splitlines() == [
        "registered _galley galley",
        "-S  -- lr=",
        "--",
        "-S  --",
        "-- mine other",
        "files",
    ]
