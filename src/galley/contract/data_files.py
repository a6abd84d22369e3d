"""What a data file is, told by its first bytes and its suffix: one that holds no rows that can be read is refused.

Standard library only: ``plan`` asks on a login node, ``prepare`` again.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import importlib
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, cast

from galley.contract.delimited import read_layout
from galley.contract.errors import UserError
from galley.contract.row_formats import COLUMNS, SAMPLE, advice, is_judged, is_of, known_columns, recognised

Kind = Literal["jsonl", "json", "csv", "parquet", "arrow"]
"""``jsonl``: an object a line. ``json``: an array of objects, or an object that holds one. ``csv``: text in columns."""
HEAD = 1 << 16
COMPRESSED = {
    b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"BZh": ".bz2", b"PK\x03\x04": ".zip",
    b"PK\x05\x06": ".zip",
}  # fmt: skip
"""First bytes of what is compressed, and the suffix that goes with them."""
UNPACKING = (EOFError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, NotImplementedError, RuntimeError)
"""What unpacking raises of a damaged file; of a zip archive with a password or an odd compression the last two."""
COLUMNAR: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
OTHERS: list[tuple[bytes, str, str]] = [
    (b"SQLite format 3\x00", "an SQLite data base", "export its rows as JSONL"),
    (b"\x80\x04\x95", "a pickle", "save its rows as JSONL where you made it"),
    (b"\x80\x05\x95", "a pickle", "save its rows as JSONL where you made it"),
    (b"\x89HDF", "an HDF5 file", "save its rows as JSONL"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > 'utf8-{path}'"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8 '{path}' > 'utf8-{path}'"),
    (b"version https://git-lfs.github.com/spec/", "a git-LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"<!DOCTYPE", "a web page", "download the file itself, often under `resolve` or `raw`"),
    (b"<html", "a web page", "download the file itself, often under `resolve` or `raw`"),
]
"""First bytes of files that hold no rows, what they are, and what to do."""
SUFFIXES = {
    ".xlsx": "a spreadsheet", ".xls": "a spreadsheet", ".pkl": "a pickle", ".pickle": "a pickle",
    ".parquet": "no Parquet file", ".arrow": "no Arrow file",
    ".yaml": "a YAML file", ".yml": "a YAML file", ".md": "a Markdown file", ".pt": "a PyTorch file",
    ".safetensors": "a file of tensors", ".npy": "a numpy array", ".gguf": "a model",
}  # fmt: skip
"""What a file is that does not begin like one that is read, by its suffix."""


def check_file(path: Path, form: str = "auto", columns: Mapping[str, str] | None = None) -> None:
    """Raise :class:`UserError` where ``path`` holds no rows of the format ``form``, as far as its beginning shows.

    ``columns``: the file's names for the format's columns. A file that cannot be read, or is empty, passes.
    """
    try:
        head = first_bytes(path)
        record = _first_record(path, data_kind(path, head), head, columns or {})
    except OSError:
        return
    if not record:
        return
    renamed = rename(record, columns or {})
    known = recognised(renamed) if form == "auto" else is_of(form, renamed)
    if not known or (form == "auto" and is_judged(renamed)):
        shown = " ".join(", ".join(map(str, record)).split())[:200] or "nothing"
        wanted = "a conversation" if form == "auto" else f"of the format {form}"
        raise UserError(f"{path}:{_first_number(head)}", f"not {wanted}: it has {shown}", advice(record))


def rename(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """``record`` with the format's names for its columns; ``columns``: format's name to the file's.

    Capitals and blanks around a known name do not count: `` Question`` is ``question``, where there is no other.
    """
    named = column_names(tuple(record), tuple(columns.items()))
    return record if named is None else {name: record[key] for name, key in named.items()}


@functools.lru_cache(maxsize=4096)
def column_names(keys: tuple[str, ...], columns: tuple[tuple[str, str], ...]) -> dict[str, str] | None:
    """For a row with these keys, the format's name of each column that may be read to its key; None: as they are."""
    spelled = known_columns(keys)
    given = {name: key for name, column in columns if (key := _key(column, keys)) is not None}
    # Where the prompt is named, what else could have been the prompt is not: `columns.prompt=question` beside `input`.
    groups = [group for form in COLUMNS.values() for group in form if group[0] in dict(columns)]
    settled = {*dict(columns).values(), *(name for group in groups for name in group)}
    rest = {spelled.get(key, key): key for key in keys if key not in given.values()}
    named = {name: key for name, key in rest.items() if name not in settled} | given
    return None if named == {key: key for key in keys} else named


def _key(column: str, keys: tuple[str, ...]) -> str | None:
    """The key that the user names ``column``: it, or the only one that is it but for capitals and blanks around."""
    alike = [key for key in keys if key.strip().lower() == column.strip().lower()]
    return column if column in keys else alike[0] if len(alike) == 1 else None


def first_bytes(path: Path) -> bytes:
    """The first 64 KiB of a file, after decompression. Raises ``OSError``, or :class:`UserError` for a damaged one."""
    with opened(path) as file:
        try:
            return file.read(HEAD)
        except (*UNPACKING, gzip.BadGzipFile, ValueError) as error:
            raise UserError(str(path), f"cannot be unpacked ({error})", "copy it again") from None


def opened(path: Path) -> IO[bytes]:
    """The bytes of a data file, unpacked where it is compressed. Raises ``OSError`` or :class:`UserError`."""
    with path.open("rb") as file:
        start = file.read(8)
    suffix = next((suffix for magic, suffix in COMPRESSED.items() if start.startswith(magic)), None)
    if suffix is None:
        return path.open("rb")
    if suffix == ".zip":
        return _only_member(path)
    if suffix == ".zst":
        return _zstd(path)
    unpack: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    return cast(IO[bytes], unpack(path, "rb"))


def _only_member(path: Path) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(path)
    except (*UNPACKING, ValueError) as error:
        raise UserError(str(path), f"cannot be unpacked ({error})", "copy it again") from None
    files = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if "[Content_Types].xml" in files:
        raise UserError(str(path), "is a spreadsheet or document", "save its rows as CSV")
    if len(files) != 1:
        raise UserError(str(path), f"is a zip archive of {len(files)} files, not of one", "unpack it")
    try:
        return archive.open(files[0])
    except (*UNPACKING, ValueError) as error:
        raise UserError(str(path), f"cannot be unpacked ({error})", "copy it again, or unpack it yourself") from None


def _zstd(path: Path) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        what = "is compressed with zstd, for which the package zstandard is not installed here"
        raise UserError(str(path), what, "install it (pip install zstandard), or unpack the file: unzstd") from None
    return cast(IO[bytes], io.BufferedReader(zstandard.open(path, "rb")))


def data_kind(path: Path, head: bytes) -> Kind:
    """What the file ``path`` is that begins with ``head``. Raises :class:`UserError` for what holds no rows."""
    for magic, kind in COLUMNAR.items():
        if head.startswith(magic):
            return kind
    other = next(((what, todo) for magic, what, todo in OTHERS if head.startswith(magic)), None)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    suffix = inner_suffix(path)
    if other is None and text[:1] not in (b"{", b"[", b"") and suffix in SUFFIXES:
        other = SUFFIXES[suffix], "save its rows as CSV or JSONL"
    if other is None and head[:1000].count(b"\0") > len(head[:1000]) // 4:
        other = "UTF-16 text without its mark, or no text", "save its rows as UTF-8 text"
    if other:
        what, todo = other
        raise UserError(str(path), f"is {what}", _todo(todo, path))
    if suffix in (".csv", ".tsv"):
        return "csv"
    return "json" if _is_json(text, suffix, len(head) < HEAD) else "jsonl"


def _is_json(text: bytes, suffix: str, whole: bool) -> bool:
    """Whether ``text`` begins one JSON value over several lines, or an array of objects, and not an object a line."""
    line, _, rest = text.partition(b"\n")
    complete = bool(rest) or whole
    value = _json(line) if complete else None
    if text.startswith(b"["):
        return suffix == ".json" or value is None or (isinstance(value, list) and all_objects(value))
    if not text.startswith(b"{") or not complete:
        return False
    return value is None and (line.strip() == b"{" or _json(text) is not None)


def all_objects(value: object) -> bool:
    """Whether ``value`` is a list of objects, at least of one."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def table_in(value: object, columns: Mapping[str, str] | None = None) -> str | None:
    """The key of the one list of objects that an object which is no row holds, as in ``{"data": [{…}, …]}``.

    ``columns``: the file's names for the format's columns, by which it may be a row.
    """
    if not isinstance(value, Mapping) or _is_row(value, columns or {}):
        return None
    keys = [key for key, item in value.items() if all_objects(item)]
    return keys[0] if len(keys) == 1 else None


def _is_row(value: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    renamed = rename(value, columns)
    return recognised(renamed) is not None or is_of("text", renamed)


def inner_suffix(path: Path) -> str:
    """The suffix in small letters, before that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    inner = [suffix for suffix in suffixes if suffix not in COMPRESSED.values()]
    return inner[-1] if inner else ""


def _first_record(path: Path, kind: Kind, head: bytes, columns: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The first row of a file of lines, or what it has of it: the columns. None where that takes reading on."""
    if kind == "json":
        return _first_of(path, _json(head.removeprefix(b"\xef\xbb\xbf")), columns) if len(head) < HEAD else None
    if kind == "csv":
        layout = read_layout(path, head.decode("utf-8-sig", "replace"), len(head) < HEAD)
        return layout and dict.fromkeys(layout.names, "")
    lines = [line for line in head.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True) if line.strip()]
    if not lines or not (lines[0].endswith(b"\n") or len(head) < HEAD):
        return None
    record = _parsed(path, head, lines[0]) if kind == "jsonl" else None
    if inner_suffix(path) == ".json" and len(lines) == 1 and table_in(record, columns):
        return _first_of(path, record, columns)
    return record if isinstance(record, Mapping) else None


def _first_of(path: Path, value: object, columns: Mapping[str, str]) -> Mapping[str, Any] | None:
    """The first row of a file that holds one JSON value; None where it is damaged. Raises for one without rows."""
    key = table_in(value, columns)
    if isinstance(value, Mapping) and key is None:
        raise not_a_table(path)
    rows = value[key] if isinstance(value, Mapping) else value
    first = rows[0] if isinstance(rows, list) and rows else None
    return first if isinstance(first, Mapping) else None


def not_a_table(path: Path) -> UserError:
    """For one JSON object over several lines, which is neither a row nor holds a list of them."""
    what = "is JSON over several lines, and not a list of objects"
    return UserError(str(path), what, _todo("write one object a line: jq -c . '{path}' > '{to}'", path))


def _parsed(path: Path, head: bytes, line: bytes) -> object:
    """The first line's value; None for text that is not UTF-8 or nests too deep, of which ``prepare`` tells more."""
    try:
        return cast(object, json.loads(line))
    except (UnicodeDecodeError, RecursionError):
        return None
    except ValueError as error:
        where = f"{path}:{_first_number(head)}"
        raise UserError(where, f"not JSON: {error}", f"write one object a line, such as {SAMPLE}") from None


def _first_number(head: bytes) -> int:
    """Number from 1 of the first line that is not blank."""
    return next((number for number, line in enumerate(head.splitlines(), 1) if line.strip()), 1)


def _json(line: bytes) -> object:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value


def _todo(todo: str, path: Path) -> str:
    to = path.with_suffix("").with_suffix(".jsonl").name
    return todo.replace("{path}", path.name).replace("{to}", to if to != path.name else f"rows-{to}")
