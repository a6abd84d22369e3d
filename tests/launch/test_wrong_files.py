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
        ("rows.parquet", b"PAR1" + b"\0" * 50 + b"PAR1", "is a Parquet file, not JSONL; convert it: python -c"),
        ("rows.jsonl", b"PAR1" + b"\0" * 50 + b"PAR1", "is a Parquet file"),  # whatever it is called
        ("rows.jsonl.gz", gzip.compress(ROW.encode()), "gunzip -k 'rows.jsonl.gz'"),
        ("rows.csv", b"question,answer\na,b\n", "is a CSV file, not JSONL"),
        ("rows.json", f"[{ROW.strip()}]".encode(), "is one JSON array, not JSONL; write one object a line"),
        ("rows.jsonl", ROW.encode("utf-16"), "iconv -f UTF-16"),
        ("alpaca.jsonl", ALPACA.encode(), "this is Alpaca's format"),
        ("sharegpt.jsonl", SHAREGPT.encode(), "this is ShareGPT's format"),
        ("kto.jsonl", b'{"prompt": "a", "completion": "b", "label": false}\n', "these are preferences"),
        ("acts.jsonl", b'{"system": "s", "conversations": [{"from": "human"}]}\n', "`system` becomes a first message"),
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


def test_a_submission_is_refused_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.parquet").write_bytes(b"PAR1")
    words = ["cluster=venv", "batch.samples=16", "micro_batch=1", "data.path=rows.parquet"]
    assert cli.main(["plan", RECIPE, *words]) == 2
    assert "is a Parquet file" in capsys.readouterr().err
