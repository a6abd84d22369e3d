"""Formats of conversations: recognised by their columns, and the same arrays from each that can hold them."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepare.conftest import write_jsonl
from transformers import AutoModelForCausalLM

from galley.contract.data_files import rename
from galley.contract.errors import UserError
from galley.contract.row_formats import COLUMNS, recognised
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import COLUMNS as ARRAYS
from galley.data.columns import IGNORED
from galley.data.prepared import read_manifest
from galley.prepare.formats.conversations import Conversation
from galley.prepare.formats.table import FORMATS
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]
PAIRS = [(f"Question {n}?", f"Answer {n}" + " and the quick brown fox" * (n % 7)) for n in range(60)]
SYSTEM = "Be brief."
TALKS = [[("user", q), ("assistant", a), ("user", a), ("assistant", q)] for q, a in PAIRS]
WHO = {"user": "human", "assistant": "gpt"}
LEARNT = ("tokens", "labels", "documents")


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("system", SYSTEM), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(question: str, answer: str) -> dict[str, Any]:
    turns = (("system", SYSTEM), ("human", question), ("gpt", answer))
    return {"conversations": [{"from": who, "value": value} for who, value in turns]}


def prompt_of_messages(question: str, answer: str) -> dict[str, Any]:
    *prompt, last = chat(question, answer)["messages"]
    return {"prompt": prompt, "completion": [last]}


ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "chat": chat,
    "chat with a column for the system prompt": lambda q, a: {"messages": chat(q, a)["messages"][1:], "system": SYSTEM},
    "sharegpt": sharegpt,
    "sharegpt of roles": lambda q, a: {"conversation": chat(q, a)["messages"]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a, "system": SYSTEM, "history": []},
    "dolly": lambda q, a: {"instruction": q, "context": "", "response": a, "system": SYSTEM},
    "question and answer": lambda q, a: {"question": q, "answer": a, "system": SYSTEM},
    "prompt and completion": lambda q, a: {"prompt": q, "completion": a, "system": SYSTEM},
    "prompt of messages": prompt_of_messages,
}


def arrays(spec: RunSpec, run: RunDir) -> dict[str, bytes]:
    work(spec, run, run.attempt(1))
    return {path.name: path.read_bytes() for path in sorted((run.data / "train").iterdir())}


@pytest.fixture
def expected(make_run: Make, model_folder: Path, tmp_path: Path) -> dict[str, bytes]:
    path = write_jsonl(tmp_path / "expected.jsonl", [chat(*pair) for pair in PAIRS])
    return arrays(*make_run(model_folder, path, name="expected"))


@pytest.mark.parametrize("name", ROWS)
def test_the_same_arrays_from_every_format(
    make_run: Make, model_folder: Path, tmp_path: Path, expected: dict[str, bytes], name: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[name](*pair) for pair in PAIRS])
    assert arrays(*make_run(model_folder, path)) == expected


def mean_loss(model_folder: Path, run: RunDir) -> float:
    """Of all supervised tokens, each document by itself, in fp32, by a plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokens, labels, bounds = (np.asarray(ARRAYS[name].open(run.data / "train")) for name in LEARNT)
    losses = []
    for first, last in itertools.pairwise(bounds.tolist()):
        logits = model(torch.tensor(tokens[first:last].astype(np.int64))[None]).logits[0, :-1]  # [tokens - 1, vocab]
        targets = torch.tensor(labels[first + 1 : last].astype(np.int64))
        losses.append(torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none"))
    return float(torch.cat(losses).sum() / (labels != IGNORED).sum())


@torch.no_grad()
def test_the_same_loss_from_every_format(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    """To 1e-5, in fp32; conversations of one turn from all, of several from those that can hold them."""
    found: dict[str, dict[str, float]] = {"one": {}, "several": {}}
    several = {
        "chat": lambda turns: {"messages": [{"role": role, "content": text} for role, text in turns]},
        "chat as JSON text": lambda turns: {"messages": json.dumps([{"role": r, "content": t} for r, t in turns])},
        "sharegpt": lambda turns: {"conversations": [{"from": WHO[role], "value": text} for role, text in turns]},
    }
    rows = {name: [form(*pair) for pair in PAIRS] for name, form in ROWS.items()}
    more = {name: [form(turns) for turns in TALKS] for name, form in several.items()}
    for kind, by_format in (("one", rows), ("several", more)):
        for number, (name, records) in enumerate(by_format.items()):
            spec, run = make_run(
                model_folder, write_jsonl(tmp_path / f"{kind}{number}.jsonl", records), name=f"{kind}{number}"
            )
            work(spec, run, run.attempt(1))
            found[kind][name] = mean_loss(model_folder, run)
    for losses in found.values():
        assert len(losses) > 2
        assert max(losses.values()) - min(losses.values()) < 1e-5, losses
    assert abs(found["one"]["chat"] - found["several"]["chat"]) > 1e-4, "other conversations have another loss"


def test_a_table_with_columns_of_its_own_names_and_no_system_prompt(
    make_run: Make, model_folder: Path, tmp_path: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("id", "frage", "antwort"), *((n, *pair) for n, pair in enumerate(PAIRS))])
    names = {"prompt": "frage", "completion": "antwort"}
    spec, run = make_run(model_folder, path, columns=names, system=SYSTEM)
    assert arrays(spec, run) == expected
    out = capsys.readouterr().out
    assert f"data: {path}: rows of the format prompt_completion (prompt, completion)" in out
    assert "60 rows have a column `id`, which is not read" in out
    other, _ = make_run(model_folder, path, name="other", columns=names, system="Be long.")
    work(other, other_run := RunDir(Path(other.placement.paths.run)), other_run.attempt(1))
    assert read_manifest(other_run).content != read_manifest(run).content, "another system prompt is other data"


def test_training_and_held_out_rows_may_be_of_different_formats(
    make_run: Make, model_folder: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [ROWS["alpaca"](*pair) for pair in PAIRS[:50]])
    other = write_jsonl(tmp_path / "b.jsonl", [sharegpt(*pair) for pair in PAIRS[50:]])
    spec, run = make_run(model_folder, data, held_out_path=str(other))
    work(spec, run, run.attempt(1))
    manifest = read_manifest(run)
    assert (manifest.train.rows, manifest.held_out and manifest.held_out.rows) == (50, 10)


def test_formats_are_told_apart_by_their_columns() -> None:
    assert set(FORMATS) == set(COLUMNS)
    for name, columns in {
        "chat": ["messages", "prompt", "completion"],  # messages count, whatever else there is
        "sharegpt": ["conversations", "id"],
        "alpaca": ["instruction", "input", "output"],
        "prompt_completion": ["question", "answer", "id"],
    }.items():
        assert recognised(columns) == name
        assert next(form.name for form in FORMATS.values() if form.matches(columns)) == name
    assert recognised(["text"]) is None
    assert recognised(["prompt", "chosen", "rejected"]) is None


def conversation(form: str, record: dict[str, Any]) -> Conversation:
    example: Conversation = FORMATS[form].parse(record, "rows:1")
    return example


def test_tool_calls_of_sharegpt() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    turns = [
        ("human", "Rome?"), ("function_call", json.dumps(call)), ("observation", "sunny"), ("gpt", "Sunny."),
        ("human", "And both?"), ("function_call", json.dumps([call, call])), ("function_response", "x"), ("gpt", "y"),
    ]  # fmt: skip
    record = {"conversations": [{"from": who, "value": value} for who, value in turns], "tools": "[]"}
    messages = conversation("sharegpt", record).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"] * 2
    assert messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert len(messages[5]["tool_calls"]) == 2


def test_alpacas_input_and_history() -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"], ["Go", "Ok"]]}
    contents = [message["content"] for message in conversation("alpaca", record).messages]
    assert contents == ["Hi", "Hello", "Go", "Ok", "Add.\n1, 2", "3"]


def test_answers_in_a_prompt_are_not_trained_on() -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = conversation("prompt_completion", {"prompt": prompt, "completion": "d"})
    assert [message["content"] for message in row.messages] == ["a", "b", "c", "d"]
    assert row.muted == {1}


REFUSED = [
    ("sharegpt", {"conversations": 3}, "`conversations` is a number, not a list"),
    ("sharegpt", {"conversations": ["hi"]}, "conversations[0] is a string, not an object"),
    ("sharegpt", {"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator', not one of human"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]}, "is a string, but not of JSON"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "[3]"}]}, "is no tool call"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "no message has the role assistant"),
    ("sharegpt", {"conversations": []}, "`messages` is an empty list"),
    ("alpaca", {"instruction": 3, "output": "x"}, "`instruction` is a number, not a string"),
    ("alpaca", {"instruction": "x", "input": ["y"], "output": "z"}, "`input` is a list, not a string"),
    ("alpaca", {"instruction": "x", "output": "z", "history": [["a"]]}, "`history` is not a list of pairs"),
    ("prompt_completion", {"question": "x", "answer": 3}, "`answer` is a number, not a string"),
    ("prompt_completion", {"prompt": [{"role": "user", "content": "x"}], "completion": 3}, "is a number, neither a"),
    ("prompt_completion", {"prompt": ["x"], "completion": "y"}, "the prompt is a list, neither a string nor a list"),
    ("alpaca", {"messages": []}, "is a row of the format chat, not of alpaca"),
    ("alpaca", {"id": 1}, "not a row of the format alpaca: an object of id"),
    ("sharegpt", ["x"], "not a row of the format sharegpt: a list"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "record", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_is_not_understood_is_one_line(form: str, record: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        conversation(form, record)
    assert message in str(caught.value)
    assert str(caught.value).startswith("rows:1: ")
    assert "\n" not in str(caught.value)


def read(record: dict[str, Any], **columns: str) -> Conversation:
    """As a file with this row is read."""
    named = rename(record, columns)
    form = recognised(named)
    assert form is not None, named
    conversation: Conversation = FORMATS[form].parse(named, "here:1")
    return conversation


TWO = [
    ({"prompt": "Translate", "input": "TEXT", "output": "A"}, "`prompt` and `input`", "prompt"),
    ({"question": "Q", "answer": "42", "response": "Because"}, "`answer` and `response`", "completion"),
    ({"instruction": "I", "output": "A", "response": "B"}, "`output` and `response`", "output"),
    ({"instruction": "I", "input": "x", "context": "y", "output": "A"}, "`input` and `context`", "input"),
]


@pytest.mark.parametrize(("record", "names", "column"), TWO)
def test_two_columns_that_could_be_one_are_a_question(record: dict[str, Any], names: str, column: str) -> None:
    with pytest.raises(UserError, match=f"here:1: has {names}, of which only one can be read; name the one") as caught:
        read(record)
    chosen = str(caught.value).rpartition("=")[2]
    assert f"data.columns.{column}={chosen}" in str(caught.value)
    if column != "input":
        assert str(record[chosen]) in str(read(record, **{column: chosen}).messages)


def test_columns_that_are_empty_or_alike_are_no_question() -> None:
    assert read({"prompt": "", "question": "Q", "answer": "A"}).messages[0]["content"] == "Q"
    assert read({"prompt": "Q", "question": "Q", "answer": "A"}).messages[0]["content"] == "Q"
    assert read({"instruction": "I", "input": "", "output": "A"}).messages[0]["content"] == "I"
    assert read({"instruction": "I", "input": "x", "output": "A"}, instruction="instruction").messages[0] == {
        "role": "user",
        "content": "I\nx",
    }


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "response": "bad", "label": False},
        {"prompt": "p", "completion": "bad", "label": 0.0},
        {"question": "p", "answer": "good", "label": True},
    ],
)
def test_a_verdict_on_an_answer_is_no_answer_to_train_on(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="these are preferences"):
        read(record)


def test_pairs_are_not_taken_for_conversations() -> None:
    assert recognised({"prompt": 1, "response": 1, "chosen": 1, "rejected": 1}) is None
    assert recognised({"conversations": 1, "chosen": 1, "rejected": 1}) is None
    assert recognised({"messages": 1, "chosen": 1, "rejected": 1}) == "chat"


def test_system_prompts_and_messages_of_data_sets_as_they_are() -> None:
    orca = read({"system_prompt": "Think.", "question": "Q", "response": "A"})
    assert orca.messages[0] == {"role": "system", "content": "Think."}
    assert orca.notes == {}
    text = json.dumps(chat("Q", "A")["messages"])
    assert read({"messages": text}).messages == read(chat("Q", "A")).messages
