"""``galley prepare``: what it shows is what would be trained on, and ``galley run`` goes on from it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from galley.contract.records import ExitRecord, read_exit, write_exit
from galley.contract.rundir import RunDir
from galley.data.prepared import read_manifest
from galley_launch import cli
from galley_launch.runs import runs

ANSWERS = [f"The answer is {number}\nand no other." for number in range(40)]
Words = Callable[..., list[str]]


@pytest.fixture
def words(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """The words after ``galley prepare`` for a run ``x`` of rows with :data:`ANSWERS`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    roles = ("user", "assistant")
    rows = [[f"What is {number}?", answer] for number, answer in enumerate(ANSWERS)]
    lines = [[{"role": role, "content": text} for role, text in zip(roles, row, strict=True)] for row in rows]
    Path("rows.jsonl").write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    fixed = [f"model.path={model_folder}", "data.path=rows.jsonl", "data.held_out=0.1", "steps=60"]
    return lambda *more, length=128: ["demo", "device=cpu", "name=x", *fixed, f"max_length={length}", *more]


def test_it_shows_what_is_trained_on(words: Words, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", *words("examples=3")]) == 0
    printed = capfd.readouterr().out.splitlines()
    manifest = read_manifest(RunDir(Path("runs/x")))
    facts = manifest.train
    counts = f"{facts.tokens:,} tokens, {facts.supervised / facts.tokens:.1%} of them trained on"
    (line,) = (line for line in printed if line.startswith("data: train: "))
    assert line.startswith("data: train: 36 of 36 rows, ")
    assert line.endswith(counts)
    heads = [number for number, line in enumerate(printed) if line.startswith("data: row ")]
    assert len(heads) == 3
    for head in heads:
        row = int(printed[head].split()[2].rstrip(":")) - 1
        first, second = ANSWERS[row].split("\n")
        end = printed.index(f"+ {second}<|im_end|>", head)
        assert [line for line in printed[head:end] if line.startswith("+")] == [f"+ {first}"]
        assert f"  What is {row}?<|im_end|>" in printed[head:end]
    assert cli.main(["prepare", *words("examples=3")]) == 0
    again = capfd.readouterr().out.splitlines()
    begin = printed.index(line)
    assert again[: len(printed[begin:]) - 2] == printed[begin:-2]  # counts and rows; then "data: ready in N s"
    assert printed[-1] == "run x is prepared: runs/x/data; galley run with the same words trains"


def test_the_run_goes_on_from_it(words: Words, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing was trained yet: a failure, and another task in the same run, are forgotten by the next preparation."""
    assert cli.main(["prepare", *words(length=4)]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("galley: data.max_length: ")
    run = RunDir(Path("runs/x"))
    record = read_exit(run.attempt(0).exit)
    assert record is not None
    assert (record.verdict, runs.state(run).state) == ("failed", "failed")
    assert cli.main(["prepare", *words("examples=0")]) == 0
    assert "data: row" not in capfd.readouterr().out
    assert runs.state(run).state == "prepared"
    assert cli.main(["plan", *words()]) == 0
    assert "attempts/0001" in capfd.readouterr().out
    first = run.attempt(1)
    first.root.mkdir()
    write_exit(first.exit, ExitRecord("done", exported=True))
    before = run.spec.read_bytes()
    assert cli.main(["prepare", *words()]) == 0
    assert capfd.readouterr().out.endswith("run x is trained: nothing is left to prepare\n")
    assert run.spec.read_bytes() == before


def test_a_cluster_is_for_submit(words: Words, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", *words("cluster=venv")]) == 2
    assert "galley submit RECIPE cluster=venv" in capfd.readouterr().err
