"""What prepare says about data before anybody trusts a run on them: each time, from the cache too."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import chat, rows, write_jsonl
from prepare.families import QWEN3, assistant, user

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import read_manifest
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]


def warned(made: tuple[RunSpec, RunDir], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Prepare, and give the warnings about the data, which are printed and in the manifest."""
    spec, run = made
    capsys.readouterr()
    work(spec, run, run.attempt(1))
    printed, lines = capsys.readouterr().out.splitlines(), [f"warning: {line}" for line in read_manifest(run).warnings]
    assert [line for line in printed if line in lines] == lines
    assert not [line for line in printed if "cannot learn to stop" in line]
    return lines


def test_held_out_rows_that_are_trained_on_are_counted(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = write_jsonl(tmp_path / "same.jsonl", [chat("Is ice cold?", "Yes")] * 100)
    lines = warned(make_run(model_folder, same, held_out=0.1), capsys)
    assert len(lines) == 1
    assert lines[0].startswith("warning: 10 of 10 held-out rows are training rows too, so the held-out loss")
    own = write_jsonl(tmp_path / "own.jsonl", rows(50))
    assert warned(make_run(model_folder, own, name="own", held_out=0.1), capsys) == []


@pytest.mark.parametrize("how", ["path", "link", "copy"])
def test_held_out_from_the_training_file_is_named(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(20))
    other = path if how == "path" else tmp_path / "other.jsonl"
    if how == "link":
        other.symlink_to(path)
    elif how == "copy":
        shutil.copy(path, other)
    for name in ("first", "cached"):
        lines = warned(make_run(model_folder, path, name=name, held_out_path=str(other)), capsys)
        same = "holds the same as the file" if how == "copy" else "is the file"
        assert lines[0] == f"warning: data.held_out_path {same} of data.path"
        assert lines[1].startswith("warning: 20 of 20 held-out rows are training rows too")


def test_some_overlap_of_two_files_is_counted(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(20))
    other = write_jsonl(tmp_path / "other.jsonl", [*rows(20)[3:6], chat("Question 1?", "Another answer")])
    spec, run = make_run(model_folder, path, held_out_path=str(other))
    (line,) = warned((spec, run), capsys)
    assert line.startswith("warning: 3 of 4 held-out rows are training rows too")
    facts = read_manifest(run).held_out
    assert facts is not None
    assert facts.overlap == 3


def test_what_is_left_out_or_muted_is_told_each_time(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[dict[str, Any]] = [
        {"messages": [user("a?"), assistant("A1", thinking="R1"), user("b?"), assistant("A2", weight=0)]},
        {"messages": [user("a?"), assistant("A1", reasoning="R1")], "tools": [{"name": "f", "extra": None}]},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*records, *rows(8)])
    for name in ("first", "second"):
        spec, run = make_run(model_folder, path, name=name)
        assert warned((spec, run), capsys) == [
            "warning: rows.jsonl: 1 `thinking` of assistant messages left out by the chat template",
            "warning: rows.jsonl: 1 `tools` of rows left out by the chat template",
            "warning: rows.jsonl: 1 `reasoning` of assistant messages left out by the chat template",
            "warning: rows.jsonl: 1 nulls in tools and tool calls left out, for Arrow pads with them "
            "(give a JSON string to keep a null)",
        ]
        facts = read_manifest(run).train
        assert (facts.turns_muted, facts.turns_masked) == (1, 0)


def test_many_masked_answers_are_told(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "qwen3.jinja"
    template.write_text(QWEN3)
    talk = [message for n in range(3) for message in (user(f"{n}?"), assistant(f"{n}."))]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}, {"messages": talk[:2]}])
    lines = warned(make_run(model_folder, path, chat_template=str(template)), capsys)
    assert lines[0].startswith(
        "warning: rows.jsonl: 2 answers in 1 of 2 rows are not trained on, for the chat template"
    )


def test_a_template_that_leaves_out_tool_calls_is_refused_with_the_line(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Callable[[RunDir], str]
) -> None:
    """Before, an empty answer was taught."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    record = {"messages": [user("a?"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows(2), record])
    assert refused(make_run(model_folder, path, chat_template="chatml")[1]) == (
        f"{path}:3: the chat template leaves out `tool_calls` of messages[1], so the answer would be taught without; "
        "use a model.chat_template that writes them, or leave such rows out"
    )


@pytest.mark.parametrize("key", ["\ud83d", "\x1b[31mred\u202e"])
def test_keys_of_rows_are_told_plainly(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """Half a character in a key ended preparation in a traceback."""
    path = tmp_path / "rows.jsonl"
    talk = {"messages": [{**user("a?"), key: "x"}, assistant("b")], key: 1}
    path.write_text("".join(json.dumps(record) + "\n" for record in [talk, *rows(8)]))
    lines = warned(make_run(model_folder, path), capsys)
    assert len(lines) == 2
    assert all("`?`" in line or "`red?`" in line for line in lines), lines
