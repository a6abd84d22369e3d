"""What is probably a mistake: rates that do not go with the method, runs of three steps, packages in ~/.local."""

from __future__ import annotations

import json
import os
import site
from pathlib import Path

import pytest

from galley_launch.cli import main
from galley_launch.plan import plan
from galley_launch.recipe import catalogue


def notes(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["plan", *words]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("galley: note: ")]


def write_rows(path: Path, count: int, words: int = 20) -> Path:
    row = {"messages": [{"role": "user", "content": "a word " * words}, {"role": "assistant", "content": "Yes."}]}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["smollm2-135m-lora", "device=cpu", f"data.path={write_rows(tmp_path / 'rows.jsonl', 20000)}"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["method.kind=full"], "was set for method.kind=lora"),
        (["method.kind=full", "lr=5e-5"], None),
        (["method.kind=full", "lr=0.3"], "far above what full fine-tuning takes"),
        (["lr=1000"], "far above what an adapter takes"),
        (["lr=1e-7"], "far below what an adapter takes"),
        (["method.kind=qlora"], None),
        (["name=lion", "lr=3e-3"], None),
        (["optimizer.name=lion", "lr=3e-3"], "far above"),
        (["optimizer.name=lion"], "optimizer.name=lion usually takes a third of AdamW's: set optimizer.lr=0.00017"),
        (["optimizer.name=lion", "lr=1e-4"], None),
        (["optimizer.name=adamw_8bit"], None),
        ([], None),
    ],
)
def test_a_rate_that_does_not_go_with_the_method_is_noted(
    base: list[str], capsys: pytest.CaptureFixture[str], words: list[str], says: str | None
) -> None:
    found = notes(capsys, *base, *words)
    assert [says in note and "optimizer.lr" in note for note in found if says] == ([True] if says else [])
    assert bool(found) is bool(says)


def test_a_recipe_that_extends_another_and_changes_its_method_keeps_no_rate_in_silence(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: smollm2-135m-lora\nmethod: {kind: full}\n")
    (note,) = notes(capsys, str(mine), *base[1:])
    assert "was set for method.kind=lora" in note
    assert "optimizer.lr=5e-05" in note


def test_no_shipped_recipe_has_a_rate_that_is_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = list(catalogue.recipes())
    assert len(names) >= 30
    for name in names:
        assert not [note for note in notes(capsys, name, "gpus=0") if "optimizer.lr" in note], name


def test_plan_says_that_two_hundred_rows_are_three_steps(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "rows.jsonl", 200, words=50)
    (note,) = notes(capsys, *base)
    assert "only about 3 optimizer steps" in note
    assert "set batch.samples=" in note


def test_where_data_are_prepared_plan_counts_instead_of_estimating(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "runs" / "smollm2-135m-lora" / "data" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"train": {"samples": 31}}))
    (note,) = notes(capsys, *base)
    assert "only 4 optimizer steps from 31 samples" in note


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"PAR1....", b'{"messages": 3}\n[1]\n"x"\n'])
def test_a_file_that_cannot_be_estimated_is_left_to_prepare(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    main(["plan", *base])
    assert "Traceback" not in capsys.readouterr().err


def test_packages_in_the_home_directory_are_kept_out_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    assert plan.without_user_packages() == {"PYTHONNOUSERSITE": "1"}
    monkeypatch.setenv("PYTHONNOUSERSITE", "")
    assert plan.without_user_packages() == {}
    monkeypatch.delenv("PYTHONNOUSERSITE")
    monkeypatch.setattr(site, "getusersitepackages", lambda: os.fspath(Path(plan.__file__).parents[1]))
    assert plan.without_user_packages() == {}
