"""The list of sources: what a task names, in which format, and what for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prepare.conftest import rows, write_jsonl

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.prepare import sources
from galley.prepare.formats.chat import CHAT
from galley.prepare.sources import Source, check_sources, find_sources, list_sources, read_rows

Make = Callable[..., tuple[RunSpec, RunDir]]


def test_a_task_lists_its_sources(make_run: Make, tmp_path: Path) -> None:
    data, other = (write_jsonl(tmp_path / f"{name}.jsonl", rows(3)) for name in "ab")
    spec, _ = make_run("org/model", data)
    assert list_sources(spec) == [Source("data", str(data), CHAT, split="train", recognise=True)]
    spec, _ = make_run("org/model", "org/data", held_out_path=str(other), split="test")
    assert list_sources(spec) == [
        Source("data", "org/data", CHAT, split="test", recognise=True),
        Source("held_out", str(other), CHAT, split="validation", recognise=True),
    ]


def test_rows_of_a_source_say_where_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(2))
    found = [(number, row.where) for number, row in read_rows(Source("data", str(path), CHAT, split="train"))]
    assert found == [(0, f"{path}:1"), (1, f"{path}:2")]


def test_a_file_that_moved_is_looked_for_where_the_run_has_it_now(make_run: Make, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows(3))
    _, facts = find_sources(make_run("org/model", data)[0])
    moved = data.rename(tmp_path / "moved.jsonl")
    spec, _ = make_run("org/model", moved, name="moved")
    check_sources(facts, spec)
    moved.write_text("{}\n")
    with pytest.raises(UserError, match=r"moved\.jsonl: changed since the run began"):
        check_sources(facts, spec)
    moved.unlink()
    check_sources(facts, spec)


def test_columns_of_a_hub_data_set_in_capitals(
    make_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset

    records = [{"Id": n, "Question": None if n == 1 else f"q{n}", " Answer": f"a{n}"} for n in range(3)]
    monkeypatch.setattr(sources, "load_data", lambda *_: Dataset.from_list(records))
    monkeypatch.setattr(sources, "pin_data", lambda *_: "0" * 40)
    ((source,), _) = find_sources(make_run("org/model", "org/data")[0])
    read = [row for _, row in read_rows(source)]
    assert "data: columns of org/data that are not read: Id\n" in capsys.readouterr().out
    assert [[message["content"] for message in row.messages] for row in read] == [["q0", "a0"], [], ["q2", "a2"]]
    assert read[1].where == "org/data, row 1"
    assert read[1].notes == {"rows dropped, for their `question` is null": 1}
