"""Which files a folder of data, or a pattern of paths, stands for. Standard library only: ``plan`` asks, too."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from galley.contract.data_descriptions import is_description
from galley.contract.data_files import inner_suffix
from galley.contract.errors import UserError

ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of files that are read out of a folder, before that of a compression; its others are left alone."""
DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""What the package ``datasets`` writes beside rows."""
HIDDEN = (".", "_")
MOST = 100_000
"""Files and folders that one folder may hold: `/` or a home is a mistake, and searching it takes for ever."""
SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "development", "heldout", "holdout", "valset", "devset"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
"""Words in a file's name that tell its split: those that the hub goes by, and a few more."""


def is_pattern(path: str) -> bool:
    """Whether ``path`` is written as a pattern, such as ``data/*.jsonl``."""
    return any(mark in path for mark in "*?[")


def matches(pattern: Path) -> list[Path]:
    """What there is of an absolute pattern, sorted; ``**`` stands for any number of folders."""
    if not is_pattern(str(pattern)):
        return []
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207 - Path.glob refuses absolute ones


def root(path: str) -> str:
    """The folder below which all files of a pattern are; any other path is its own."""
    if not is_pattern(path) or Path(path).exists():
        return path
    fixed = [part for part in Path(path).parents if not is_pattern(str(part))]
    return str(fixed[0])


def list_files(path: Path, split: str) -> list[Path]:
    """The files of rows that ``path`` (a file, a folder or a pattern) stands for, in order; none where it is not there.

    A folder is searched with its sub-folders, and may be what ``datasets`` saves to disk; ``split`` picks among its
    files. Raises :class:`UserError` for a folder without rows, or without this split.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        return [file for file in matches(path) if file.is_file()]
    if (path / "dataset_dict.json").is_file():
        return _saved_split(path, split)
    if (path / "state.json").is_file():
        return _saved(path)
    if (path / "config.json").is_file() and next(path.glob("*.safetensors"), None):
        raise UserError(str(path), "is a model's folder", "give one with files of rows")
    files = _row_files(path)
    _check_copies(path, files)
    if not files:
        raise UserError(str(path), "is a folder without files of rows", f"give one with {', '.join(ROWS)} files")
    return _of_split(path, files, split)


def part_descriptions(
    files: list[Path], form: str = "auto", columns: Mapping[str, str] | None = None
) -> tuple[list[Path], list[Path]]:
    """Of several files those with rows of the format ``form``, and those that only describe them.

    Where all are descriptions they are taken for files of rows, for an error to tell what the first one is.
    """
    others = [file for file in files if len(files) > 1 and is_description(file, form, columns or {})]
    if len(others) == len(files):
        return files, []
    return [file for file in files if file not in others], others


def _check_copies(folder: Path, files: list[Path]) -> None:
    """Raise :class:`UserError` for ``rows.jsonl`` beside ``rows.csv`` or ``rows.jsonl.gz``: likely one file twice."""
    known: dict[Path, Path] = {}
    for file in files:
        name = file.name[: file.name.lower().rindex(inner_suffix(file))]
        other = known.setdefault(file.with_name(name), file)
        if other is not file:
            what = f"holds {other.relative_to(folder)} and {file.relative_to(folder)}, which look like one file twice"
            raise UserError(str(folder), what, "remove one, or give a pattern such as data/*.jsonl")


def count_others(path: Path, files: list[Path]) -> int:
    """How many files of rows of the folder ``path`` are not among its ``files``, for they are of other splits."""
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return len(set(_row_files(path)) - set(files)) if path.is_dir() and not saved else 0


def _row_files(folder: Path) -> list[Path]:
    """Every file of rows in ``folder`` and its sub-folders, sorted; one that links lead to twice is read once.

    Raises :class:`UserError` where a sub-folder cannot be read, and for a folder of far more files than data have.
    """
    files, seen, visited = list[Path](), 0, set[Path]()

    def unreadable(error: OSError) -> None:
        raise UserError(str(error.filename), f"cannot be read ({error.strerror})", "check its permissions")

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = Path(place).resolve()
        if real in visited:
            folders.clear()  # in place: where `walk` goes on
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        seen += len(names) + len(folders)
        if seen > MOST:
            what = f"holds more than {MOST:,} files and folders"
            raise UserError(str(folder), what, "give a folder of data, or a pattern such as data/*.jsonl")
        files += [Path(place, name) for name in names if _holds_rows(name)]
    return sorted(file for file in files if file.is_file())


def _holds_rows(name: str) -> bool:
    return not name.startswith(HIDDEN) and inner_suffix(Path(name)) in ROWS and name not in DESCRIPTIONS


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of the split, where names tell of any; for ``train``, else those whose names tell of none."""
    names = {file: _split_of(file.relative_to(folder)) for file in files}
    there = sorted({name for name in names.values() if name})
    if not there:
        return files
    wanted = next((name for name, words in SPLITS.items() if split in (name, *words)), split)
    if wanted == "train" and "train" not in there and None in names.values():
        return [file for file in files if names[file] is None]
    if wanted not in there:
        raise UserError("data.split", f"{folder} has no files of {split!r}", f"use one of {', '.join(there)}")
    return [file for file in files if names[file] == wanted]


def _split_of(path: Path) -> str | None:
    """By the last word of the path that names a split: ``eval/train.jsonl`` is for training."""
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(path)).lower())  # squadTrain: squad, train
    named = [name for word in words for name, known in SPLITS.items() if word in known]
    return named[-1] if named else None


def _saved_split(folder: Path, split: str) -> list[Path]:
    """Of a ``DatasetDict`` that was saved to disk: a folder for each split."""
    if (folder / split / "state.json").is_file():
        return _saved(folder / split)
    there = ", ".join(sorted(state.parent.name for state in folder.glob("*/state.json")))
    raise UserError("data.split", f"{folder} has no split {split!r}", f"use one of {there or 'those that it has'}")


def _saved(folder: Path) -> list[Path]:
    """Of a ``Dataset`` that was saved to disk: ``state.json`` lists its files; caches of its operations lie beside."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(str(folder / "state.json"), f"cannot be read ({error})", "save the data set again") from None
    missing = next((file for file in files if not file.is_file()), None)
    if missing or not files:
        raise UserError(str(folder), f"lacks {missing.name if missing else 'files of rows'}", "save the data set again")
    return files
