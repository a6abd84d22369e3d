"""What the tests of clusters share: a user's folder without Slurm, plans, and how sbatch and bash read a script."""

import subprocess
from pathlib import Path

import pytest
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import RunDir
from galley_launch import cli, commands
from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.plan.plan import Plan

HUB = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "XDG_CACHE_HOME",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MODULEPATH",
)
RECIPE = "batch: {samples: 16}\nduration: {steps: 60}\nmodel: {path: ./model}\ndata: {path: chats.jsonl}\n"


RUN = RunDir(Path("runs/my"))
"""Of that recipe, in the current directory."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder and home, with a small recipe ``my.yaml`` and what it names."""
    for name in HUB:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compose, "_commit", lambda: None)
    lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay(folder: Path) -> None:
    """A recipe, some data, and a model without weights."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text('{"hidden_size": 64}')
    (folder / "model" / "model.safetensors").write_text("")
    (folder / "chats.jsonl").write_text("{}\n")
    (folder / "my.yaml").write_text(RECIPE)


def profile(name: str, text: str, folder: Path | None = None) -> Path:
    """Write a profile of the user's own, beside the recipes or into ``folder``."""
    path = (folder or Path("clusters")) / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def submission(recipe: str, *words: str) -> tuple[compose.Composed, Plan]:
    """What ``galley submit`` with these words would write and run."""
    made, todo, _ = commands._submission(recipe, read(words, submits=True))
    return made, todo.plan()


def argument(line: str) -> tuple[str | None, str]:
    """The next argument of an ``#SBATCH`` line and what follows it, as sbatch reads them.

    After ``_get_argument`` of Slurm's src/sbatch/opt.c: a backslash escapes anywhere, quotes group, an unquoted hash
    sign begins a comment, in the middle of a word too.
    """
    text, quote, escaped = "", "", False
    rest = line.lstrip()
    for number, each in enumerate(rest):
        if escaped:
            escaped = False
        elif each == "\\":
            escaped = True
            continue
        elif quote:
            if each == quote:
                quote = ""
                continue
        elif each in "'\"":
            quote = each
            continue
        elif each == "#":
            return text or None, ""
        elif each.isspace():
            return text, rest[number:]
        text += each
    assert not quote, f"sbatch would refuse this line: {line!r}"
    return text or None, ""


def options(script: str) -> list[list[str]]:
    """The arguments of every ``#SBATCH`` line, a list for each line; sbatch stops at the first command."""
    found = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            words, rest = [], line.removeprefix("#SBATCH")
            while (word := argument(rest))[0] is not None:
                words.append(str(word[0]))
                rest = word[1]
            found.append(words)
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return found


def option(script: str, name: str) -> list[str]:
    """Values of the option ``--NAME``, "" where it stands alone."""
    words = [word for line in options(script) for word in line]
    return [word.partition("=")[2] for word in words if word.partition("=")[0] == f"--{name}"]


def sourced(file: Path, *names: str) -> dict[str, bytes]:
    """Bytes of the variables that ``file`` sets, once bash has read it."""
    shows = "\n".join(f"printf '%s\\0' \"${name}\"" for name in names)
    command = ["bash", "-c", f'set -a; source "$1"; set +a\n{shows}', "bash", str(file)]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True)
    assert done.stderr == b""
    return dict(zip(names, done.stdout.split(b"\0")[:-1], strict=True))


def galley(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    capsys.readouterr()
    status = cli.main(list(words))
    return status, *capsys.readouterr()


def users_files(here: Path) -> list[Path]:
    return sorted(path for path in here.rglob("*") if not path.is_relative_to(here / "fakes"))


def refused(here: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a refusal, which changed no file."""
    before = users_files(here)
    status, out, err = galley(capsys, *words)
    assert (status, out, err.count("\n"), err[:8]) == (2, "", 1, "galley: ")
    assert users_files(here) == before
    return err[8:-1]


def submitted(fakes: Scenario) -> list[list[str]]:
    """Arguments of every job that was handed to sbatch."""
    return [call["argv"] for call in fakes.calls("sbatch") if "--test-only" not in call["argv"]]
