"""The rows of a data file of any kind that is read: JSON lines, JSON, CSV, Parquet, Arrow, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from galley.contract.data_files import (
    Kind,
    data_kind,
    delimiter,
    first_bytes,
    inner_suffix,
    not_a_table,
    opened,
    table_in,
)
from galley.contract.errors import UserError

CHUNK = 1 << 20
ROWS = 256
"""Of a columnar file, that are in memory at once."""


class Record(NamedTuple):
    """A row as it was read."""

    number: int
    """Of the row or line, from 0."""
    where: str
    """For an error line: ``file:line`` counted from 1, or ``file, row N`` counted from 0."""
    value: Any


def read_records(path: Path, sample: str) -> Iterator[Record]:
    """The rows of ``path``, in order. ``sample``: a row, for error messages.

    Raises :class:`UserError` naming file and line (or row) for what cannot be read, and for a file without rows.
    """
    try:
        kind = data_kind(path, first_bytes(path))
        with opened(path) as file:
            yield from _read(kind, path, file, sample)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8: {error.reason} at {error.object[error.start : error.start + 4]!r}"
        raise UserError(str(path), what, "save the file as UTF-8") from None


def _read(kind: Kind, path: Path, file: IO[bytes], sample: str) -> Iterator[Record]:
    if kind == "jsonl":
        return _lines(path, file, sample)
    if kind == "json":
        return _json(path, file, sample)
    return _csv(path, file) if kind == "csv" else _columnar(path, file, {"parquet": _parquet, "arrow": _arrow}[kind])


def _lines(path: Path, file: IO[bytes], sample: str) -> Iterator[Record]:
    for index, line in enumerate(file):
        if line.strip():
            where = f"{path}:{index + 1}"
            value = _parse(where, line, sample)
            if index == 0 and inner_suffix(path) == ".json" and (key := table_in(value)):
                yield from _table(path, key, value)
            else:
                yield Record(index, where, value)


def _parse(where: str, line: bytes, sample: str) -> object:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(where, f"not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", f"write one object a line, such as {sample}") from None
    except RecursionError:
        raise UserError(where, "nests thousands of levels deep", "make it flatter") from None
    return value


def _json(path: Path, file: IO[bytes], sample: str) -> Iterator[Record]:
    """The objects of an array, read piece by piece; of an object that holds one, which is read whole."""
    text = _decoded(file)
    start = text.read(CHUNK).lstrip()
    if start.startswith("["):
        yield from _array(path, text, start, sample)
        return
    value = _parse(str(path), (start + text.read()).encode("utf-8", "surrogatepass"), sample)
    key = table_in(value)
    if key is None:
        raise not_a_table(path)
    yield from _table(path, key, value)


def _table(path: Path, key: str, value: Any) -> Iterator[Record]:
    return (Record(index, f"{path}, {key}[{index}]", row) for index, row in enumerate(value[key]))


def _array(path: Path, text: io.TextIOWrapper, start: str, sample: str) -> Iterator[Record]:
    """Values of an array that ``start`` begins, each decoded from a buffer that grows until it holds it whole."""
    decoder, buffer, line, index, grow = json.JSONDecoder(), start[1:], 1, 0, CHUNK
    while True:
        stripped = buffer.lstrip(" \t\r\n,")
        line += buffer[: len(buffer) - len(stripped)].count("\n")
        buffer = stripped
        where = f"{path}:{line}"
        if buffer.startswith("]"):
            _check_over(path, line, buffer[1:], text)
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except RecursionError:
            raise UserError(where, "nests thousands of levels deep", "make it flatter") from None
        except ValueError as error:
            more = text.read(grow)
            if not more:
                raise UserError(where, f"not JSON: {error}", f"write objects such as {sample}") from None
            buffer, grow = buffer + more, grow * 2  # doubled, so that a long row is not decoded from its start often
            continue
        yield Record(index, where, value)
        line, index, buffer, grow = line + buffer.count("\n", 0, end), index + 1, buffer[end:], CHUNK


def _check_over(path: Path, line: int, rest: str, text: io.TextIOWrapper) -> None:
    """Raise :class:`UserError` where anything but white space follows the end of an array."""
    while rest or (rest := text.read(CHUNK)):
        if rest.strip():
            raise UserError(
                f"{path}:{line}", "goes on after the end of its list", "write one list, or an object a line"
            )
        rest = ""


def _csv(path: Path, file: IO[bytes]) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    text = _decoded(file)
    header = text.readline()
    mark = delimiter(header)
    names = [name.strip() for name in next(csv.reader([header], delimiter=mark), [])]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}:1", f"names the column {twice[0]!r} twice", "give each column its own name")
    reader, index = csv.reader(text, delimiter=mark, strict=True), 0
    while True:
        where = f"{path}:{reader.line_num + 2}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(where, f"not CSV: {error}", "quote cells that hold quotes or line ends") from None
        if cells is None:
            return
        if cells and len(cells) != len(names):
            what = f"has {len(cells)} cells, but the first line names {len(names)} columns"
            raise UserError(where, what, f"quote cells that hold {mark!r} or line ends")
        if cells:
            yield Record(index, where, dict(zip(names, cells, strict=True)))
            index += 1


def _decoded(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _columnar(path: Path, file: IO[bytes], batches: Callable[[IO[bytes]], Iterator[Any]]) -> Iterator[Record]:
    """The rows of a file of columns, whose record batches ``batches`` reads one after the other."""
    from pyarrow import ArrowException

    try:
        rows = (row for batch in batches(file) for row in batch.to_pylist())
        yield from (Record(index, f"{path}, row {index}", row) for index, row in enumerate(rows))
    except ArrowException as error:
        raise _damaged(path, error) from None


def _parquet(file: IO[bytes]) -> Iterator[Any]:
    from pyarrow import parquet

    batches: Iterator[Any] = parquet.ParquetFile(file).iter_batches(batch_size=ROWS)
    return batches


def _arrow(file: IO[bytes]) -> Iterator[Any]:
    """Of an Arrow file, which says at its end where each stands, or of a stream of them."""
    from pyarrow import ipc

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if not is_file:
        return iter(ipc.open_stream(file))
    reader = ipc.open_file(file)
    return (reader.get_batch(number) for number in range(reader.num_record_batches))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(str(path), f"cannot be read to its end ({reason})", "copy or write it again")
