"""Damaged files are found before they are used: the checkpoint before is taken, or the run refuses in one line."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from damage import KINDS, do_damage, edit_json
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, rank_logs, write_data, write_data_sums

from galley.checkpoint import whole
from galley.contract.errors import UserError
from galley.contract.rundir import Checkpoint, RunDir, read_json
from galley.contract.spec import RunSpec
from galley.data import prepared as data
from galley.export.export import choose
from galley.storage import sums
from galley.storage.sums import SEAL

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(30)]
STEPS = 6


@dataclass
class Alone:
    """A world of one rank, without a process group."""

    rank: int = 0
    size: int = 1
    is_first: bool = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass


@dataclass
class Made:
    """A run that was stopped after its checkpoints of steps 2 and 4, and what it comes to undisturbed."""

    run: RunDir
    spec: RunSpec
    losses: list[float]

    def copy(self, root: Path) -> RunDir:
        shutil.copytree(self.run.root, root)
        return RunDir(root)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path, ranks: Ranks) -> Made:
    run = RunDir(tmp_path_factory.mktemp("made") / "run")
    spec = make_spec(run, llama, world=2, steps=STEPS, cadence={"save_every": 2, "keep": 3})
    write_data(run, llama, SAMPLES, None, packed=False)
    write_data_sums(run)
    assert ranks.run("galley.train.train:main", [str(run.spec)], 2, run.root / "ranks.log") == [0, 0], rank_logs(run)
    losses = metrics(run)
    shutil.rmtree(run.checkpoint(STEPS).root)
    (run.attempt(1).exit).unlink()
    return Made(run, spec, losses)


def files(checkpoint: Checkpoint) -> list[Path]:
    return sorted(checkpoint.root.iterdir())


def harm(run: RunDir, chance: random.Random) -> str:
    """One damage to a checkpoint or to the prepared data."""
    checkpoint = chance.choice([*run.checkpoints(), run.checkpoints()[-1]])
    if chance.random() < 0.25:
        return f"{checkpoint.step}: " + edit_json(checkpoint.manifest, chance)
    prepared = [run.data_manifest, *(run.data / name for name in data.read_manifest(run).checksums)]
    among = files(checkpoint) if chance.random() < 0.8 else prepared
    path = chance.choice(among)
    others = [other for other in among if other.suffix == path.suffix and other != path]
    return f"{checkpoint.step}: " + do_damage(path, others, chance.choice(KINDS), chance)


def is_found(run: RunDir) -> bool:
    """Whether anything of what a resuming run reads is found to be damaged."""
    try:
        manifest = data.read_manifest(run)
    except (OSError, ValueError):
        return True
    checkpoints = [run.checkpoint(step) for step in (2, 4)]
    return data.damage(run, manifest) is not None or any(map(whole.damage, checkpoints))


def test_every_damage_of_two_hundred_is_found(made: Made, tmp_path: Path) -> None:
    assert not is_found(made.run), "the test's own assumption"
    for seed in range(200):
        run = made.copy(tmp_path / str(seed))
        done = harm(run, random.Random(seed))
        assert is_found(run), done
        shutil.rmtree(run.root)


def fault(made: Made, ranks: Ranks, run: RunDir, done: str) -> str:
    """What is wrong with how the run ends, empty where nothing is: identical losses, or a refusal in one short line."""
    statuses = ranks.run("galley.train.train:main", [str(run.spec)], 2, run.root / "ranks.log")
    if statuses == [0, 0]:
        return "" if metrics(run) == made.losses else f"{done}: other losses"
    if statuses != [2, 2] or "Traceback" in rank_logs(run):
        return f"{done}: {rank_logs(run)}"
    message = str(run.attempt(1).errors()[0]["message"])
    return "" if len(message.splitlines()) == 1 and len(message) < 500 else f"{done}: {message}"


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_run_resumes_to_the_bit_or_refuses(made: Made, ranks: Ranks, tmp_path: Path, seed: int) -> None:
    run = made.copy(tmp_path / "run")
    assert fault(made, ranks, run, harm(run, random.Random(seed))) == ""


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(6, 200))
def test_a_damaged_run_resumes_to_the_bit_or_refuses_each_of_two_hundred(
    made: Made, ranks: Ranks, tmp_path: Path, seed: int
) -> None:
    run = made.copy(tmp_path / "run")
    chance = random.Random(seed)
    done = [harm(run, chance)]
    if seed % 3 == 0 and not (run.data_manifest.exists() and len(run.checkpoints()) < 2):
        try:
            done.append(harm(run, chance))
        except (OSError, ValueError, IndexError):
            done.append("and no more")
    assert fault(made, ranks, run, ", ".join(done)) == ""


def flip(path: Path) -> None:
    do_damage(path, [], "flip", random.Random(3))


def test_the_checkpoint_before_is_taken_and_said(made: Made, train: Train, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    flip(run.checkpoint(4).root / "rank-00001.safetensors")
    train(run, made.spec)
    log = run.attempt(1).log("rank-0").read_text()
    line = next(line for line in log.splitlines() if line.startswith("damaged checkpoint"))
    assert line == (
        "damaged checkpoint step-000004: rank-00001.safetensors is not as it was written (CRC-32); "
        "it is damaged-step-000004 now, going on from step 2"
    )
    assert "resuming after step 2" in log
    assert metrics(run) == made.losses
    assert [each.step for each in run.checkpoints()] == [2, 4, 6], "step 4 was written again"
    assert whole.damage(run.checkpoint(4)) is None


@pytest.mark.parametrize("how", ["no state", "header", "empty"])
def test_a_manifest_without_state_and_an_overwritten_header(made: Made, train: Train, tmp_path: Path, how: str) -> None:
    """Of an earlier version, too, whose manifests hold no checksums."""
    run = made.copy(tmp_path / "run")
    checkpoint = run.checkpoint(4)
    manifest = json.loads(checkpoint.manifest.read_text())
    if how == "header":
        path = checkpoint.root / "rank-00000.safetensors"
        content = path.read_bytes()
        path.write_bytes(bytes(64) + content[64:])
    else:
        del manifest["crc32"], manifest["state"]
        checkpoint.manifest.write_text(json.dumps(manifest if how == "no state" else {}))
    train(run, made.spec)
    assert metrics(run) == made.losses
    assert "going on from step 2" in run.attempt(1).log("rank-0").read_text()


def test_where_none_is_whole_the_run_refuses(made: Made, ranks: Ranks, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    for step in (2, 4):
        flip(run.checkpoint(step).root / "rank-00000.safetensors")
    before = sorted(path for path in (run.root / "checkpoints").rglob("*"))
    assert ranks.run("galley.train.train:main", [str(run.spec)], 2, run.root / "ranks.log") == [2, 2]
    message = str(run.attempt(1).errors()[0]["message"])
    assert "no checkpoint is intact: step-000004: rank-00000.safetensors is not as it was written" in message
    assert "begin again from step 0" in message
    assert sorted(path for path in (run.root / "checkpoints").rglob("*")) == before, "nothing is lost"


@pytest.mark.parametrize("sealed", [True, False])
def test_manifests_of_earlier_versions_still_load(made: Made, train: Train, tmp_path: Path, sealed: bool) -> None:
    """They held the step of the best held-out loss; the first ones held no checksums."""
    run = made.copy(tmp_path / "run")
    for step in (2, 4):
        manifest = json.loads(run.checkpoint(step).manifest.read_text())
        del manifest["crc32"]
        manifest["state"]["best_step"] = 2
        if not sealed:
            del manifest["checksums"]
        seal = {SEAL: sums.seal(manifest)} if sealed else {}
        run.checkpoint(step).manifest.write_text(json.dumps(manifest | seal))
    train(run, made.spec)
    assert "resuming after step 4" in run.attempt(1).log("rank-0").read_text()
    assert metrics(run) == made.losses


def test_an_export_takes_the_newest_whole_checkpoint(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.copy(tmp_path / "run")
    assert choose(run, "last").step == 4
    flip(run.checkpoint(4).root / "rank-00000.safetensors")
    assert choose(run, "last").step == 2
    assert "damaged checkpoint step-000004: rank-00000.safetensors is not as" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is damaged: rank-00000\.safetensors is not as it was written"):
        choose(run, "4")


def test_damaged_data_are_refused_by_ranks_and_prepared_again(made: Made, ranks: Ranks, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    flip(run.data / "train" / "tokens.npy")
    assert ranks.run("galley.train.train:main", [str(run.spec)], 2, run.root / "ranks.log") == [2, 2]
    assert "train/tokens.npy is not as it was written (CRC-32)" in str(run.attempt(1).errors()[0]["message"])


def test_data_without_their_manifest_are_refused_by_ranks(made: Made, ranks: Ranks, tmp_path: Path) -> None:
    run = made.copy(tmp_path / "run")
    run.data_manifest.unlink()
    assert ranks.run("galley.train.train:main", [str(run.spec)], 2, run.root / "ranks.log") == [2, 2]
    message = str(run.attempt(1).errors()[0]["message"])
    assert message.startswith(f"{run.data_manifest}: cannot be read (No such file or directory); remove"), message


def test_nothing_but_checkpoints_is_left_beside_them(made: Made) -> None:
    manifest = read_json(made.run.checkpoint(4).manifest) or {}
    assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in files(made.run.checkpoint(4))}
    assert set(manifest["checksums"]) == set(manifest["files"])
