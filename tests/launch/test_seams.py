"""A verb that this file alone adds, through the whole command line: one row of the table is all that it takes."""

from pathlib import Path

import pytest

from galley_launch import cli
from galley_launch.base.grammar import Verb
from galley_launch.base.options import Settings, read
from galley_launch.completion import candidates
from galley_launch.verbs import VERBS, Todo


def compare(run: str, *settings: str) -> Todo:
    """Print how a RUN compares with its neighbours.

    galley compare smollm2-135m-lora rank=1
    """
    return Todo(lambda: _compare(run, read(settings)))


def _compare(run: str, settings: Settings) -> int:
    print(f"{settings.options.base / run}, rank {settings.options.rank}, {dict(settings.overrides)}")
    return 0


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    row = Verb(compare, "RUN", frozenset(["runs", "rank"]), overrides=True, implied=frozenset(["follow"]))
    monkeypatch.setitem(VERBS, row.name, row)
    return tmp_path


def galley(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(list(words))
    return status, *capsys.readouterr()


def test_a_new_verb_runs(capsys: pytest.CaptureFixture[str]) -> None:
    done = galley(capsys, "compare", "mine", "--rank", "1", "lr=1e-4", "-f")
    assert done == (0, "runs/mine, rank 1, {'lr': '1e-4'}\n", "")


def test_a_new_verb_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = galley(capsys, "--help")
    assert (status, "  compare     Print how a RUN compares with its neighbours." in out.splitlines()) == (0, True)
    status, out, _ = galley(capsys, "compare", "--help")
    assert out.startswith("galley compare RUN [key=value …]\n\nPrint how a RUN compares")


def test_a_new_verb_is_completed(capsys: pytest.CaptureFixture[str]) -> None:
    assert candidates(["comp"], VERBS) == ["compare", "completion"]
    assert candidates(["compare", ""], VERBS) == ["mine"]
    assert {"rank=", "runs=", "lr="} <= set(candidates(["compare", "mine", ""], VERBS))
    assert galley(capsys, "completion", "words", "compare", "mine", "ra") == (0, "rank=\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "compare: RUN is missing; write: galley compare RUN"),
        (
            ["compare", "mine", "x"],
            "compare: 'x' is an unexpected word; write: galley compare RUN [key=value …]",
        ),
        (["compare", "mine", "step=3"], "compare: takes no key 'step'; known: rank, runs"),
        (["compare", "mine", "rank=x"], "rank: 'x' is not a whole number from 0; write rank=0, rank=1 …"),
        (["comparo", "mine"], "command line: no such command: 'comparo'; did you mean 'compare'?"),
    ],
)
def test_a_new_verb_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert galley(capsys, *words) == (2, "", f"galley: {message}\n")
