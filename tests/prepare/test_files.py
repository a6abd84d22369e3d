"""Rows of data files of every kind: the same rows, whatever they are written in; damage is one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from galley.contract.data_files import check_file
from galley.contract.errors import UserError
from galley.prepare import files
from galley.prepare.files import read_records

ROWS = [
    {"messages": [{"role": "user", "content": f"q {n}\n\u2028\u00e4"}, {"role": "assistant", "content": "a" * n}]}
    for n in range(300)
]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
Write = Callable[[Path], Any]


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/rows.jsonl", LINES)
        archive.writestr("__MACOSX/._rows.jsonl", b"of no interest")


def _table() -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(ROWS)


def _parquet(path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(_table(), path, row_group_size=70)


def _arrow(new: str) -> Write:
    def write(path: Path) -> None:
        from pyarrow import ipc

        table = _table()
        with path.open("wb") as file, getattr(ipc, new)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)

    return write


def _bytes(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


SAME: dict[str, tuple[Write, str, str]] = {
    "rows.jsonl": (_bytes(LINES), ":1", ":300"),
    "rows.txt": (_bytes(b"\xef\xbb\xbf" + LINES), ":1", ":300"),
    "array.json": (_bytes(json.dumps(ROWS).encode()), ":1", ":1"),
    "array.jsonl": (_bytes(json.dumps(ROWS, indent=1, ensure_ascii=False).encode()), ":2", ":3590"),
    "object.json": (_bytes(json.dumps({"version": 1, "data": ROWS}).encode()), ", data[0]", ", data[299]"),
    "spread.json": (_bytes(json.dumps({"data": ROWS}, indent=2).encode()), ", data[0]", ", data[299]"),
    "rows.jsonl.gz": (_bytes(gzip.compress(LINES)), ":1", ":300"),
    "rows.jsonl.bz2": (_bytes(bz2.compress(LINES)), ":1", ":300"),
    "rows.xz": (_bytes(lzma.compress(LINES)), ":1", ":300"),
    "rows.zip": (_zip, ":1", ":300"),
    "rows.parquet": (_parquet, ", row 0", ", row 299"),
    "named-otherwise.jsonl": (_parquet, ", row 0", ", row 299"),
    "file.arrow": (_arrow("new_file"), ", row 0", ", row 299"),
    "stream.arrow": (_arrow("new_stream"), ", row 0", ", row 299"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, first, last = SAME[name]
    path = tmp_path / name
    write(path)
    check_file(path)
    monkeypatch.setattr(files, "CHUNK", 1000)  # so that rows are longer and shorter than what is read at a time
    records = list(read_records(path, "…"))
    assert [record.value for record in records] == ROWS
    assert (records[0].where, records[-1].where) == (f"{path}{first}", f"{path}{last}")
    assert [record.number for record in records] == list(range(300))


def test_zstd_is_read_where_its_package_is_and_else_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + LINES)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="the package zstandard is not installed"):
        list(read_records(path, "…"))
    package = types.SimpleNamespace(open=lambda path, mode: io.BytesIO(path.read_bytes()[4:]))
    monkeypatch.setitem(sys.modules, "zstandard", package)
    assert len(list(read_records(path, "…"))) == 300


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_with_what_stands_between_its_columns(tmp_path: Path, mark: str) -> None:
    path = tmp_path / ("rows.tsv" if mark == "\t" else "rows.csv")
    rows = [["a, b; c\td|\ne", 'say "no"'], ["", "x"], ["ä\r\n", "5"]]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerow(["question", "answer"])
        writer.writerows(rows)
        file.write("\r\n")
    check_file(path)
    records = list(read_records(path, "…"))
    assert [[record.value["question"], record.value["answer"]] for record in records] == rows
    assert [record.where for record in records] == [f"{path}:2", f"{path}:4", f"{path}:5"]


DAMAGED: list[tuple[str, bytes, str]] = [
    ("x.csv", b"question,answer\na,b\na,b,c\n", ":3: has 3 cells, but the first line names 2 columns"),
    ("x.csv", b"question,answer\n\na\n", ":3: has 1 cells"),
    ("x.csv", b'question,answer\na,"b"c\n', ":2: not CSV: "),
    ("x.csv", b'question,answer\na,"b\n', ":2: not CSV: unexpected end of data"),
    ("x.csv", b"answer,question,answer\n", ":1: names the column 'answer' twice"),
    ("x.csv", "question,answer\nä,b\n".encode("latin-1"), ": not UTF-8: "),
    ("x.jsonl.gz", gzip.compress(LINES)[:-50], ": cannot be read to its end"),
    ("x.jsonl.gz", gzip.compress(LINES)[:40] + b"\0" * 40, ": cannot be "),
    ("x.xz", lzma.compress(LINES)[:80], ": cannot be "),
    ("x.bz2", bz2.compress(LINES)[:80] + b"\0" * 90, ": cannot be "),
    ("x.zip", b"PK\x03\x04" + b"\0" * 90, ": cannot be unpacked"),
    ("x.parquet", b"PAR1" + b"\0" * 90 + b"PAR1", ": cannot be read to its end"),
    ("x.parquet", b"something else", ": is no Parquet file"),
    ("x.arrow", b"ARROW1" + b"\0" * 90, ": cannot be read to its end"),
    ("x.arrow", b"\xff\xff\xff\xff" + b"\x7f" * 90, ": cannot be read to its end"),
    ("x.json", b'[{"a": 1},\n\n{"a": ]', ":3: not JSON: "),
    ("x.json", b'[{"a": 1},', ":1: not JSON: "),
    ("x.json", b'[{"a": 1}]\n[{"a": 2}]', ":1: goes on after the end of its list"),
    ("x.json", b'[{"a": 1}] and more', ":1: goes on after the end of its list"),
    ("x.json", b"[" * 100_000, ":1: nests thousands of levels deep"),
    ("x.json", b'[{"a": "\xff"}]', ": not UTF-8: "),
    ("x.json", b'{\n"one": [{"a": 1}],\n"two": [{"a": 1}]\n}', ": is JSON over several lines, and not"),
    ("x.json", b'{\n"a": 1\n}\n{\n"a": 2\n}\n', "not JSON: Extra data"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), DAMAGED, ids=[expected for _, _, expected in DAMAGED])
def test_damage_is_one_line_that_names_the_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_records(path, "…"))
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_zip_archive_of_other_than_one_file_is_refused(tmp_path: Path) -> None:
    for names, message in (
        (["a", "b"], "is a zip archive of 2 files"),
        ([], "of 0 files"),
        (["[Content_Types].xml"], "spr"),
    ):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in names:
                archive.writestr(name, "x")
        with pytest.raises(UserError, match=message):
            check_file(tmp_path / "x.zip")


def test_memory_stays_flat_over_a_large_array(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": "x" * 10_000}) for _ in range(3000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_records(path, "…")) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_a_table_on_one_line_and_spaces_around_the_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"version": "1", "data": [{"question": "a", "answer": "b"}]}))
    check_file(tmp_path / "x.json")
    assert [record.value for record in read_records(tmp_path / "x.json", "…")] == [{"question": "a", "answer": "b"}]
    (tmp_path / "x.csv").write_text("question, answer\na,b\n")
    check_file(tmp_path / "x.csv")
    assert [record.value for record in read_records(tmp_path / "x.csv", "…")] == [{"question": "a", "answer": "b"}]
