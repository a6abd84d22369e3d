"""What a data file is, told by its suffix and first bytes: one that is not JSONL of conversations or texts is refused.

Standard library only: ``plan`` asks on a login node, ``prepare`` again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError

HEAD = 1 << 16
CONVERT = (
    """python -c "import datasets; datasets.load_dataset('{kind}', data_files='{path}')['train'].to_json('{to}')\""""
)
# First bytes, what the file is, and what to do; `datasets` reads the first kind by the name after the colon.
MAGIC: list[tuple[bytes, str, str]] = [
    (b"PAR1", "a Parquet file", "convert:parquet"),
    (b"ARROW1", "an Arrow file", "convert:arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "convert:arrow"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it: gunzip -k '{path}'"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: unzstd '{path}'"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it: unxz -k '{path}'"),
    (b"BZh", "compressed with bzip2", "unpack it: bunzip2 -k '{path}'"),
    (b"PK\x03\x04", "a zip archive, or a spreadsheet", "unpack it, and convert what is in it to JSONL"),
    (b"SQLite format 3\x00", "an SQLite data base", "export its rows as JSONL"),
    (b"\x80\x04\x95", "a pickle", "save its rows as JSONL where you made it"),
    (b"\x80\x05\x95", "a pickle", "save its rows as JSONL where you made it"),
    (b"\x89HDF", "an HDF5 file", "save its rows as JSONL"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > '{to}'"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > '{to}'"),
    (b"version https://git-lfs.github.com/spec/", "a git-LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"<!DOCTYPE", "a web page", "download the file itself, often under `resolve` or `raw`"),
    (b"<html", "a web page", "download the file itself, often under `resolve` or `raw`"),
]
SUFFIXES = {
    ".parquet": "a Parquet file", ".arrow": "an Arrow file", ".csv": "a CSV file", ".tsv": "a TSV file",
    ".xlsx": "a spreadsheet", ".xls": "a spreadsheet", ".pkl": "a pickle", ".pickle": "a pickle",
    ".yaml": "a YAML file", ".yml": "a YAML file", ".md": "a Markdown file", ".pt": "a PyTorch file",
    ".safetensors": "a file of tensors", ".npy": "a numpy array", ".gguf": "a model",
}  # fmt: skip
ARRAY = """python -c "import json; [print(json.dumps(row)) for row in json.load(open('{path}'))]" > '{to}'"""
SHAREGPT = (
    "rename `conversations` to `messages`, `from` to `role` (human becomes user, gpt assistant, function_call and "
    "observation tool calls and tool) and `value` to `content`"
)
SAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
PAIR = (
    '{{"messages": [{{"role": "user", "content": {asked}}}, {{"role": "assistant", "content": {answered}}}]}}, '
    "with the values of these keys"
)


def check_file(path: Path, form: str = "chat") -> None:
    """Raise :class:`UserError` where ``path`` is another kind of file than JSONL of rows of the format ``form``.

    Judged by suffix and the first 64 KiB; a file that cannot be read, or is empty, passes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return
    other = _binary(head) or _text(path, head)
    if other:
        what, todo = other
        raise UserError(str(path), f"is {what}, not JSONL", _todo(todo, path))
    line, number = _first_line(head)
    if form == "chat" and line is not None and isinstance(record := _json(line), Mapping):
        known = remedy(record)
        if known and record.get("messages") is None:
            what = f"not a conversation: no `messages`, only {', '.join(map(str, record))[:200]}"
            raise UserError(f"{path}:{number}", what, known)
    if line is not None and line.strip():
        _check_json(f"{path}:{number}", line)


def _check_json(where: str, line: bytes) -> None:
    try:
        json.loads(line)
    except UnicodeDecodeError:
        return
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", f"write one object a line, such as {SAMPLE}") from None
    except RecursionError:
        return


def _binary(head: bytes) -> tuple[str, str] | None:
    return next(((what, todo) for magic, what, todo in MAGIC if head.startswith(magic)), None)


def _text(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file without known first bytes is, judged by how its text begins and by its suffix."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return None
    line, _ = _first_line(head)
    suffix = path.suffix.lower()
    if text.startswith(b"[") and (suffix == ".json" or line is None or not isinstance(_json(line), list)):
        return "one JSON array", f"write one object a line: {ARRAY}"
    if text.startswith(b"[") and _is_array(line):
        return "one JSON array", f"write one object a line: {ARRAY}"
    if text.startswith(b"{"):
        spread = line is not None and _json(line) is None and (line.strip() == b"{" or _json(head) is not None)
        return ("JSON over several lines", "write one object a line: jq -c . '{path}' > '{to}'") if spread else None
    if suffix in (".csv", ".tsv"):
        return SUFFIXES[suffix], "convert:csv"
    return (SUFFIXES[suffix], "save its rows as JSONL") if suffix in SUFFIXES else None


def _is_array(line: bytes | None) -> bool:
    """Whether a line holds an array of objects, and not one row that is wrong."""
    value = _json(line) if line else None
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _first_line(head: bytes) -> tuple[bytes | None, int]:
    """The first line that is not blank, where ``head`` holds it whole, and its number from 1."""
    for number, line in enumerate(head.splitlines(keepends=True), 1):
        if line.strip():
            whole = line.endswith(b"\n") or len(head) < HEAD
            return (line.removeprefix(b"\xef\xbb\xbf") if whole else None), number
    return None, 1


def _json(line: bytes) -> object:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value


def _todo(todo: str, path: Path) -> str:
    to = path.with_suffix("").with_suffix(".jsonl").name
    if todo.startswith("convert:"):
        todo = f"convert it: {CONVERT.replace('{kind}', todo.removeprefix('convert:'))}"
    return todo.replace("{path}", path.name).replace("{to}", to if to != path.name else f"rows-{to}")


def remedy(record: Mapping[str, Any]) -> str | None:
    """How to turn a row of a known other format into a conversation; None for one that is not known."""
    keys = set(record)
    turns = record.get("conversations", record.get("conversation"))
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        if "from" in turns[0]:
            first = "; `system` becomes a first message of that role" if record.get("system") else ""
            return f"this is ShareGPT's format: {SHAREGPT}{first}"
        return "rename the key to `messages`"
    if {"instruction", "output"} <= keys:
        asked = "instruction and input" if record.get("input") else "instruction"
        return f"this is Alpaca's format: write {PAIR.format(asked=asked, answered='output')}"
    judged = "completion" in keys and isinstance(record.get("label"), bool)  # KTO's: false marks a bad answer
    if {"chosen", "rejected"} <= keys or judged:
        return "these are preferences, which Galley does not train on: write the chosen answers as `messages`"
    return _pair(record)


def _pair(record: Mapping[str, Any]) -> str | None:
    asking, answering = (
        ("prompt", "question", "instruction", "input", "query"),
        ("completion", "response", "answer", "output"),
    )
    asked = next((key for key in asking if key in record), None)
    answered = next((key for key in answering if key in record), None)
    if asked and answered:
        if isinstance(record[asked], list) and isinstance(record[answered], list):
            return f'join the lists: {{"messages": {asked} + {answered}}}'
        return f"write {PAIR.format(asked=asked, answered=answered)}"
    if isinstance(record.get("text"), str):
        return "for plain text use data.format=text; for conversations write `messages`"
    return None
