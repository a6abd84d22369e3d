"""``galley plan`` ends with its summary, which names all that was changed; ``files=all`` prints the files."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from galley_launch import cli
from galley_launch.base.options import read
from galley_launch.plan import compose
from galley_launch.recipe.changes import changes

RECIPE = "smollm2-135m-lora"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def screen(*words: str, columns: int = 80) -> list[str]:
    """The lines that a terminal of that width shows, both streams in the order in which they come."""
    leader, follower = pty.openpty()
    code = f"import os; os.environ['COLUMNS'] = '{columns}'; from galley_launch.cli import main; main({list(words)!r})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    data = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        data += part
    os.close(leader)
    assert process.wait() == 0
    return data.decode().replace("\r\n", "\n").splitlines()


KEYS = ["run", "model", "data", "method", "batch", "for", "on"]


@pytest.mark.parametrize("files", [(), ("files=all",)])
def test_the_plan_ends_with_its_summary(files: tuple[str, ...]) -> None:
    lines = screen("plan", RECIPE, "device=cpu", "ranks=2", "lr=1e-4", *files)
    assert lines[-1] == "changed  optimizer.lr 5e-4 → 1e-4"
    last = [line.split()[0] for line in lines[-20:] if line[:1].strip()]
    assert last[-8:] == [*KEYS, "changed"]
    assert any(line.startswith('  "schema"') for line in lines) == bool(files)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_summary_fits_the_terminal(columns: int) -> None:
    lines = screen("plan", RECIPE, "gpus=0", "tracking.wandb.project=x", columns=columns)
    start = next(number for number, line in enumerate(lines) if line.startswith("run      "))
    assert all(len(line) <= columns or len(line.split()) == 1 for line in lines[start:])  # a path is not broken


def test_everything_that_was_changed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["steps=20", "lr=1e-4", "deepspeed=zero1", "targets=[q_proj,v_proj]", "wandb=chats", "packing=true"]
    assert cli.main(["plan", RECIPE, "device=cpu", *words]) == 0
    err = capsys.readouterr().err
    shown = [line[9:] for line in err[err.index("changed  ") :].splitlines()]
    assert sorted(shown) == [
        "deepspeed zero2 → zero1",
        "duration.epochs 2 → (not set)",
        "duration.steps (not set) → 20",
        "method.targets all-linear → [q_proj,v_proj]",
        "optimizer.lr 5e-4 → 1e-4",
        "tracking.wandb.project (not set) → chats",
    ]


def test_a_run_that_goes_on_names_what_changes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = compose.compose(RECIPE, read(["device=cpu", "name=mine"]), imagine=False)
    made.run.root.mkdir(parents=True)
    made.run.spec.write_text(made.spec.to_json())
    assert cli.main(["plan", "mine", "epochs=3", "lr=0.0005"]) == 0
    err = capsys.readouterr().err
    assert err.endswith("changed  duration.epochs 2 → 3\n")


@pytest.mark.parametrize("spelling", ["2e-4", "0.0002", "0.00020"])
def test_a_number_that_is_written_otherwise_is_no_change(spelling: str) -> None:
    assert changes({"optimizer": {"lr": "2e-4"}}, {"optimizer": {"lr": spelling}}) == ()
    assert changes({}, {"optimizer": {"lr": spelling}}) == ()  # the default
    assert changes({}, {"optimizer": {"lr": "3e-4"}}) == ("optimizer.lr 0.0002 → 3e-4",)


def test_files_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", RECIPE, "files=some"]) == 2
    assert "files: 'some' is neither all nor none" in capsys.readouterr().err
    assert cli.main(["run", RECIPE, "files=all"]) == 2
    assert "run: takes no key 'files'" in capsys.readouterr().err
