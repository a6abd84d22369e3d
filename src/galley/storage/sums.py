"""Checksums that find damage: CRC-32, which finds all but one in four thousand million.

They are no protection from somebody who means harm, who would write new ones.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "crc32"
"""The key under which an object holds a checksum of the rest of it."""
_CHUNK, _THREADS = 1 << 20, 4


def crc32(path: Path) -> str:
    """CRC-32 of a file, eight hex digits. Raises ``OSError``."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def of_folder(folder: Path) -> dict[str, str]:
    """Checksums of all files below ``folder``, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): crc32(path) for path in paths}


def seal(value: dict[str, Any]) -> str:
    """CRC-32 of a JSON object, but for its seal."""
    rest = {key: item for key, item in value.items() if key != SEAL}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def is_intact(value: dict[str, Any]) -> bool:
    """Whether a JSON object is as it was sealed; one of an earlier version has no checksums and no seal."""
    return value[SEAL] == seal(value) if value.get(SEAL) else not value.get("checksums")


def damage(root: Path, files: Iterable[tuple[str, str | None, int | None]]) -> str | None:
    """The first of ``files`` (name, checksum and size where known) that is not as it was written, and how."""

    def check(file: tuple[str, str | None, int | None]) -> str | None:
        name, checksum, size = file
        try:
            actual = (root / name).stat().st_size
            if size is not None and actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            if checksum is not None and crc32(root / name) != checksum:
                return f"{name} is not as it was written (CRC-32)"
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:  # zlib lets go of the interpreter's lock
        return next((problem for problem in pool.map(check, files) if problem), None)
