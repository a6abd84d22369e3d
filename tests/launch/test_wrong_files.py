"""A data file of another kind is refused by ``plan``, before anything is prepared, queued or loaded."""

import gzip
import json
from pathlib import Path

import pytest

from galley_launch import cli

RECIPE = "smollm2-135m-lora"
ROW = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
ALPACA = json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n"
SHAREGPT = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}) + "\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALLEY_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("key", ["data.path", "data.held_out_path"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"id,label\na,b\n", "rows.csv:1: not a conversation: it has id, label; name the columns"),
        ("rows.json", b'[{"id": 1}]', "rows.json:1: not a conversation: it has id; name the columns"),
        ("rows.zip", b"PK\x03\x04" + b"\0" * 50, "cannot be unpacked"),
        ("rows.parquet", b"question,answer\n", "is no Parquet file"),
        ("rows.jsonl", ROW.encode("utf-16"), "iconv -f UTF-16"),
        ("pairs.jsonl", b'{"chosen": "a", "rejected": "b"}\n', "these are preferences"),
        ("texts.jsonl", b'{"text": "a"}\n', "for plain text use data.format=text"),
        ("kto.jsonl", b'{"prompt": "a", "completion": "b", "label": false}\n', "these are preferences"),
        ("notes.txt", b"Dear reader,\n", "notes.txt:1: not JSON: Expecting value"),
        ("rows.jsonl", b"{'messages': []}\n", "rows.jsonl:1: not JSON: Expecting property name"),
        ("page.jsonl", b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_plan_refuses_it_with_what_to_do(
    key: str, name: str, content: bytes, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    words = ["data.held_out=0"] if key == "data.held_out_path" else []
    assert cli.main(["plan", RECIPE, "device=cpu", f"{key}={name}", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert "UTF-8" not in err or "UTF-16" in err


def test_good_files_pass(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text(ROW)
    assert cli.main(["plan", RECIPE, "device=cpu", "data.path=rows.jsonl"]) == 0
    Path("texts.jsonl").write_text('{"text": "plain"}\n')
    assert cli.main(["plan", RECIPE, "device=cpu", "data.path=texts.jsonl", "data.format=text"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", RECIPE, "device=cpu", "data.path=texts.jsonl"]) == 2
    assert "data.format=text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("alpaca.jsonl", ALPACA.encode()),
        ("sharegpt.jsonl", SHAREGPT.encode()),
        ("rows.jsonl.gz", gzip.compress(ROW.encode())),
        ("rows.csv", b"question,answer\na,b\n"),
        ("rows.json", f"[{ROW.strip()}]".encode()),
        ("rows.parquet", b"PAR1" + b"\0" * 50 + b"PAR1"),  # what is in it is for prepare to see
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_other_kinds_and_formats_pass(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert cli.main(["plan", RECIPE, "device=cpu", f"data.path={name}"]) == 0


def test_columns_of_other_names_are_mapped(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.csv").write_text("q,a\nx,y\n")
    words = ["plan", RECIPE, "device=cpu", "data.path=rows.csv"]
    assert cli.main(words) == 2
    assert "data.columns.prompt=" in capsys.readouterr().err
    assert cli.main([*words, "data.columns.prompt=q", "data.columns.completion=a"]) == 0


def test_a_submission_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.jsonl").write_bytes(b"<!DOCTYPE html>")
    words = ["cluster=venv", "batch.samples=16", "micro_batch=1", "data.path=page.jsonl"]
    assert cli.main(["plan", RECIPE, *words]) == 2
    assert "is a web page" in capsys.readouterr().err
