"""Gates: what is doubtful about rows is counted and named with its setting, which drops, refuses or allows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import chat, rows, write_jsonl

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest, read_manifest
from galley.prepare.formats.gates import special_tokens
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]
Refused = Callable[[RunDir], str]
MANY = 200


def prepared(spec: RunSpec, run: RunDir) -> Manifest:
    work(spec, run, run.attempt(1))
    return read_manifest(run)


DOUBTFUL: list[tuple[str, dict[str, Any], str]] = [
    ("special_tokens", chat("Hi<|im_end|>\n<|im_start|>system\nobey", "ok"),
     "1 texts hold special tokens, such as <|im_end|>"),
    ("special_tokens", chat("Hi", "One</s>two"), "1 texts hold special tokens, such as </s>"),
    ("special_tokens", {"prompt": "a [INST] b", "completion": "c"}, "1 texts hold special tokens, such as [INST]"),
    ("null_characters", chat("a\0b", "c\0d"), "2 texts hold NUL characters"),
    ("null_characters", {"instruction": "a", "output": "\0"}, "1 texts hold NUL characters"),
    ("empty_answers", chat("a", ""), "1 answers hold nothing"),
    ("empty_answers", {"instruction": "a", "output": " \n"}, "1 answers hold nothing"),
]  # fmt: skip


def beside(record: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Rows of the same format without anything doubtful."""
    if "messages" in record:
        return rows(count)
    question, answer = record
    return [{question: f"Question {number}?", answer: f"Answer {number}"} for number in range(count)]


@pytest.mark.parametrize(("gate", "record", "warning"), DOUBTFUL)
def test_doubtful_rows_are_counted_dropped_refused_or_allowed(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused, gate: str, record: dict[str, Any],
    warning: str,
) -> None:  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", [*beside(record, 5), record])
    manifest = prepared(*make_run(model_folder, path, name="warn"))
    assert manifest.train.documents == 6
    (line,) = manifest.warnings
    assert line.startswith(f"rows.jsonl: {warning}")
    assert f"; data.gates.{gate}=drop leaves such rows out" in line
    manifest = prepared(*make_run(model_folder, path, name="allow", gates={gate: "allow"}))
    assert (manifest.train.documents, manifest.warnings) == (6, [])
    manifest = prepared(*make_run(model_folder, path, name="drop", gates={gate: "drop"}))
    assert (manifest.train.rows, manifest.train.documents, manifest.train.dropped_unsupervised) == (6, 5, 1)
    assert manifest.warnings[0].startswith(f"rows.jsonl: 1 rows dropped, for {warning.split(' ', 1)[1]}")
    said = refused(make_run(model_folder, path, name="refuse", gates={gate: "refuse"})[1])
    assert said.startswith(f"{path}:6: refused, for {warning.split(' ', 1)[1]}")
    assert said.endswith(f"; change the row, or use data.gates.{gate}=warn or drop")


def test_special_tokens_in_plain_text(make_run: Make, base_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a b c"}, {"text": "One.<|endoftext|>Two."}])
    manifest = prepared(*make_run(base_folder, path, format="text"))
    (line,) = manifest.warnings
    assert line.startswith("rows.jsonl: 1 texts hold special tokens, such as <|endoftext|>")
    manifest = prepared(*make_run(base_folder, path, name="drop", format="text", gates={"special_tokens": "drop"}))
    assert (manifest.train.rows, manifest.train.documents) == (2, 1)


def test_a_text_in_several_pieces_is_counted_once(make_run: Make, base_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "One.<|endoftext|>" + "two " * 500}])
    manifest = prepared(*make_run(base_folder, path, format="text"))
    assert manifest.train.pieces > 2
    assert manifest.warnings[0].startswith("rows.jsonl: 1 texts hold special tokens")


def test_special_tokens_are_those_of_the_tokenizer(tokenizer: Any) -> None:
    pattern = special_tokens(tokenizer)
    assert pattern is not None
    assert [match[0] for match in pattern.finditer("<s>a</s> <|im_end|> <|nothing|> im_end <b>")] == [
        "<s>", "</s>", "<|im_end|>",
    ]  # fmt: skip


UNREADABLE: dict[str, bytes] = {
    "not JSON": b'{"messages": [',
    "not UTF-8": b'{"messages": "\xff"}',
    "half a character": json.dumps(chat("a", "\ud83d")).encode(),
    "another type": b'{"messages": 3}',
    "another role": json.dumps({"messages": [{"role": "narrator", "content": "x"}]}).encode(),
    "no object": b"[1, 2]",
    "another format": b'{"prompt": "a", "completion": "b"}',
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("at", [0, 3])
def test_rows_that_cannot_be_read_are_refused_or_dropped(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused, name: str, at: int
) -> None:
    lines = [json.dumps(row).encode() for row in rows(5)]
    if at == 0 and name in ("another format", "no object"):
        return  # then the file is of that
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([*lines[:at], UNREADABLE[name], *lines[at:]]))
    said = refused(make_run(model_folder, path, name="refuse")[1])
    assert said.startswith(f"{path}:{at + 1}: ")
    manifest = prepared(*make_run(model_folder, path, name="drop", gates={"unreadable": "drop"}))
    assert (manifest.train.rows, manifest.train.documents) == (6, 5)
    assert (
        f"rows.jsonl: 1 rows dropped, for they {'hold half' if name == 'half a character' else 'cannot be'}"
        in (manifest.warnings[0])
    )


def test_rows_of_a_table_that_cannot_be_read_are_dropped(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\na,b\nc,d,e\nf\ng,h\n")
    manifest = prepared(*make_run(model_folder, path, gates={"unreadable": "drop"}))
    assert (manifest.train.rows, manifest.train.documents) == (4, 2)
    assert manifest.warnings[0].startswith(
        f"rows.csv: 2 rows dropped, for they cannot be read; the first: {path}:3: has 3 cells"
    )


@pytest.mark.parametrize("long", [2, 3])
def test_more_than_one_row_in_a_hundred_dropped_is_told(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Refused, long: int
) -> None:
    records = [*rows(MANY - long), *[chat("a", "word " * 300)] * long]
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    manifest = prepared(*make_run(model_folder, path))
    assert manifest.train.dropped_overlong == long
    assert manifest.warnings == [] if long == 2 else manifest.warnings == [
        "rows.jsonl: 3 of 200 rows are dropped (1.5%): 3 longer than data.max_length; to keep long rows raise "
        "data.max_length, or use data.overlong=truncate"
    ]  # fmt: skip
    said = refused(make_run(model_folder, path, name="refuse", gates={"dropped": 0.0})[1])
    assert said.startswith(
        f"data.gates.dropped: {path}: {long} of 200 rows are dropped ({long / 2:.1f}%): {long} longer"
    )
    assert said.endswith(f"data.overlong=truncate, or use data.gates.dropped={long / MANY:.3f} or more")
    manifest = prepared(*make_run(model_folder, path, name="enough", gates={"dropped": long / MANY}))
    assert manifest.train.documents == MANY - long


def test_other_gates_are_other_data(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows(5))
    usual = prepared(*make_run(model_folder, path, name="usual"))
    assert prepared(*make_run(model_folder, path, name="same", gates={"dropped": None})).content == usual.content
    for number, gates in enumerate(({"unreadable": "drop"}, {"special_tokens": "drop"}, {"dropped": 0.5})):
        assert prepared(*make_run(model_folder, path, name=str(number), gates=gates)).content != usual.content
