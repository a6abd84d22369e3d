"""``galley cache``: what is in it, and what is removed; never what was used lately, never a run's own names."""

import os
import time
from pathlib import Path

import pytest

from galley.storage.cache import entry
from galley_launch import cli

DAY = 86_400


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with three entries, two of which were not used for forty days."""
    root = tmp_path / "cache"
    monkeypatch.setenv("GALLEY_CACHE", str(root))
    monkeypatch.chdir(tmp_path)
    for kind, key, days in (("data", "old", 40), ("data", "new", 0), ("models", "old", 40)):
        folder = root / kind / key
        folder.mkdir(parents=True)
        (folder / "tokens.npy").write_bytes(b"x" * 1000)
        os.utime(folder, (time.time() - days * DAY,) * 2)
    (root / "data" / ".old.lock").touch()
    return root


def remaining(root: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in root.glob("*/[!.]*"))


def test_it_is_listed_by_kind(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shared.parent / "run").mkdir()
    os.link(shared / "data" / "new" / "tokens.npy", shared.parent / "run" / "tokens.npy")
    assert cli.main(["cache"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][:6] == ["data", "2", "2", "kB", "1", "kB"]
    assert lines[2][:6] == ["models", "1", "1", "kB", "1", "kB"]
    assert lines[2][6:] == ["40", "days", "ago"]
    assert " ".join(lines[3]).startswith(f"3 kB in {shared}; removing all of it would free 2 kB")


def test_what_was_not_used_lately_is_removed(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "prune", "yes=true"]) == 0
    assert remaining(shared) == ["data/new"]
    printed = capsys.readouterr().out
    assert f"{shared}/data/old: 1 kB, used 40 days ago" in printed
    assert printed.endswith("removed 2 entries, 2 kB freed\n")
    assert cli.main(["cache", "prune"]) == 0
    assert capsys.readouterr().out == "nothing was idle for 30 days or longer\n"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["models"], ["data/new", "data/old"]),
        (["data", "older=41"], ["data/new", "data/old", "models/old"]),
        (["older=1"], ["data/new"]),
    ],
)
def test_of_one_kind_or_another_age(shared: Path, words: list[str], left: list[str]) -> None:
    assert cli.main(["cache", "prune", *words, "yes=true"]) == 0
    assert remaining(shared) == left


def test_nobody_there_to_be_asked(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "prune"]) == 2
    assert "galley: cache: asks before it removes anything, and nobody can answer here; add yes=true" in (
        capsys.readouterr().err
    )
    assert len(remaining(shared)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "nope"], "has nothing of the kind 'nope'; kinds: data, models"),
        (["clear"], "cache: 'clear' is not understood; write: galley cache, or galley cache prune"),
        (["older=3"], "cache: 'older=3' is not understood"),
        (["prune", "older=0"], "older: '0' is not a whole number from 1"),
        (["prune", "data", "models"], "cache: 'models' is an unexpected word"),
    ],
)
def test_what_is_not_understood(
    shared: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cache", *words]) == 2
    assert message in capsys.readouterr().err
    assert len(remaining(shared)) == 3


def test_what_is_used_is_new_again(shared: Path) -> None:
    entry(shared, "data", "old", lambda folder: None, "")
    assert cli.main(["cache", "prune", "yes=true"]) == 0
    assert remaining(shared) == ["data/new", "data/old"]


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "none"))
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out.startswith(f"nothing in {tmp_path}/none yet")
