"""Rows of one file that differ: nulls, columns that change, formats that change; what is dropped has a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare.conftest import CHATML, chat, rows, write_jsonl
from prepare.families import FAMILIES, Family, assistant, user

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import COLUMNS, IGNORED
from galley.data.prepared import read_manifest
from galley.prepare.formats.base import Limits
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.conversations import BLANK, UNANSWERED, UNASKED
from galley.prepare.formats.rows import read_file
from galley.prepare.formats.table import FORMATS
from galley.prepare.formats.template import study
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]
Write = Callable[[Path, list[dict[str, Any]]], Path]


def parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    return write_jsonl(path.with_suffix(".jsonl"), records)


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "completion": f"Answer {number}", **more}


NULLS: list[tuple[str, str, list[dict[str, Any]]]] = [
    ("prompt_completion", "prompt", [pair(1), pair(2, prompt=None), pair(3)]),
    ("prompt_completion", "completion", [pair(1), pair(2, completion=None), pair(3)]),
    ("alpaca", "output", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]),
    ("alpaca", "instruction", [{"instruction": "a", "output": "b"}, {"instruction": None, "output": "b"}]),
    ("chat", "messages", [*rows(2), {"messages": None}]),
    ("sharegpt", "conversations", [{"conversations": rows(1)[0]["messages"]}, {"conversations": None}]),
    ("text", "text", [{"text": "a"}, {"text": None}]),
]


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(("form", "column", "records"), NULLS)
def test_a_row_whose_column_is_null_is_dropped_and_counted(
    make_run: Make, model_folder: Path, tmp_path: Path, write: Write, form: str, column: str,
    records: list[dict[str, Any]],
) -> None:  # fmt: skip
    for name in ("auto" if form != "text" else "text", form):
        spec, run = make_run(model_folder, write(tmp_path / "rows", records), name=name, format=name)
        work(spec, run, run.attempt(1))
        manifest = read_manifest(run)
        assert (manifest.train.rows, manifest.train.documents) == (len(records), len(records) - 1)
        assert manifest.train.dropped_unsupervised == 1
        assert any(f": 1 rows dropped, for their `{column}` is null" in line for line in manifest.warnings)


def test_an_empty_text_is_dropped_and_counted(make_run: Make, base_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a b"}, {"text": ""}])
    spec, run = make_run(base_folder, path, format="text")
    work(spec, run, run.attempt(1))
    manifest = read_manifest(run)
    assert (manifest.train.rows, manifest.train.documents) == (2, 1)
    assert manifest.warnings[0] == "rows.jsonl: 1 rows dropped, for their `text` is empty"


def test_other_rows_are_as_if_those_were_not_there(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    plain = [pair(number) for number in range(20)]
    with_nulls = [row for number in range(20) for row in (pair(number), pair(99, prompt=None))]
    files = []
    for name, records in (("plain", plain), ("nulls", with_nulls)):
        spec, run = make_run(model_folder, write_jsonl(tmp_path / f"{name}.jsonl", records), name=name, packing=False)
        work(spec, run, run.attempt(1))
        files.append(np.sort(np.asarray(COLUMNS["tokens"].open(run.data / "train"))))
    assert (files[0] == files[1]).all()


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize("first", ["chat", "prompt_completion"])
def test_rows_of_another_format_are_one_line(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Callable[[RunDir], str], write: Write, first: str
) -> None:
    """Null `messages` beside a filled prompt and completion, and the other way round."""
    empty = {"messages": None, "prompt": None, "completion": None}
    mixed = [{**empty, **chat("a", "b")}, {**empty, **pair(1)}]
    path = write(tmp_path / "rows", mixed if first == "chat" else mixed[::-1])
    other = "prompt_completion" if first == "chat" else "chat"
    said = refused(make_run(model_folder, path)[1])
    place = ":2" if write is jsonl else ", row 1"
    assert said == (
        f"{path}{place}: is a row of the format {other}, not of {first}; put rows of each format into a file of their "
        f"own, or use data.format={other} where all are such"
    )


def notes(path: Path, form: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, example in read_file(path, FORMATS[form]):
        for note, count in example.notes.items():
            found[note] = found.get(note, 0) + count
    return found


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize(
    ("form", "name", "other"),
    [("prompt_completion", "completion", "response"), ("prompt_completion", "prompt", "question"),
     ("alpaca", "output", "response")],
)  # fmt: skip
def test_rows_that_fill_another_column_are_counted(
    tmp_path: Path, nulls: bool, form: str, name: str, other: str
) -> None:
    row = {"instruction": "a", "output": "b"} if form == "alpaca" else pair(1)
    changed = {key: value for key, value in row.items() if key != name} | {other: "x"} | ({name: None} if nulls else {})
    path = write_jsonl(tmp_path / "rows.jsonl", [row, changed, row, changed])
    assert notes(path, form) == {f"rows are read from `{other}`, others from `{name}`": 2}
    assert notes(write_jsonl(tmp_path / "same.jsonl", [changed] * 3), form) == {}


@pytest.mark.parametrize(
    ("form", "first", "other", "expected"),
    [
        ("prompt_completion", pair(1), pair(1, prompt=[user("a")]),
         "a `prompt` that is a list, others one that is a string"),
        ("prompt_completion", pair(1, completion=[assistant("b")]), pair(1),
         "a `completion` that is a string, others one that is a list"),
        ("chat", chat("a", "b"), {"messages": json.dumps(chat("a", "b")["messages"])},
         "a `messages` that is a string, others one that is a list"),
    ],
)  # fmt: skip
def test_a_column_that_is_sometimes_of_another_type_is_counted(
    tmp_path: Path, form: str, first: dict[str, Any], other: dict[str, Any], expected: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [first, other, first, other, first])
    assert notes(path, form) == {f"rows have {expected}": 2}


@pytest.mark.parametrize("value", [3, 3.5, True, {"a": 1}])
def test_an_answer_that_is_no_text_names_its_row(tmp_path: Path, value: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(1), pair(2, completion=value)])
    with pytest.raises(UserError, match=r"rows.jsonl:2: `completion` is .*, not a string"):
        notes(path, "prompt_completion")


def test_text_in_parquet_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    words = pyarrow.array([b"a"] * 300 + [b"f\xfcr"] + [b"b"] * 9)
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(words), words.buffers())
    table = pyarrow.table({"prompt": column, "completion": ["x"] * len(words)})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet, row 300: not UTF-8: .*column 0.*; write its texts as UTF-8"):
        notes(tmp_path / "x.parquet", "prompt_completion")


def test_questions_that_hold_nothing_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(1), pair(2, prompt=""), pair(3, prompt=" \n")])
    assert notes(path, "prompt_completion") == {BLANK: 2}


def test_a_column_of_messages_that_is_null_throughout_hides_no_pairs(
    make_run: Make, model_folder: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(number, messages=None) for number in range(3)])
    spec, run = make_run(model_folder, path)
    work(spec, run, run.attempt(1))
    assert read_manifest(run).train.documents == 3
    assert not [line for line in read_manifest(run).warnings if "rows.jsonl" in line]


def test_conversations_that_nobody_begins_or_ends_are_counted_and_kept(tmp_path: Path, tokenizer: Any) -> None:
    talk = [assistant("Hello, I am here."), user("a?"), assistant("A."), user("b?")]
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"messages": talk}, {"messages": talk[1:]}, {"messages": talk[:3]}, {"messages": talk[1:3]}],
    )
    assert notes(path, "chat") == {UNASKED: 2, UNANSWERED: 2}
    rows = [row for _, row in read_file(path, CHAT)]
    encoded = CHAT.encode(tokenizer, study(tokenizer, CHATML), Limits(4096, "drop"), rows)
    documents = [part for (part,) in encoded.documents]
    trained = [tokenizer.decode(part.tokens[part.labels != IGNORED]) for part in documents]
    assert trained == [
        "Hello, I am here.<|im_end|>A.<|im_end|>", "A.<|im_end|>", "Hello, I am here.<|im_end|>A.<|im_end|>",
        "A.<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_answer_that_comes_first_is_trained_on_like_others(tokenizer: Any, family: Family, system: bool) -> None:
    """Templates that look at the first message wrote nothing without one, and the answer was masked."""
    talk = [assistant("Hello."), user("a?"), assistant("A.")]
    talk = [{"role": "system", "content": "Be kind."}, *talk] if system else talk
    template, limits = study(tokenizer, family.template), Limits(4096, "drop")
    rows_here = [CHAT.parse({"messages": talk}, "here:1")]
    if family.name == "mistral" or (system and family.name == "gemma"):
        with pytest.raises(UserError, match="the chat template refuses this conversation: "):
            CHAT.encode(tokenizer, template, limits, rows_here)
        return
    ((document,),) = CHAT.encode(tokenizer, template, limits, rows_here).documents
    trained = tokenizer.decode(document.tokens[document.labels != IGNORED])
    assert document.masked == 0
    assert trained.index("Hello.") < trained.index("A.")
    assert "a?" not in trained
    assert "kind" not in trained
    assert not trained.startswith(("<|im_start|>", "assistant", "<|start_header_id|>", "<start_of_turn>"))


def test_a_system_prompt_and_a_tools_result_do_not_hide_who_begins_and_ends(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, assistant("Hello"), user("a?"), assistant("A."),
            {"role": "tool", "content": "t"}]  # fmt: skip
    assert notes(write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}]), "chat") == {UNASKED: 1, UNANSWERED: 1}


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("completion", ["d", [assistant("d")]])
def test_answers_in_a_prompt_are_trained_on_with_everything(
    tmp_path: Path, tokenizer: Any, system: str | None, completion: Any
) -> None:
    record: dict[str, Any] = {"prompt": [user("a"), assistant("b"), user("c")], "completion": completion}
    record |= {"system": system} if system else {}
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    form, found = FORMATS["prompt_completion"], {}
    examples = [row for _, row in read_file(path, form)]
    for learn in ("all", "assistant", "last"):
        limits = Limits(4096, "drop", learn)  # type: ignore[arg-type]
        ((document,),) = form.encode(tokenizer, study(tokenizer, CHATML), limits, examples).documents
        found[learn] = (tokenizer.decode(document.tokens[document.labels != IGNORED]), document.muted)
    assert found["assistant"] == found["last"] == ("d<|im_end|>", 1)
    assert "b<|im_end|>" in found["all"][0]
    assert found["all"][0].endswith("d<|im_end|>\n")


def test_a_weight_of_nothing_in_a_prompt_still_contradicts_everything(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": [user("a"), assistant("b", weight=0), user("c")], "completion": "d"}
    path = write_jsonl(tmp_path / "rows.jsonl", [record])
    form = FORMATS["prompt_completion"]
    examples, template = [row for _, row in read_file(path, form)], study(tokenizer, CHATML)
    with pytest.raises(UserError, match=r"rows.jsonl:1: has a message of weight 0, and with data.learn=all"):
        form.encode(tokenizer, template, Limits(4096, "drop", "all"), examples)


def test_a_file_of_nulls_says_why_nothing_is_left(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Callable[[RunDir], str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair(1, completion=None)) + "\n")
    said = refused(make_run(model_folder, path)[1])
    assert said.startswith(
        f"data.path: every row of '{path}' is dropped: 1 rows dropped, for their `completion` is null;"
    )
