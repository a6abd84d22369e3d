"""Headers of model files, read with every length held against the file's own size. Part of the contract.

A header says how much follows it, and a damaged or hostile one says anything: nothing is allocated, nor gone through,
for what the file cannot hold. The standard library only.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from galley.contract.files import open_regular, parse_json

LENGTH_BYTES = 8
_SAFETENSORS = 100 << 20
"""The most that safetensors itself reads as a header."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of an element, of the types whose elements are whole bytes."""

# GGUF v3, "metadata_value_type": those of a fixed size, strings and arrays.
_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEY, _PAIRS, _ITEMS, _DEPTH = 65535, 4096, 4_000_000, 4
"""Bytes of a key (by the specification); pairs, strings in an array, and arrays in arrays: far above any file's."""


def read_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """Name to ``{dtype, shape, data_offsets}``, by the format's own page.

    Raises ``ValueError`` where the file is not whole or not one, ``OSError`` where it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > size - LENGTH_BYTES:
            raise ValueError("the header is cut short")
        if length > _SAFETENSORS:
            raise ValueError(f"a header of {length >> 20} MB")
        header = parse_json(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    end = max((_end(name, tensor) for name, tensor in header.items()), default=0)
    if size != LENGTH_BYTES + length + end:
        raise ValueError(f"{size:,} bytes, but its header says {LENGTH_BYTES + length + end:,}")
    return header


def _end(name: str, tensor: Any) -> int:
    """Where a tensor's bytes end."""
    shown = repr(name[:80])
    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str):
        raise ValueError(f"its header says nothing usable about {shown}")
    shape, offsets = tensor.get("shape"), tensor.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"its header has no shape and offsets for {shown}")
    bits = _BITS.get(tensor["dtype"])
    if bits and math.prod(shape) * bits // 8 != offsets[1] - offsets[0]:
        raise ValueError(f"{shown} of {shape} {tensor['dtype']} has {offsets[1] - offsets[0]:,} bytes")
    return int(offsets[1])


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of sizes that a file can have."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def read_gguf(path: Path, enough: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
    """The metadata of a GGUF file; an array is given as its length. ``enough``: whether what was read so far will do.

    Raises ``ValueError`` where the file is not one or its header does not hold together, ``OSError`` where it cannot
    be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise ValueError("is not a GGUF file")
        version, tensors, pairs = _unpack(file, "I"), _unpack(file, "Q"), _unpack(file, "Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not known")
        if pairs > _PAIRS or tensors > size // 24:  # name, dimensions, type and place of a tensor take as much
            raise ValueError("its header promises more than it holds")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = _string(file, size, _KEY)
            metadata[key] = _value(file, _unpack(file, "I"), size)
            if enough and enough(metadata):
                break
        return metadata


def _unpack(file: BinaryIO, form: str) -> Any:
    data = file.read(struct.calcsize(f"<{form}"))
    if len(data) != struct.calcsize(f"<{form}"):
        raise ValueError("the header is cut short")
    return struct.unpack(f"<{form}", data)[0]


def _string(file: BinaryIO, size: int, most: int) -> str:
    length = _unpack(file, "Q")
    if length > min(most, size - file.tell()):
        raise ValueError("a string is longer than the file")
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int, size: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _string(file, size, size)
    if kind in _SIZES:
        return _unpack(file, _SIZES[kind])
    if kind != _ARRAY or depth == _DEPTH:
        raise ValueError(f"a value of type {kind}, which GGUF has not")
    item, count = _unpack(file, "I"), _unpack(file, "Q")
    width = struct.calcsize(f"<{_SIZES[item]}") if item in _SIZES else LENGTH_BYTES
    if count * width > size - file.tell() or (item not in _SIZES and count > _ITEMS):
        raise ValueError("an array is longer than the file")
    if item in _SIZES:
        file.seek(count * width, os.SEEK_CUR)
        return count
    for _ in range(count):
        if item == _STRING:
            _skip_string(file, size)
        else:
            _value(file, item, size, depth + 1)
    return count


def _skip_string(file: BinaryIO, size: int) -> None:
    length = _unpack(file, "Q")
    if length > size - file.tell():
        raise ValueError("a string is longer than the file")
    file.seek(length, os.SEEK_CUR)
