"""The sources of a run: whose rows it reads, in which format and what for; and how it notices that one has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from galley.contract.data_files import rename
from galley.contract.data_folders import count_others, list_files, part_descriptions
from galley.contract.errors import UserError
from galley.contract.row_formats import advice, filled, recognised
from galley.contract.spec import RunSpec
from galley.contract.task_data import DataSource, Learn
from galley.data.prepared import SourceFacts
from galley.prepare.fetch import load_data, pin_data
from galley.prepare.files import read_records
from galley.prepare.formats.base import USUAL, Example, Format, Turns, keys_of
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.rows import AS_IT_IS, Reading, read_file, rows_of
from galley.prepare.formats.table import FORMATS
from galley.prepare.mixture import EVERYTHING, Portion
from galley.prepare.record import Record
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
    """A file, several, or one split of a hub data set, whose rows are all of one format."""

    role: Role
    """``data`` is trained on, but for the share that is held out of it; ``held_out`` is only measured on."""
    path: str
    """An absolute path, or a hub id."""
    form: Format[Any]
    """How its rows are written."""
    split: str
    """Of a hub data set, or of a folder; a file has none."""
    revision: str | None = None
    """Of a hub data set: branch, tag or commit. :func:`find_sources` makes it a commit."""
    subset: str | None = None
    """Of a hub data set: its configuration."""
    reading: Reading = AS_IT_IS
    """What its columns are called, and the system prompt of rows without one."""
    learn: str | tuple[str, ...] = "assistant"
    """Which messages of a conversation are trained on; a tuple names roles."""
    turns: Turns = USUAL
    """What becomes of turns and rows that the chat template does not write as they stand."""
    recognise: bool = False
    """Whether the task names no format: :func:`find_sources` puts in the one that the columns show."""
    number: int = 0
    """Of several that are trained on: which, from 0."""
    portion: Portion = EVERYTHING
    """How many of its rows an epoch has."""

    @property
    def name(self) -> str:
        """As :attr:`SourceFacts.name` has it."""
        return f"{self.role}{self.number or ''}"

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, and not on a hub."""
        return Path(self.path).is_absolute()

    @property
    def files(self) -> list[Path]:
        """The files of rows of a source that is on this machine. Raises :class:`UserError` for a folder without any."""
        return self.parted[0]

    @property
    def parted(self) -> tuple[list[Path], list[Path]]:
        """The files of rows, and those beside them that only describe them, which are not read."""
        return part_descriptions(list_files(Path(self.path), self.split), self.form.name, self.reading.columns)


def list_sources(spec: RunSpec) -> list[Source]:
    """The sources that the task names, what is trained on first; nothing is opened."""
    data, paths = spec.task.data, spec.placement.paths
    pairs = enumerate(zip(data.listed(), paths.trained_on(), strict=True))
    sources = [_source(number, "data", path, settings) for number, (settings, path) in pairs]
    if paths.held_out:
        sources.append(_source(0, "held_out", paths.held_out, data.held_out_settings()))
    unreadable = data.gates.unreadable
    return [replace(source, reading=replace(source.reading, unreadable=unreadable)) for source in sources]


def _source(number: int, role: Role, path: str, settings: DataSource) -> Source:
    return Source(
        number=number,
        role=role,
        path=path,
        form=FORMATS.get(settings.format or "auto", CHAT),
        recognise=settings.format not in FORMATS,
        split=settings.split or "train",
        revision=settings.revision,
        subset=settings.subset,
        reading=Reading(settings.column_names(), settings.system),
        learn=_learn(settings.learn or "assistant"),
        turns=Turns(settings.rewritten_turns or "mask", settings.refused_rows or "refuse", settings.thinking or "keep"),
        portion=Portion(settings.limit, settings.repeats, settings.weight),
    )


def _learn(learn: Learn) -> str | tuple[str, ...]:
    """``data.learn``, roles in one order; the assistant's alone are what is usual."""
    roles = tuple(sorted(set(learn))) if isinstance(learn, list) else learn
    return "assistant" if roles == ("assistant",) else roles


def find_sources(spec: RunSpec) -> tuple[list[Source], list[SourceFacts]]:
    """The sources, those on a hub pinned to a commit, with what tells later that one has changed; the user's own chat
    template has such a fingerprint too. Raises :class:`UserError` where one is missing or is no file.
    """
    sources, facts = [], []
    for source in list_sources(spec):
        if source.is_local:
            facts.append(_on_disk(source))
        else:
            source = replace(source, revision=pin_data(source.path, source.revision))
            facts.append(_on_hub(source))
        sources.append(_recognise(source) if source.recognise else source)
    if template := _template(spec):
        facts.append(_file("chat_template", template))
    return sources, facts


def _recognise(source: Source) -> Source:
    """``source`` with the format that the columns of its first row show. Raises :class:`UserError` for none."""
    if source.is_local:
        first = next((row for file in source.files for row in _readable(file, source)), None)
        record, where = (first.value, first.where) if first else (None, source.path)
    else:
        columns = _loaded(source).column_names
        record, where = dict.fromkeys(columns), source.path
    if not isinstance(record, Mapping):
        return source
    named = rename(record, source.reading.columns)
    name = recognised(filled(named)) or recognised(named)
    if name is None:
        raise UserError(where, f"not a conversation: it has {keys_of(record)}", advice(record))
    form = FORMATS[name]
    if form is not CHAT:
        used = ", ".join(column for column in form.columns if column in named)
        print(f"data: {source.path}: rows of the format {name} ({used})", flush=True)
    return replace(source, form=form)


def _readable(file: Path, source: Source) -> Iterator[Record]:
    """The rows of a file, without those that cannot be read where these are dropped. Raises :class:`UserError`."""
    skip = source.reading.unreadable == "drop"
    records = read_records(file, source.form.sample, source.reading.columns, errors=skip)
    return (record for record in records if not record.error)


def _loaded(source: Source) -> Any:
    return load_data(source.path, source.revision, source.split, source.subset)


def _template(spec: RunSpec) -> Path | None:
    """The user's chat template, if the task has one; one that ships is part of Galley, and its name is no path."""
    path = spec.placement.paths.chat_template
    return Path(path) if path and Path(path).is_absolute() else None


def _on_hub(source: Source) -> SourceFacts:
    """A commit never changes, so its name stands for what the data set holds."""
    subset = f"/{source.subset}" if source.subset else ""
    name = f"{source.path}@{source.revision}{subset}/{source.split}"
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return SourceFacts(
        what=source.role, number=source.number, path=source.path, revision=source.revision, sha256=sha256
    )


def _on_disk(source: Source) -> SourceFacts:
    """Of a file, or of all files that a folder or a pattern stands for."""
    path, files = Path(source.path), list_files(Path(source.path), source.split)
    if files in ([], [path]):
        return _file(source.role, path).model_copy(update={"number": source.number})
    rows, descriptions = source.parted
    others = count_others(path, files)
    left = f"; {others:,} of other splits than {source.split} are not read" if others else ""
    if descriptions:
        names = ", ".join(file.name for file in descriptions[:5]) + (", …" if descriptions[5:] else "")
        left += f"; {len(descriptions):,} that hold no rows are not read: {names}"
    print(f"data: {path}: {len(rows):,} files, {rows[0].name} to {rows[-1].name}{left}", flush=True)
    return _several(source.role, path, source.split, files).model_copy(update={"number": source.number})


def _several(what: What, path: Path, split: str, files: list[Path]) -> SourceFacts:
    parts = [_file(what, file) for file in files]
    size, latest = sum(part.size for part in parts), max(part.mtime_ns for part in parts)
    sha256 = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return SourceFacts(what=what, path=str(path), split=split, size=size, mtime_ns=latest, sha256=sha256)


def _file(what: What, path: Path) -> SourceFacts:
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise UserError(FIELDS[what], f"'{path}' {wrong}", "give the path of a file or folder")
    try:
        sha256, status = file_sha256(path), path.stat()
    except OSError as error:
        raise UserError(FIELDS[what], f"'{path}' cannot be read ({error.strerror})", "check its permissions") from None
    return SourceFacts(what=what, path=str(path), size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=sha256)


def read_rows(source: Source) -> Iterator[tuple[int, Example]]:
    """Number and content of each row of a pinned source, as they come; ``Example.where`` names the row in errors."""
    if source.is_local:
        return _read_files(source)
    records, names = _loaded(source), source.reading.columns
    named = rename({column: column for column in records.column_names}, names)  # the data set's name for each column
    if source.form.matches(named):  # else all, for the error to name
        wanted = {named[column] for column in source.form.columns if column in named}
        if unread := [column for column in records.column_names if column not in wanted]:
            print(f"data: columns of {source.path} that are not read: {', '.join(unread)}", flush=True)
        records = records.select_columns([column for column in records.column_names if column in wanted])
    return rows_of(records, source.path, source.form, source.reading)


def _read_files(source: Source) -> Iterator[tuple[int, Example]]:
    """The rows of all files, numbered on from one file to the next."""
    begin = 0
    for file in source.files:
        number = -1
        for number, example in read_file(file, source.form, source.reading):
            yield begin + number, example
        begin += number + 1


def check_sources(facts: Iterable[SourceFacts], spec: RunSpec) -> None:
    """:func:`check_unchanged` for a run that goes on, maybe on another machine: files are where ``spec`` has them."""
    template = _template(spec)
    paths = {source.name: source.path for source in list_sources(spec)}
    check_unchanged(facts, paths if template is None else paths | {"chat_template": str(template)})


def check_unchanged(facts: Iterable[SourceFacts], paths: Mapping[str, str]) -> None:
    """Raise :class:`UserError` where a file is there but is not what its fingerprint says; gone is fine.

    ``paths``: where each is now, by its :attr:`SourceFacts.name`.
    """
    for fact in facts:
        path = Path(paths.get(fact.name, ""))
        if path.is_absolute() and _changed(fact, path):
            raise UserError(str(path), "changed since the run began", "put it back as it was, or start a new run")


def _changed(fact: SourceFacts, path: Path) -> bool:
    try:
        files = list_files(path, fact.split or "")
    except UserError:  # a folder that has other files now
        return True
    if not files:
        return False
    statuses = [file.stat() for file in files]
    size, latest = sum(status.st_size for status in statuses), max(status.st_mtime_ns for status in statuses)
    if (size, latest) == (fact.size, fact.mtime_ns):
        return False
    now = _file(fact.what, path) if fact.split is None else _several(fact.what, path, fact.split, files)
    return now.sha256 != fact.sha256
