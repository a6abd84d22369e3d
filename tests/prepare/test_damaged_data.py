"""Prepared data that were damaged, in the run or in the cache that runs share, are found and prepared again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import KINDS, do_damage, edit_json
from prepare.conftest import rows, write_jsonl

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import damage, read_manifest
from galley.prepare.prepare import make, ready, request_key

Make = Callable[..., tuple[RunSpec, RunDir]]


def prepare(spec: RunSpec, run: RunDir) -> None:
    """What the stage does, but for operators, which take a minute to compile."""
    if ready(run, request_key(spec)) is None:
        make(spec, run)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(6))
def test_damaged_data_are_prepared_again(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """A file of the run is the cache's, too, under another name: the cache's entry is made anew as well."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows(30))
    spec, run = make_run(model_folder, data, cache=tmp_path / "cache", held_out=0.2)
    prepare(spec, run)
    before, chance = contents(run.data), random.Random(seed)
    entry = next(path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir())
    folder = chance.choice([run.data, entry])
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    path.chmod(0o644)
    others = [other for other in sorted(path.parent.iterdir()) if other.suffix == path.suffix and other != path]
    for other in others:
        other.chmod(0o644)
    done = edit_json(path, chance) if path.name in ("manifest.json", "facts.json") and chance.random() < 0.5 else ""
    done = done or do_damage(path, others, chance.choice(KINDS), chance)
    capsys.readouterr()
    prepare(spec, run)
    assert contents(run.data) == before, done
    other_spec, other_run = make_run(model_folder, data, name="other", cache=tmp_path / "cache", held_out=0.2)
    prepare(other_spec, other_run)
    assert {name: text for name, text in contents(other_run.data).items() if name.endswith(".npy")} == {
        name: text for name, text in before.items() if name.endswith(".npy")
    }, done


def test_it_is_said_which_file_was_damaged(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows(30))
    spec, run = make_run(model_folder, data, cache=tmp_path / "cache")
    prepare(spec, run)
    labels = run.data / "train" / "labels.npy"
    labels.chmod(0o644)
    do_damage(labels, [], "flip", random.Random(1))
    assert damage(run, read_manifest(run)) == "train/labels.npy is not as it was written (CRC-32)"
    prepare(spec, run)
    told = capsys.readouterr().out
    assert f"data: {run.data}: train/labels.npy is not as it was written (CRC-32); preparing again" in told


def test_data_of_an_earlier_version_are_taken(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows(30))
    spec, run = make_run(model_folder, data, cache=tmp_path / "cache")
    prepare(spec, run)
    manifest = json.loads(run.data_manifest.read_text())
    del manifest["checksums"], manifest["crc32"]
    run.data_manifest.write_text(json.dumps(manifest))
    stood = (run.data / "train" / "labels.npy").stat().st_ino
    prepare(spec, run)
    assert (run.data / "train" / "labels.npy").stat().st_ino == stood
