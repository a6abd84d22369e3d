"""The files and data sets that a run reads, and how it notices that one has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from galley.contract.errors import UserError
from galley.contract.spec import RunSpec
from galley.data.prepared import SourceFacts
from galley.prepare.formats.base import Example, Format
from galley.prepare.formats.rows import read_jsonl, rows_of
from galley.storage.cache import file_sha256

What = Literal["data", "held_out", "chat_template"]
FIELDS: dict[What, str] = {
    "data": "data.path",
    "held_out": "data.held_out_path",
    "chat_template": "model.chat_template",
}


def places(spec: RunSpec) -> dict[What, str]:
    """Where each source is on this machine: an absolute path, or a hub id."""
    paths = spec.placement.paths
    found: dict[What, str | None] = {
        "data": paths.data,
        "held_out": paths.held_out,
        "chat_template": paths.chat_template,
    }
    return {
        what: place
        for what, place in found.items()
        if place and (what != "chat_template" or Path(place).is_absolute())  # a shipped template is part of Galley
    }


def find_sources(spec: RunSpec) -> list[SourceFacts]:
    """Fingerprints of all sources. Raises :class:`UserError` where one is missing or is no file."""
    return [_fingerprint(what, place, spec) for what, place in places(spec).items()]


def _fingerprint(what: What, place: str, spec: RunSpec) -> SourceFacts:
    path = Path(place)
    if path.is_absolute():
        return _file(what, path)
    from galley.prepare.fetch import pin_data

    commit = pin_data(place, spec.task.data.revision)
    name = f"{place}@{commit}/{spec.task.data.split}"
    return SourceFacts(what=what, path=place, revision=commit, sha256=hashlib.sha256(name.encode()).hexdigest())


def _file(what: What, path: Path) -> SourceFacts:
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise UserError(FIELDS[what], f"'{path}' {wrong}", "give the path of a file")
    try:
        sha256, status = file_sha256(path), path.stat()
    except OSError as error:
        raise UserError(FIELDS[what], f"'{path}' cannot be read ({error.strerror})", "check its permissions") from None
    return SourceFacts(what=what, path=str(path), size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)


def read_rows(source: SourceFacts, spec: RunSpec, form: Format[Any]) -> Iterator[tuple[int, Example]]:
    """Number and content of each row of a source, as they come."""
    path = Path(source.path)
    if path.is_absolute():
        return read_jsonl(path, form)
    from galley.prepare.fetch import load_data

    return rows_of(load_data(source.path, source.revision, spec.task.data.split, form), source.path, form)


def check_sources(sources: list[SourceFacts], spec: RunSpec) -> None:
    """Raise :class:`UserError` where a file is there but is not what it was when the run began; gone is fine."""
    now = places(spec)
    for source in sources:
        path = Path(now.get(source.what, ""))
        if path.is_absolute() and path.is_file() and _changed(source, path):
            raise UserError(str(path), "changed since the run began", "put it back as it was, or start a new run")


def _changed(source: SourceFacts, path: Path) -> bool:
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (source.size, source.mtime_ns):
        return False
    return status.st_size != source.size or file_sha256(path) != source.sha256
