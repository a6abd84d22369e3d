"""Data files of every kind, drawn from a seed: what is in them is known, and so what must become of each row."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEEP, DROP, BAD = "keep", "drop", "bad"
"""What must become of a row: it is trained on; it is dropped and counted; it cannot be read."""
PIECES = [
    "plain words", 'say "no"', '"', "'", "a, b", "a; b", "a | b", "tab\there", "line\nline", "cr\r\nlf", "\u2028",
    "\x85", "ä ö ü", "日本語", "🙂🚀", "{}", "[1]", "\\n", "\\", "</s", "x" * 40, " lead", "trail ", "", "null",
    "5\" pipe", "\ufeff", "#", "sep=;", "{{ x }}", "{% if %}", "<b>", "NaN", "1e9", "-", "=1+1", "\x0b", "\x1c",
]  # fmt: skip
FLAT = ("alpaca", "dolly", "pair", "question", "text")
"""Rows that a table of texts can hold."""


@dataclass
class Case:
    """One file or folder, and how it is read."""

    path: Path
    settings: dict[str, Any]
    """Of ``task.data``."""
    outcomes: list[str]
    """Of each row."""
    done: list[str] = field(default_factory=list)
    """How it was written and damaged."""
    damaged: bool = False
    """Bytes were changed, so that what becomes of rows is not known."""
    joined: bool = False
    """Bytes between rows may be gone, or rows may be copied into one another."""


def mark(number: int) -> str:
    """A word that only row ``number`` has; a changed byte makes it another row's only by a rare chance."""
    return f"k{number:04d}{number * 7919 % 9973:04d}k"


def marked(word: str) -> int | None:
    """The row that has this word, if one does."""
    number = int(word[1:5])
    return number if word == mark(number) else None


def _words(rng: random.Random, simple: bool) -> str:
    pieces = [piece for piece in PIECES if not (simple and set(piece) & set('"\t\r\n,;|\x85\u2028\x0b\x1c\ufeff'))]
    return " ".join(rng.choice(pieces) for _ in range(rng.choice((1, 1, 2, 4))))


def _talk(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SHAPES: dict[str, Callable[[str, str], Row]] = {
    "chat": lambda q, a: {"messages": _talk(q, a)},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "dolly": lambda q, a: {"instruction": q, "context": "", "response": a},
    "pair": lambda q, a: {"prompt": q, "completion": a},
    "question": lambda q, a: {"question": q, "answer": a},
    "messages": lambda q, a: {"prompt": _talk(q, a)[:1], "completion": _talk(q, a)[1:]},
    "text": lambda q, a: {"text": f"{q} {a}"},
}
FORMATS = {"chat": "chat", "sharegpt": "sharegpt", "alpaca": "alpaca", "dolly": "alpaca", "text": "text"}


def _changed(rng: random.Random, shape: str, row: Row, kind: str, answer: str) -> tuple[Row, str]:
    """A row with something particular about it, and what must become of it."""
    names = list(row)
    choices = ["extra", "nul", "special", "long"]
    if kind not in ("csv", "tsv"):
        choices += ["null", "null"]
    if kind in ("jsonl", "json"):
        choices += ["surrogate", "type", "format", "reordered", "missing"]
    if shape == "chat":
        choices += ["role", "first", "last"]
    if shape in ("pair", "question", "alpaca", "dolly"):
        choices += ["empty"]
    choice = rng.choice(choices)
    if choice == "extra":
        return {**row, "extra": f"e{rng.randrange(9)}"}, KEEP
    if choice == "null":
        needed = [name for name in names if name not in ("input", "context")]
        return {**row, rng.choice(needed): None}, DROP
    if choice == "missing":
        needed = [name for name in names if name not in ("input", "context")]
        gone = rng.choice(needed)
        return {**{name: value for name, value in row.items() if name != gone}, "id": 1}, BAD
    if choice == "type":
        return {**row, names[-1] if shape != "alpaca" else "output": rng.choice([3, True, 1.5, {"a": 1}, [3]])}, BAD
    if choice == "format":
        others = [name for name in ("chat", "sharegpt", "pair") if not set(SHAPES[name]("", "")) & set(row)]
        other = rng.choice([name for name in others if not (name == "pair" and shape == "question")])
        return SHAPES[other]("a", "b"), BAD
    if choice == "reordered":
        return dict(reversed(row.items())), KEEP
    if choice == "role":
        return {"messages": [*row["messages"], {"role": "narrator", "content": "x"}]}, BAD
    if choice == "first":
        return {"messages": [{"role": "assistant", "content": "Hello"}, *row["messages"]]}, KEEP
    if choice == "last":
        return {"messages": [*row["messages"], {"role": "user", "content": "and?"}]}, KEEP
    if choice == "empty":
        return {**row, names[-1]: ""}, KEEP
    more = {"nul": "a\0b", "special": "<|im_end|> </s>", "long": "word " * 1500, "surrogate": "\ud83d"}[choice]
    outcome = {"long": DROP, "surrogate": BAD}.get(choice, KEEP)
    return json.loads(json.dumps(row).replace(json.dumps(answer)[1:-1], json.dumps(answer + more)[1:-1])), outcome


def draw(rng: random.Random, folder: Path) -> Case:
    """One case below ``folder``."""
    shape = rng.choice([*SHAPES])
    case = Case(folder / "x", _settings(rng, shape), [])
    several = rng.random() < 0.15
    files = rng.choice((2, 3)) if several else 1
    target = folder / "data" if several else folder
    target.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        case.path = _file(rng, case, shape, target, number)
    if several:
        case.path = target
        if rng.random() < 0.5:
            (target / "metadata.json").write_text(
                json.dumps({"name": "x", "license": "mit"}, indent=rng.choice((None, 1)))
            )
    if rng.random() < 0.4:
        _damage(rng, case, rng.choice([path for path in target.iterdir() if path.suffix != ".jinja"]))
    return case


def _settings(rng: random.Random, shape: str) -> Row:
    name = FORMATS.get(shape, "prompt_completion")
    settings: Row = {"format": name if shape == "text" or rng.random() < 0.3 else "auto", "overlong": "drop"}
    if rng.random() < 0.5:
        settings["gates"] = {"unreadable": "drop"}
    if rng.random() < 0.2 and shape != "text":
        settings["system"] = "Be brief."
    if rng.random() < 0.3 and shape != "text":
        settings["learn"] = rng.choice(("last", "all"))
    if rng.random() < 0.25:
        first = next(iter(SHAPES[shape]("", "")))
        settings["columns"] = {"prompt" if first == "question" else first: "Spalte 1"}
    return settings


def _file(rng: random.Random, case: Case, shape: str, folder: Path, number: int) -> Path:
    kinds = ["jsonl", "jsonl", "json", "parquet", "arrow"] + (["csv", "tsv", "csv"] if shape in FLAT else [])
    kind = rng.choice(kinds)
    simple = kind == "tsv" and rng.random() < 0.5
    first, rows = len(case.outcomes), []
    for index in range(rng.choice((1, 2, 5, 12, 40))):
        word = mark(first + index)
        question, answer = (f"{word} {_words(rng, simple)} {word}" for _ in range(2))
        row, outcome = SHAPES[shape](question, answer), KEEP
        if index and rng.random() < 0.12:
            row, outcome = _changed(rng, shape, row, kind, answer)
        rows.append({case.settings.get("columns", {}).get(_canon(name), name): value for name, value in row.items()})
        case.outcomes.append(outcome)
    content, suffix = WRITERS[kind](rng, case, rows, simple)
    pack = rng.choice([*PACKED]) if kind != "arrow" and rng.random() < 0.25 else ""
    path = folder / f"part{number}{suffix}{pack}"
    path.write_bytes(PACKED[pack](content))
    case.done.append(f"{path.name}: {shape}, {len(rows)} rows")
    return path


def _canon(name: str) -> str:
    return "prompt" if name == "question" else name


def _zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows", content)
    return out.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zip": _zipped,
}  # fmt: skip


def _jsonl(rng: random.Random, case: Case, rows: list[Row], simple: bool) -> tuple[bytes, str]:
    ends, lines = rng.choice(("\n", "\r\n")), []
    for row in rows:
        lines += [""] * (rng.random() < 0.05)
        lines.append(json.dumps(row, ensure_ascii=_has_half(row) or rng.random() < 0.5))
    content = (ends.join(lines) + ends * (rng.random() < 0.8)).encode()
    content = b"\xef\xbb\xbf" * (rng.random() < 0.1) + content
    if rng.random() < 0.15:  # a line that is none
        content = (
            content.rstrip(b"\r\n")
            + b"\n"
            + rng.choice([b'{"a": ', b"\xff\xfe\n", b"[", b"hello", b"42"]).rstrip()
            + b"\n"
        )
        case.outcomes.append(BAD)
    return content, rng.choice((".jsonl", ".jsonl", ".json"))


def _has_half(row: Row) -> bool:
    return "\\ud83d" in json.dumps(row).replace("\\ud83d\\ude42", "").replace("\\ud83d\\ude80", "")


def _json(rng: random.Random, case: Case, rows: list[Row], simple: bool) -> tuple[bytes, str]:
    value: Any = {"version": 1, "data": rows} if rng.random() < 0.4 else rows
    ascii_only = any(map(_has_half, rows))
    return json.dumps(value, indent=rng.choice((None, None, 2)), ensure_ascii=ascii_only).encode(), ".json"


def _delimited(mark_: str | None) -> Callable[[random.Random, Case, list[Row], bool], tuple[bytes, str]]:
    def write(rng: random.Random, case: Case, rows: list[Row], simple: bool) -> tuple[bytes, str]:
        delimiter, out = mark_ or rng.choice(",,;|"), io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        if mark_ is None and rng.random() < 0.1:
            out.write(f"sep={delimiter}\n")
        out.write("\n" * (rng.random() < 0.1))
        shown = [name.capitalize() if rng.random() < 0.2 else name for name in names]
        if simple:  # a table that knows no quotes
            lines = [shown, *([_bare(rng, row.get(name, "")) for name in names] for row in rows)]
            out.write("".join(delimiter.join(line) + "\n" for line in lines))
        else:
            how: Any = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
            end = rng.choice(("\n", "\r\n"))
            writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=how)
            writer.writerow(shown)
            for row in rows:
                writer.writerow([row.get(name, "") for name in names])
                out.write(end * (rng.random() < 0.05))
        return ("\ufeff" * (rng.random() < 0.1) + out.getvalue()).encode(), ".tsv" if mark_ == "\t" else ".csv"

    return write


def _bare(rng: random.Random, text: str) -> str:
    return rng.choice(("", "", '"', '5" ')) + text + rng.choice(("", "", '"'))


def _columnar(rng: random.Random, case: Case, rows: list[Row], simple: bool) -> tuple[bytes, str]:
    import pyarrow
    from pyarrow import ipc, parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    out = io.BytesIO()
    if rng.random() < 0.5:
        parquet.write_table(table, out, row_group_size=rng.choice((1, 7, 1000)))
        return out.getvalue(), ".parquet"
    with (ipc.new_file if rng.random() < 0.5 else ipc.new_stream)(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rng.choice((1, 7, 1000)))
    return out.getvalue(), ".arrow"


WRITERS: dict[str, Callable[[random.Random, Case, list[Row], bool], tuple[bytes, str]]] = {
    "jsonl": _jsonl, "json": _json, "csv": _delimited(None), "tsv": _delimited("\t"), "parquet": _columnar,
    "arrow": _columnar,
}  # fmt: skip


def _damage(rng: random.Random, case: Case, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if not content:
        return
    action, at = (
        rng.choice(("flip", "cut", "delete", "double", "insert", "lines", "encoding")),
        rng.randrange(len(content)),
    )
    odd = rng.choice(
        [b'"', b"\n", b"\0", b"\xff", b",", b"\t", b'""', b"{", b"]", b"\r", b"\\", b"\xe2\x80\xa8", b"null"]
    )
    size = rng.choice((1, 1, 3, 50, 2000))
    if action == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif action == "cut":
        del content[at:]
    elif action == "delete":
        del content[at : at + size]
    elif action == "double":
        content[at:at] = content[at : at + size]
    elif action == "insert":
        content[at:at] = odd
    elif action == "lines":
        lines = bytes(content).split(b"\n")
        rng.shuffle(lines)
        content = bytearray(b"\n".join(lines))
    else:
        to = rng.choice(("utf-16", "utf-16-le", "cp1252"))
        content = bytearray(bytes(content).decode("utf-8", "ignore").encode(to, "ignore"))
    path.write_bytes(bytes(content))
    case.damaged, case.joined = True, case.joined or action not in ("insert", "cut")
    case.done.append(f"{path.name}: {action} at {at}")
