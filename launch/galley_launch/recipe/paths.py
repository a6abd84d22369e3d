"""Where the model and the data of a recipe are on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from galley.contract.data_files import check_file
from galley.contract.data_folders import is_pattern, list_files, matches, part_descriptions
from galley.contract.errors import UserError
from galley.contract.files import LARGEST_TEMPLATE
from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import Data, Paths
from galley.contract.task_data import DataSource
from galley_launch.recipe.schema import Recipe

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip", ".gguf",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
_MOST = 100
"""Files of a folder that ``plan`` looks into."""
TEMPLATES = ("chatml",)
"""Chat templates that ship under a name."""


def expanded(path: str) -> Path:
    """``path`` with ``~`` replaced by the home directory; ``~unknown`` stays as it is written."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user


@dataclass(frozen=True)
class Search:
    """Where a relative path of a recipe is looked for, and where an earlier attempt found it."""

    folder: Path
    """The folder of the file that wrote the path; the current directory is tried first."""
    known: str | None
    """Where the run's last attempt found it; None for a new run."""
    prepared: bool
    """Whether the run's data have been prepared: then their source may be gone."""
    lenient: bool = False
    """Whether rows that cannot be read are left out, so that the first of a file tells nothing."""

    def candidates(self, path: str) -> list[Path]:
        """The absolute paths that ``path`` may mean, in the order in which they are tried."""
        given = expanded(path)
        files = [given] if given.is_absolute() else [Path.cwd() / given, self.folder.absolute() / given]
        # normpath and not resolve: a link, to a shared data folder for example, stays the path that the user knows.
        return list(dict.fromkeys(Path(os.path.normpath(file)) for file in files))

    def find_pattern(self, path: str) -> Path | None:
        """The first place where files match ``path``, if it is a pattern."""
        return next((place for place in self.candidates(path) if matches(place)), None)

    def find(self, path: str) -> Path | None:
        """The first candidate that exists, with the last attempt's path as the last one."""
        files = self.candidates(path) + ([Path(self.known)] if self.known and Path(self.known).is_absolute() else [])
        return next((file for file in files if file.exists()), None)


def is_file_path(path: str) -> bool:
    """Whether ``path`` is written as a file's; anything else is a hub id."""
    return path.endswith(_SUFFIXES) or path.startswith((".", "/", "~"))


def _data(key: str, search: Search, settings: DataSource) -> str:
    """The absolute path of data, or the hub id, that ``settings.path`` means. Raises ``UserError``."""
    path, split = settings.path, settings.split or "train"
    place = search.find(path) or search.find_pattern(path)
    if place is not None:
        # Prepared data are used as they are, even if their source has changed since.
        if not (search.prepared or search.lenient):
            form, columns = settings.format or "auto", settings.column_names()
            for file in part_descriptions(list_files(place, split)[:_MOST], form, columns)[0]:
                check_file(file, form, columns)
        return str(place)
    if search.prepared and search.known:
        return search.known
    if not is_file_path(path) and _HUB_ID.fullmatch(path):
        return path
    if is_pattern(path):
        raise UserError(key, f"no file matches {path!r}", "check the pattern")
    if not is_file_path(path) and "/" not in path:
        raise UserError(key, f"{path!r} is neither a file nor a hub id", "write data.jsonl or org/name")
    tried = ", nor at ".join(map(str, search.candidates(path)))
    raise UserError(key, f"no file at {tried}", "give the path to it")


def _model(path: str, search: Search) -> str:
    """The absolute path of a model, or the hub id, that ``path`` means. Raises ``UserError``."""
    # A local folder org/name wins over a hub model of that name; one that is not a whole model is refused, not skipped.
    model = search.find(path)
    if model is None and not is_file_path(path) and _HUB_ID.fullmatch(path):
        return path
    if model is None:
        tried = " or ".join(map(str, search.candidates(path)))
        raise UserError(
            "model.path", f"no model at {tried}", "give a folder, a .gguf file or a hub id such as org/name"
        )
    if model.is_file() and model.suffix != ".gguf":
        raise UserError("model.path", f"{model} is not a model", "give a folder, a .gguf file or a hub id")
    if model.is_dir() and not (model / "config.json").is_file():
        raise UserError("model.path", f"{model} is a model folder without config.json", "give the model's own folder")
    if model.is_dir() and not any(any(model.glob(pattern)) for pattern in _WEIGHTS):
        raise UserError("model.path", f"{model} has no weights", "put its *.safetensors there")
    return str(model)


def _template(name: str | None, search: Search) -> str | None:
    if name is None or name in TEMPLATES:
        return name
    file = search.find(name)
    if file is None or not file.is_file():
        known = ", ".join(TEMPLATES)
        raise UserError("model.chat_template", f"{name!r} is neither a file nor a shipped template", f"known: {known}")
    if file.stat().st_size > LARGEST_TEMPLATE:
        what = f"{str(file)!r} has more than {LARGEST_TEMPLATE >> 20} MB, which no template has"
        raise UserError("model.chat_template", what, f"give a .jinja file, or one of {', '.join(TEMPLATES)}")
    return str(file)


def cache() -> Path:
    """Where prepared data and converted models are shared between runs: ``GALLEY_CACHE``, or under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(os.environ.get("GALLEY_CACHE") or f"{base}/galley").absolute()


def paths(recipe: Recipe, run: RunDir, beside: Callable[[str], Path], shared: str | None = None) -> Paths:
    """The absolute path of every file that ``recipe`` names. Raises ``UserError`` for one that is not there.

    ``beside``: dotted key to the folder of the file that wrote it. ``shared``: a cluster's cache, instead of this
    machine's.
    """
    # Read as plain JSON: run.json may be of another version of Galley, and only its paths are needed here.
    before = (read_json(run.spec) or {}).get("placement", {}).get("paths", {})
    prepared, data = run.data_manifest.is_file(), recipe.data

    def at(key: str, known: str | None) -> Search:
        return Search(beside(key), known, prepared, data.gates.unreadable == "drop")

    sources = _sources(data, before.get("sources") or [], at) if data.sources else []
    only = None if sources else _data("data.path", at("data.path", before.get("data")), data.listed()[0])
    search = at("data.held_out_path", before.get("held_out"))
    held_out = _data("data.held_out_path", search, data.held_out_settings()) if data.held_out_path else None
    return Paths(
        run=str(run.root.absolute()),
        model=_model(recipe.model.path, at("model.path", before.get("model"))),
        data=only,
        sources=sources,
        held_out=held_out,
        chat_template=_template(recipe.model.chat_template, at("model.chat_template", before.get("chat_template"))),
        cache=shared or str(cache()),
    )


def _sources(data: Data, before: list[str], at: Callable[[str, str | None], Search]) -> list[str]:
    """The path of each of ``data.sources``; ``before``: those of the last attempt."""
    known = before if len(before) == len(data.sources) else [None] * len(data.sources)
    triples = enumerate(zip(data.listed(), known, strict=True))
    return [_data(f"data.sources[{number}]", at("data.sources", path), one) for number, (one, path) in triples]


def exported_model(name: str, runs: Path) -> str:
    """The exported model of a finished run, for ``init_from``. Raises ``UserError`` where it is not there."""
    root = Path(name) if (Path(name) / "run.json").is_file() else runs / name
    model = RunDir(root).export / "model"
    if not (root / "run.json").is_file():
        raise UserError("init_from", f"no run at {root}", "give a run's name or directory (see galley status)")
    unverified = RunDir(root).unverified / "model"
    if (unverified / "config.json").is_file():
        models = [unverified, *([model] if (model / "config.json").is_file() else [])]
        todo = f"use {' or '.join(f'model.path={path.absolute()}' for path in models)}"
        raise UserError("init_from", f"the newest model of {root} is not verified (its README says why)", todo)
    if not (model / "config.json").is_file():
        raise UserError("init_from", f"{root} has no exported model", f"write it first: galley export {name}")
    return str(model.absolute())
