"""The sources of a run: whose rows it reads, in which format and what for; and how it notices that one has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from galley.contract.errors import UserError
from galley.contract.spec import RunSpec
from galley.data.prepared import SourceFacts
from galley.prepare.fetch import load_data, pin_data
from galley.prepare.formats.base import Example, Format
from galley.prepare.formats.rows import read_jsonl, rows_of
from galley.prepare.formats.table import FORMATS
from galley.storage.cache import file_sha256

Role = Literal["data", "held_out"]
What = Literal["data", "held_out", "chat_template"]
FIELDS: dict[What, str] = {
    "data": "data.path",
    "held_out": "data.held_out_path",
    "chat_template": "model.chat_template",
}


@dataclass(frozen=True)
class Source:
    """A file, or one split of a hub data set, whose rows are all of one format."""

    role: Role
    """``data`` is trained on, but for the share that is held out of it; ``held_out`` is only measured on."""
    path: str
    """An absolute path, or a hub id."""
    form: Format[Any]
    """How its rows are written."""
    split: str
    """Of a hub data set; a file has none."""
    revision: str | None = None
    """Of a hub data set: branch, tag or commit. :func:`find_sources` makes it a commit."""

    @property
    def is_file(self) -> bool:
        """Whether it is a file, and not on a hub."""
        return Path(self.path).is_absolute()


def list_sources(spec: RunSpec) -> list[Source]:
    """The sources that the task names, what is trained on first; nothing is opened."""
    data, paths = spec.task.data, spec.placement.paths
    named: list[tuple[Role, str | None]] = [("data", paths.data), ("held_out", paths.held_out)]
    form = FORMATS[data.format]
    return [Source(role, path, form, data.split, data.revision) for role, path in named if path]


def find_sources(spec: RunSpec) -> tuple[list[Source], list[SourceFacts]]:
    """The sources, those on a hub pinned to a commit, with what tells later that one has changed; the user's own chat
    template has such a fingerprint too. Raises :class:`UserError` where one is missing or is no file.
    """
    sources, facts = [], []
    for source in list_sources(spec):
        if source.is_file:
            facts.append(_file(source.role, Path(source.path)))
        else:
            source = replace(source, revision=pin_data(source.path, source.revision))
            facts.append(_on_hub(source))
        sources.append(source)
    if template := _template(spec):
        facts.append(_file("chat_template", template))
    return sources, facts


def _template(spec: RunSpec) -> Path | None:
    """The user's chat template, if the task has one; one that ships is part of Galley, and its name is no path."""
    path = spec.placement.paths.chat_template
    return Path(path) if path and Path(path).is_absolute() else None


def _on_hub(source: Source) -> SourceFacts:
    """A commit never changes, so its name stands for what the data set holds."""
    name = f"{source.path}@{source.revision}/{source.split}"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return SourceFacts(what=source.role, path=source.path, revision=source.revision, sha256=sha256)


def _file(what: What, path: Path) -> SourceFacts:
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise UserError(FIELDS[what], f"'{path}' {wrong}", "give the path of a file")
    try:
        sha256, status = file_sha256(path), path.stat()
    except OSError as error:
        raise UserError(FIELDS[what], f"'{path}' cannot be read ({error.strerror})", "check its permissions") from None
    return SourceFacts(what=what, path=str(path), size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)


def read_rows(source: Source) -> Iterator[tuple[int, Example]]:
    """Number and content of each row of a pinned source, as they come; ``Example.where`` names the row in errors."""
    if source.is_file:
        return read_jsonl(Path(source.path), source.form)
    records = load_data(source.path, source.revision, source.split, source.form)
    return rows_of(records, source.path, source.form)


def check_sources(facts: Iterable[SourceFacts], spec: RunSpec) -> None:
    """:func:`check_unchanged` for a run that goes on, maybe on another machine: files are where ``spec`` has them."""
    template = _template(spec)
    paths: dict[What, str] = {source.role: source.path for source in list_sources(spec)}
    check_unchanged(facts, paths if template is None else paths | {"chat_template": str(template)})


def check_unchanged(facts: Iterable[SourceFacts], paths: Mapping[What, str]) -> None:
    """Raise :class:`UserError` where a file is there but is not what its fingerprint says; gone is fine."""
    for fact in facts:
        path = Path(paths.get(fact.what, ""))
        if path.is_absolute() and path.is_file() and _changed(fact, path):
            raise UserError(str(path), "changed since the run began", "put it back as it was, or start a new run")


def _changed(fact: SourceFacts, path: Path) -> bool:
    status = path.stat()
    if (status.st_size, status.st_mtime_ns) == (fact.size, fact.mtime_ns):
        return False
    return status.st_size != fact.size or file_sha256(path) != fact.sha256
