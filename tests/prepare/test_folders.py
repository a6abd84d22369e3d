"""Folders and patterns of files as data: which files are read, in which order, and that they are one source."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import rows, write_jsonl

from galley.contract import data_folders
from galley.contract.data_folders import list_files, part_descriptions, root
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import read_manifest
from galley.prepare.prepare import work
from galley_launch import cli

Make = Callable[..., tuple[RunSpec, RunDir]]


def listed(folder: Path, split: str = "train") -> list[str]:
    return [str(file.relative_to(folder)) for file in list_files(folder, split)]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, rows(2))
    return folder


CASES: list[tuple[list[str], str, list[str]]] = [
    (["b.jsonl", "a.jsonl", "README.md", ".hidden.jsonl", "_tmp/x.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
    (["x/b.csv.gz", "a.parquet", "dataset_infos.json"], "train", ["a.parquet", "x/b.csv.gz"]),
    (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
    (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/dev-0.parquet"], "train",
     ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
    (["dev.jsonl", "train.jsonl", "more.jsonl"], "validation", ["dev.jsonl"]),
    (["data.jsonl", "test.jsonl"], "train", ["data.jsonl"]),
    (["squadTrain.json", "squadTest.json"], "train", ["squadTrain.json"]),
    (["train.jsonl", "heldout.jsonl"], "train", ["train.jsonl"]),
    (["train/a.jsonl", "val/a.jsonl"], "val", ["val/a.jsonl"]),
    (["testimonials.jsonl", "restraining.jsonl"], "train", ["restraining.jsonl", "testimonials.jsonl"]),
    (["training_notes.jsonl", "faq.jsonl"], "train", ["training_notes.jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(("names", "split", "expected"), CASES)
def test_the_files_of_a_folder(tmp_path: Path, names: list[str], split: str, expected: list[str]) -> None:
    assert listed(fill(tmp_path, *names), split) == expected


INFOS: dict[str, Any] = {
    "metadata.json": {"name": "x", "columns": {"messages": "list"}},
    "dataset_infos.json": {"default": {"splits": {"train": {"num_examples": 2}}}},
    "state.json.gz": {"_fingerprint": "x"},
    "croissant.json": {"@type": "sc:Dataset", "recordSet": [{"@id": "default"}]},
    "labels.json": ["a", "b"],
    "sub/package.json": {"name": "x", "version": 1},
    "large.json": {"vocabulary": {f"word {n}": n for n in range(10_000)}},
}


def describe(folder: Path, indent: int | None) -> None:
    for name, value in INFOS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value, indent=indent).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_json_files_that_describe_rows_are_no_rows(tmp_path: Path, indent: int | None, suffix: str) -> None:
    describe(tmp_path, indent)
    (tmp_path / f"rows.{suffix}").write_text("question,answer\na,b\n" if suffix == "csv" else json.dumps(rows(1)[0]))
    files = list_files(tmp_path, "train")
    held, others = part_descriptions(files)
    assert [file.name for file in held] == [f"rows.{suffix}"]
    assert sorted(str(file.relative_to(tmp_path)) for file in others) == sorted(
        set(INFOS) - set(data_folders.DESCRIPTIONS)
    )


ROWS_AS_JSON: list[tuple[str, Any, dict[str, str]]] = [
    ("metadata.json", rows(2), {}),
    ("metadata.json", {"data": rows(1)}, {}),
    ("metadata.json", {"frage": "a", "antwort": "b"}, {"prompt": "frage", "completion": "antwort"}),
    ("x.json", {"Question": "a", "Answer": "b"}, {}),
    ("x.json", {"text": "a"}, {}),
    ("x.json", {"prompt": "a", "chosen": "b", "rejected": "c"}, {}),
    ("x.json", {"data": [{"q": "a", "a": "b"}]}, {}),
    ("x.json", [{"q": "a", "a": "b"}], {}),
    ("x.json", [], {}),
]


@pytest.mark.parametrize(("name", "value", "columns"), ROWS_AS_JSON)
def test_json_files_with_anything_like_rows_are_read_or_refused(
    tmp_path: Path, name: str, value: Any, columns: dict[str, str]
) -> None:
    files = [write_jsonl(tmp_path / "a.jsonl", rows(1)), tmp_path / name]
    files[1].write_text(json.dumps(value))
    assert part_descriptions(files, columns=columns) == (files, [])
    if value:
        files[1].write_text((json.dumps({"any": "thing"}) + "\n") * 2)
        assert part_descriptions(files, columns=columns) == (files, [])


def test_a_folder_of_descriptions_only_is_refused_by_the_first(tmp_path: Path) -> None:
    describe(tmp_path, None)
    files = list_files(tmp_path, "train")
    assert part_descriptions(files) == (files, [])


def test_files_without_rows_are_named(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "data", "a.jsonl", "b.jsonl")
    describe(folder, 1)
    spec, run = make_run(model_folder, folder)
    work(spec, run, run.attempt(1))
    out = capsys.readouterr().out
    assert f"data: {folder}: 2 files, a.jsonl to b.jsonl; 6 that hold no rows are not read: croissant.json, " in out
    assert read_manifest(run).train.rows == 4
    work(spec, run, run.attempt(1))  # unchanged
    (folder / "metadata.json").write_text(json.dumps(rows(1)))
    with pytest.raises(UserError, match="changed since the run began"):
        work(spec, run, run.attempt(1))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "test.jsonl")
    with pytest.raises(UserError, match=r"data.split: .* has no files of 'train\[:5%\]'; use one of test, train"):
        list_files(tmp_path, "train[:5%]")


def test_a_folder_of_tests_only_is_not_trained_on_unless_asked(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl")
    with pytest.raises(UserError, match=r"data.split: .* has no files of 'train'; use one of test"):
        list_files(tmp_path, "train")
    assert listed(tmp_path, "test") == ["test.jsonl"]


@pytest.mark.parametrize("names", [("a.jsonl", "a.jsonl.gz"), ("a.csv", "a.jsonl"), ("x/a.json", "x/a.parquet")])
def test_one_file_twice_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    fill(tmp_path, *names)
    with pytest.raises(UserError, match=rf"holds {names[0]} and {names[1]}, which look like one file twice"):
        list_files(tmp_path, "train")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError, match=r"is a folder without files of rows; give one with .jsonl"):
        list_files(tmp_path, "train")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="is a model's folder"):
        list_files(tmp_path, "train")


def test_a_whole_disk_is_no_folder_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_folders, "MOST", 3)
    fill(tmp_path, "a/1.jsonl", "b/1.jsonl")
    with pytest.raises(UserError, match="holds more than 3 files and folders; give a folder of data, or a pattern"):
        list_files(tmp_path, "train")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "linked.jsonl").symlink_to(tmp_path / "a" / "1.jsonl")
    monkeypatch.setattr(data_folders, "MOST", 7)
    assert listed(tmp_path) == ["a/1.jsonl", "b/1.jsonl", "b/linked.jsonl"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a/1.jsonl", "b/1.jsonl")
    scan = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    with pytest.raises(UserError, match=f"{tmp_path}/b: cannot be read .Permission denied.; check its permissions"):
        list_files(tmp_path, "train")


def test_patterns(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jsonl", "a/2.jsonl", "b/1.jsonl", "b/x.csv")
    assert listed_pattern(tmp_path, "a/*.jsonl") == ["a/1.jsonl", "a/2.jsonl"]
    assert listed_pattern(tmp_path, "**/*.jsonl") == ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl"]
    assert listed_pattern(tmp_path, "b/?.jsonl") == ["b/1.jsonl"]
    assert listed_pattern(tmp_path, "c/*") == []
    assert root(f"{tmp_path}/**/*.jsonl") == str(tmp_path)
    assert root(f"{tmp_path}/a/*.jsonl") == f"{tmp_path}/a"
    assert root(f"{tmp_path}/a/1.jsonl") == f"{tmp_path}/a/1.jsonl"
    odd = write_jsonl(tmp_path / "rows[1].jsonl", rows(1))
    assert list_files(odd, "train") == [odd]
    assert root(str(odd)) == str(odd)


def listed_pattern(folder: Path, pattern: str) -> list[str]:
    return [str(file.relative_to(folder)) for file in list_files(folder / pattern, "train")]


def save(folder: Path, count: int, **splits: int) -> Path:
    """As the package ``datasets`` writes it, with a cache file of one of its operations beside."""
    from datasets import Dataset, DatasetDict

    if splits:
        sets = {name: Dataset.from_list(rows(size)) for name, size in splits.items()}
        DatasetDict(sets).save_to_disk(folder)
    else:
        Dataset.from_list(rows(count)).save_to_disk(folder, num_shards=3)
        (folder / "cache-1234.arrow").write_bytes((folder / "data-00000-of-00003.arrow").read_bytes())
    return folder


def test_data_sets_saved_to_disk(tmp_path: Path) -> None:
    one = save(tmp_path / "one", 20)
    assert listed(one) == [f"data-0000{number}-of-00003.arrow" for number in range(3)]
    several = save(tmp_path / "several", 0, train=5, held=3)
    assert listed(several) == ["train/data-00000-of-00001.arrow"]
    assert listed(several, "held") == ["held/data-00000-of-00001.arrow"]
    with pytest.raises(UserError, match=r"data.split: .* has no split 'test'; use one of held, train"):
        list_files(several, "test")
    (one / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"lacks data-00001-of-00003.arrow; save the data set again"):
        list_files(one, "train")
    (one / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json: cannot be read"):
        list_files(one, "train")


def arrays(spec: RunSpec, run: RunDir) -> dict[str, bytes]:
    work(spec, run, run.attempt(1))
    return {path.name: path.read_bytes() for path in sorted((run.data / "train").iterdir())}


def split_up(folder: Path, records: list[Any]) -> Path:
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", records[:17])
    (folder / "2.json").write_text(json.dumps(records[17:30]))
    (folder / "3.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in records[30:]).encode()))
    return folder


def test_a_folder_is_prepared_as_one_file_with_its_rows(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = arrays(*make_run(model_folder, write_jsonl(tmp_path / "rows.jsonl", rows(40)), name="whole"))
    parts = split_up(tmp_path / "parts", rows(40))
    assert arrays(*make_run(model_folder, parts, name="folder")) == whole
    assert f"data: {parts}: 3 files, 1.jsonl to 3.jsonl.gz" in capsys.readouterr().out
    assert arrays(*make_run(model_folder, parts / "*.json*", name="pattern")) == whole
    assert arrays(*make_run(model_folder, save(tmp_path / "saved", 40), name="saved")) == whole


def test_rows_of_other_splits_are_counted(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "data", "train-0.jsonl", "train-1.jsonl", "test.jsonl", "more.jsonl")
    spec, run = make_run(model_folder, folder)
    work(spec, run, run.attempt(1))
    assert "2 files, train-0.jsonl to train-1.jsonl; 2 of other splits than train are not read" in (
        capsys.readouterr().out
    )
    assert read_manifest(run).train.rows == 4


def test_a_bad_row_names_its_file(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Callable[[RunDir], str]
) -> None:
    folder = fill(tmp_path / "data", "a.jsonl")
    (folder / "b.jsonl").write_text(json.dumps(rows(1)[0]) + '\n{"question": "a", "answer": "b"}\n')
    _, run = make_run(model_folder, folder)
    assert refused(run).startswith(f"{folder}/b.jsonl:2: is a row of the format prompt_completion")


@pytest.mark.parametrize("change", ["written", "added", "removed"])
def test_a_folder_that_changed_ends_a_run_that_goes_on(
    make_run: Make, model_folder: Path, tmp_path: Path, change: str
) -> None:
    folder = fill(tmp_path / "data", "a.jsonl", "b.jsonl")
    spec, run = make_run(model_folder, folder)
    work(spec, run, run.attempt(1))
    work(spec, run, run.attempt(1))  # unchanged
    if change == "written":
        (folder / "b.jsonl").write_text((folder / "b.jsonl").read_text().replace("a", "e"))
    elif change == "added":
        fill(folder, "c.jsonl")
    else:
        (folder / "b.jsonl").unlink()
    with pytest.raises(UserError, match=f"^{folder}: changed since the run began; put it back as it was, or start"):
        work(spec, run, run.attempt(1))


def test_plan_looks_into_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "data", "a.jsonl", "b.jsonl")
    words = ["plan", "smollm2-135m-lora", "device=cpu", "ranks=1"]
    assert cli.main([*words, "data.path=data"]) == 0, capsys.readouterr().err
    assert cli.main([*words, "data.path=data/*.jsonl"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main([*words, "data.path=data/*.csv"]) == 2
    assert "data.path: no file matches 'data/*.csv'; check the pattern" in capsys.readouterr().err
    (tmp_path / "data" / "notes.json").write_text('{"about": "rows"}')
    assert cli.main([*words, "data.path=data"]) == 0, capsys.readouterr().err
    (tmp_path / "data" / "c.jsonl").write_text('{"id": 1}\n')
    assert cli.main([*words, "data.path=data"]) == 2
    assert f"{tmp_path}/data/c.jsonl:1: not a conversation: it has id" in capsys.readouterr().err
    assert cli.main([*words, "data.path=data", "data.gates.unreadable=drop"]) == 0, capsys.readouterr().err
