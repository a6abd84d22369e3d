"""CSV and TSV as spreadsheets and scripts write them: quotes, first lines, names of columns, encodings."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from galley.contract.data_files import check_file, rename
from galley.contract.errors import UserError
from galley.prepare.files import read_records
from galley.prepare.formats.prompt_completion import PROMPT_COMPLETION
from galley.prepare.formats.rows import Reading, read_file

HEADER = "question\tanswer\n"


def cells(path: Path) -> list[tuple[str, ...]]:
    check_file(path)
    return [tuple(record.value.values()) for record in read_records(path, "…")]


def notes(path: Path) -> list[str]:
    return [note for _, row in read_file(path, PROMPT_COMPLETION) for note in row.notes]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BARE: dict[str, tuple[str, list[tuple[str, ...]], int]] = {
    "never closed": ('a\t"b\nc\td\n', [("a", '"b'), ("c", "d")], 1),
    "closed two rows on": ('a\t"b\nc\td\ne"\tf\n', [("a", '"b'), ("c", "d"), ('e"', "f")], 1),
    "closed at the end of a later row": ('a\t"b\nc\td"\ne\tf\n', [("a", '"b'), ("c", 'd"'), ("e", "f")], 1),
    "a word in quotes": ('"No" he said\t"b" or "c"\na\tb\n', [('"No" he said', '"b" or "c"'), ("a", "b")], 1),
    "inches": ('a 5" pipe\tb\n"\t"\n', [('a 5" pipe', "b"), ('"', '"')], 1),
    "in the first column": ('"a\tb\n"c\td\n', [('"a', "b"), ('"c', "d")], 2),
}


@pytest.mark.parametrize("name", BARE)
def test_quotes_that_are_only_characters_join_no_rows(tmp_path: Path, name: str) -> None:
    text, expected, concerned = BARE[name]
    path = written(tmp_path / "x.tsv", HEADER + text)
    assert cells(path) == expected
    found = notes(path)
    assert len(found) == concerned
    assert "begins with a quote; none of the file's quotes were taken as CSV's" in found[0]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_a_file_that_quotes_its_cells_is_read_so_without_a_word(tmp_path: Path, mark: str) -> None:
    rows = [("a\nb", f"c{mark}d"), ('say "no"', "e"), ("f\n\ng", "h"), ('"', '""'), (f"x{mark}\n{mark}", "i")]
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows([("question", "answer"), *rows])
    path = written(tmp_path / ("x.tsv" if mark == "\t" else "x.csv"), out.getvalue())
    assert cells(path) == rows
    assert notes(path) == []


def test_rows_joined_inside_quotes_are_told_where_each_line_could_be_one(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", 'question,answer\na,b\nc,"d\ne,f"\ng,h\n')
    assert cells(path) == [("a", "b"), ("c", "d\ne,f"), ("g", "h")]
    (note,) = notes(path)
    assert note == (
        "rows go over several lines inside quotes, at line 3 over lines that could be rows of their own: look whether "
        "a quote is missing there"
    )


ONE = [
    ("x.csv", 'text\n"a\nb"\nc, d\n', [("a\nb",), ("c, d",)], 0),
    ("x.csv", 'text\n"a ""b""\nc"\n"d ""e"" f"\n', [('a "b"\nc',), ('d "e" f',)], 0),
    ("x.csv", 'text\na 5" pipe\n"b\nc"\n', [('a 5" pipe',), ("b\nc",)], 1),
    ("x.tsv", 'text\n"a\nb"\nc\n', [("a\nb",), ("c",)], 1),
    ("x.tsv", 'text\na 5" pipe\n"b\nc"\n', [('a 5" pipe',), ('"b',), ('c"',)], 1),
    ("x.tsv", 'text\n"b\nc\n', [('"b',), ("c",)], 1),
]


@pytest.mark.parametrize(("name", "content", "expected", "concerned"), ONE)
def test_files_of_one_column(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str]], concerned: int
) -> None:
    path = written(tmp_path / name, content)
    records = list(read_records(path, "…"))
    assert [tuple(record.value.values()) for record in records] == expected
    assert sum(1 for record in records if record.note) == concerned


def test_a_mark_and_blank_lines_before_the_first_row_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", b'\xef\xbb\xbf\r\n\r\n{"text": "a"}\r\n')
    check_file(path, "text")
    assert [(record.number, record.value) for record in read_records(path, "…")] == [(2, {"text": "a"})]


REFUSED = [
    ("x.csv", "question,answer\na,b\nquestion,answer\nc,d\n", ":3: names the columns again, as in files that were"),
    ("x.csv", "\ufeffquestion,answer\na,b\n\ufeffquestion, answer\n", ":3: names the columns again, as in files that"),
    ("x.csv", 'question,answer\na,"b\nc,d\n', ":2: not CSV: a quote that is opened here is not closed"),
    ("x.csv", 'question,answer\na,"b\nc,"d"\n', ":2: not CSV: a quote that is opened here is not closed"),
    ("x.csv", 'question,answer,x\na,"b,c\nd,e",f,g\n', ":2: has 4 cells by line 3, where a quote is closed"),
    ("x.tsv", 'question\tanswer\na\t"b\tc"\nd\t"e\nf\n', ":3: not CSV: a quote that is opened here"),
    ("x.tsv", "question\tanswer\na\tb\tc\n", ":2: has 3 cells, but the first line names 2 columns"),
]


@pytest.mark.parametrize(("name", "text", "expected"), REFUSED, ids=[expected for *_, expected in REFUSED])
def test_what_can_be_read_neither_way_names_the_line(tmp_path: Path, name: str, text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        cells(written(tmp_path / name, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


FIRST_LINES = {
    "capitals": "Question,Answer\na,b\n",
    "blanks": " question , ANSWER\t\na,b\n",
    "a BOM": "\ufeffquestion,answer\na,b\n",
    "a BOM and quotes": '\ufeff"Question","Answer"\r\n"a","b"\r\n',
    "two BOMs": "\ufeff\ufeffquestion,answer\na,b\n",
    "blank lines": "\n \r\nquestion,answer\n\na,b\n",
    "Excel's delimiter": "sep=;\nquestion;answer\na;b\n",
    "Excel's delimiter in quotes": '\ufeff"sep=,"\r\nQuestion,Answer\r\na,b\r\n',
    "semicolons and a comma": 'question;answer;"a, b, c"\na;b;\n',
    "semicolons after a name with commas": "question;answer;a, b, c\na;b;\n",
    "empty columns and rows at the end": "question,answer,,\na,b,,\n,,,\n",
    "old Macs": "question,answer\ra,b\r",
}


@pytest.mark.parametrize("name", FIRST_LINES)
def test_first_lines_as_they_come(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "x.csv", FIRST_LINES[name])
    check_file(path)
    ((_, row),) = read_file(path, PROMPT_COMPLETION)
    assert [message["content"] for message in row.messages] == ["a", "b"]


def test_line_numbers_count_what_comes_before_the_names(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "\nsep=;\nquestion;answer\na;b\nc\n")
    with pytest.raises(UserError, match=r"x.csv:5: has 1 cells"):
        cells(path)
    path = written(tmp_path / "y.csv", "\nquestion,question\n")
    with pytest.raises(UserError, match=r"y.csv:2: names the column 'question' twice"):
        check_file(path)


@pytest.mark.parametrize("content", ["question;answer\na;b\nf\u00fcr;gut\n", "question;\u00fcber\na;b\n"])
def test_a_file_in_windows_encoding_names_the_line_and_the_way_out(tmp_path: Path, content: str) -> None:
    path = written(tmp_path / "x.csv", content.encode("cp1252"))
    line = 1 + content[: content.index("\u00fc")].count("\n")
    with pytest.raises(UserError) as caught:
        list(read_records(path, "…"))
    assert str(caught.value).startswith(f"{path}:{line}: not UTF-8: ")
    assert "\u00fc" in str(caught.value)
    assert str(caught.value).endswith("save the file as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW")


def test_bytes_that_are_no_text_at_all_name_the_line(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", b"question,answer\na,b\n\x81\x8d,\xff\n")
    with pytest.raises(UserError, match=r"x.csv:3: not UTF-8: .*; save the file as UTF-8$"):
        list(read_records(path, "…"))


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"Prompt": 1, "Completion": 2}, {}, {"prompt": 1, "completion": 2}),
        ({"Messages": 1}, {}, {"messages": 1}),
        ({"Instruction": 1, "instruction": 2, "output": 3}, {}, None),
        ({"PROMPT": 1, "Prompt": 2}, {}, None),
        ({"Frage": 1, "answer": 2}, {"prompt": "frage"}, {"prompt": 1, "answer": 2}),
        ({"Question": 1, "answer": 2, "x": 3}, {"prompt": "x"}, {"prompt": 3, "answer": 2}),
        ({"question": 1, "answer": 2}, {"prompt": "frage"}, {"answer": 2}),
    ],
)
def test_names_of_columns(record: dict[str, int], columns: dict[str, str], expected: dict[str, int] | None) -> None:
    assert rename(record, columns) == (record if expected is None else expected)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("key", ["dialog", "Messages", "turns"])
def test_json_lines_with_a_list_under_a_name_of_its_own_are_rows(tmp_path: Path, count: int, key: str) -> None:
    """The first row was taken for a table, and its turns for rows."""
    from galley.prepare.formats.chat import CHAT

    rows = [{key: TURNS, "id": number} for number in range(count)]
    path = written(tmp_path / "x.json", "\n" + "\n".join(map(json.dumps, rows)) + "\n\n")
    columns = {} if key == "Messages" else {"messages": key}
    check_file(path, columns=columns)
    found = [row.messages for _, row in read_file(path, CHAT, Reading(columns))]
    assert found == [TURNS] * count


def test_json_lines_whose_list_is_not_named_are_refused_as_such(tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", (json.dumps({"dialog": TURNS}) + "\n") * 2)
    with pytest.raises(UserError, match=r"x.json:1: not a conversation: it has dialog"):
        check_file(path)


def test_a_table_of_rows_stays_one_whatever_the_columns_are_called(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"frage": "a", "antwort": "b"}] * 3
    path = written(tmp_path / "x.json", json.dumps({"version": 2, "rows": rows}))
    columns = {"prompt": "frage", "completion": "antwort"}
    check_file(path, columns=columns)
    assert [record.value for record in read_records(path, "…", columns)] == rows
