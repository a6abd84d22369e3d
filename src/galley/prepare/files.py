"""The rows of a data file of any kind that is read: JSON lines, JSON, CSV, Parquet, Arrow, compressed or not."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from galley.contract.data_files import (
    UNPACKING,
    Kind,
    data_kind,
    first_bytes,
    inner_suffix,
    not_a_table,
    opened,
    table_in,
)
from galley.contract.errors import UserError
from galley.prepare.delimited import read_delimited
from galley.prepare.record import Record

CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"
ROWS = 256
"""Of a columnar file, that are in memory at once."""


def read_records(
    path: Path, sample: str, columns: Mapping[str, str] | None = None, errors: bool = False
) -> Iterator[Record]:
    """The rows of ``path``, in order.

    ``sample``: a row, for error messages. ``columns``: the file's names for the format's columns. ``errors``: a row
    that cannot be read comes as a record with its error, where the rows after it can.

    Raises :class:`UserError` naming file and line (or row) for what cannot be read, and for a file without rows.
    """
    try:
        kind = data_kind(path, first_bytes(path))
        with opened(path) as file:
            for record in _read(kind, path, file, sample, columns or {}):
                if record.error and not errors:
                    raise record.error
                yield record
    except (*UNPACKING, OSError) as error:
        raise _damaged(path, error) from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> UserError:
    """Names the first line that is not UTF-8; read again, for a decoder only knows its place in what it was given."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return not_utf8(f"{path}:{number}", error)
    return UserError(str(path), "not UTF-8 when it was read first", "do not write to it while it is read")


def not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    """For a line whose bytes are no UTF-8; Windows' encoding, in which most such files are, is named where it fits."""
    shown = error.object[max(error.start - 20, 0) : error.start + 20]
    what = f"not UTF-8: {error.reason} at byte {error.start}"
    try:
        what += f", as WINDOWS-1252 it is {shown.decode('cp1252')!r}"
    except UnicodeDecodeError:
        return UserError(where, f"{what}, {shown!r}", "save the file as UTF-8")
    return UserError(where, what, "save the file as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW")


def _read(kind: Kind, path: Path, file: IO[bytes], sample: str, columns: Mapping[str, str]) -> Iterator[Record]:
    if kind == "jsonl":
        return _lines(path, file, sample, columns)
    if kind == "json":
        return _json(path, file, sample, columns)
    if kind == "csv":
        return read_delimited(path, file)
    return _columnar(path, file, {"parquet": _parquet, "arrow": _arrow}[kind])


def _lines(path: Path, file: IO[bytes], sample: str, columns: Mapping[str, str]) -> Iterator[Record]:
    """An object a line, or in a ``.json`` file of one line the rows of the list that the one object holds."""
    lines = ((index, line) for index, line in enumerate(file) if line.removeprefix(BOM).strip())
    first, second = next(lines, None), next(lines, None)
    alone = inner_suffix(path) == ".json" and second is None
    for index, line in itertools.chain((item for item in (first, second) if item), lines):
        where, error = f"{path}:{index + 1}", None
        try:
            value = _parse(where, line, sample)
        except UserError as caught:
            value, error = None, caught
        if alone and (key := table_in(value, columns)):
            yield from _table(path, key, value)
        else:
            yield Record(index, where, value, error=error)


def _parse(where: str, line: bytes, sample: str) -> object:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(where, error) from None
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", f"write one object a line, such as {sample}") from None
    except RecursionError:
        raise UserError(where, "nests thousands of levels deep", "make it flatter") from None
    return value


def _json(path: Path, file: IO[bytes], sample: str, columns: Mapping[str, str]) -> Iterator[Record]:
    """The objects of an array, read piece by piece; of an object that holds one, which is read whole."""
    text = _decoded(file)
    start = text.read(CHUNK).lstrip()
    if start.startswith("["):
        yield from _array(path, text, start, sample)
        return
    value = _parse(str(path), (start + text.read()).encode("utf-8", "surrogatepass"), sample)
    key = table_in(value, columns)
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


def _decoded(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _columnar(path: Path, file: IO[bytes], batches: Callable[[IO[bytes]], Iterator[Any]]) -> Iterator[Record]:
    """The rows of a file of columns, whose record batches ``batches`` reads one after the other."""
    from pyarrow import ArrowException

    try:
        rows = (row for batch in batches(file) for row in _rows(batch))
        for index, row in enumerate(rows):
            where = f"{path}, row {index}"
            if isinstance(row, ArrowException):
                error = UserError(where, f"not UTF-8: {first_line(row)}", "write its texts as UTF-8")
                yield Record(index, where, None, error=error)
            else:
                yield Record(index, where, row)
    except ArrowException as error:
        raise _damaged(path, error) from None


def _rows(batch: Any) -> list[Any]:
    """The rows of a record batch; in the place of one with text that is not UTF-8, Arrow's error.

    Raises ``ArrowInvalid`` where the batch is damaged. Nothing of a batch or row is read before all of it was looked
    through: Arrow follows an offset of a damaged file wherever it leads.
    """
    from pyarrow import ArrowInvalid

    try:
        batch.validate(full=True)
    except ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        if batch.num_rows == 1:
            return [error]
        return [row for number in range(batch.num_rows) for row in _rows(batch.slice(number, 1))]
    rows: list[Any] = batch.to_pylist()
    return rows


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
    return UserError(str(path), f"cannot be read to its end ({first_line(error)})", "copy or write it again")


def first_line(error: BaseException) -> str:
    """What an error of a library says first, and at most 200 characters of it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
