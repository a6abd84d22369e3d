"""Whether a checkpoint is what was written: checksums of its files, and of its manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from galley.checkpoint.checkpoint import FORMER, State
from galley.contract.errors import UserError
from galley.contract.rundir import Checkpoint, RunDir, fsync_path, read_json
from galley.ranks.world import World
from galley.storage import sums
from galley.storage.sums import SEAL, crc32, seal

_SIDECAR = ".crc32"


def note(path: Path) -> None:
    """Leave the checksum of a file beside it, for the rank that writes the manifest."""
    beside = path.with_name(path.name + _SIDECAR)
    beside.write_text(crc32(path), encoding="ascii")
    fsync_path(beside)


def collect(folder: Path) -> dict[str, str]:
    """Checksums of all files in ``folder``, by name: those that ``note`` left, which are removed, or else computed."""
    checksums = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_SIDECAR):
            continue
        beside = path.with_name(path.name + _SIDECAR)
        if beside.exists():
            checksums[path.name] = beside.read_text(encoding="ascii")
            beside.unlink()
        else:
            checksums[path.name] = crc32(path)
    return checksums


def manifest_text(state: State, made_by: dict[str, Any]) -> str:
    """The manifest of a checkpoint, with a checksum of its own.

    ``made_by`` has the world size and ZeRO stage that wrote it, its files' sizes, and their checksums, if any.
    """
    manifest = {
        "step": state.step,
        "world": made_by["world"],
        "zero_stage": made_by["zero_stage"],
        "held_out_loss": state.held_out_loss if state.held_out_step == state.step else None,
        "state": asdict(state),
        "files": made_by["files"],
    }
    if "checksums" in made_by:
        manifest["checksums"] = made_by["checksums"]
    return json.dumps(manifest | {SEAL: seal(manifest)}, indent=1)


def damage(checkpoint: Checkpoint, share: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint, if something is; of its files, those in ``share`` are read.

    A manifest of an earlier version holds no checksums: then sizes are all that is compared.
    """
    manifest = read_json(checkpoint.manifest)
    problem = "manifest.json is not JSON" if manifest is None else _manifest_damage(manifest, checkpoint.step)
    if manifest is None or problem:
        return problem
    known = manifest.get("checksums", {})
    files = [(name, known.get(name), size) for name, size in sorted(manifest["files"].items())]
    return sums.damage(checkpoint.root, files[share])


def _manifest_damage(manifest: dict[str, Any], step: int) -> str | None:
    if not sums.is_intact(manifest):
        return "manifest.json is not as it was written (CRC-32)"
    state, files = manifest.get("state"), manifest.get("files")
    if not isinstance(state, dict) or not isinstance(files, dict) or not {"world", "zero_stage"} <= set(manifest):
        return "manifest.json lacks what a checkpoint's has"
    if not set(state) - FORMER <= {field.name for field in fields(State)} or state.get("step") != step:
        return f"manifest.json has no state of step {step}"
    if not any(name.startswith("rank-") for name in files) or not all(_plain(*item) for item in files.items()):
        return "manifest.json does not list the ranks' files"
    return None


def _plain(name: str, size: object) -> bool:
    return "/" not in name and isinstance(size, int)


def written(run: RunDir) -> list[Checkpoint]:
    """Everything that has a checkpoint's name and manifest, whole or not, oldest first."""
    paths = (path for path in (run.root / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    named = (Checkpoint(path) for path in paths)
    return sorted((checkpoint for checkpoint in named if checkpoint.manifest.exists()), key=lambda one: one.step)


def newest(run: RunDir, world: World) -> Checkpoint | None:
    """The newest checkpoint that is whole, each rank having read its share of the files (collective).

    None where none was written. Damaged ones after it are moved out of the way, with a line that says so. Raises
    ``UserError`` where some were written, and none is whole.
    """
    steps = world.gather([checkpoint.step for checkpoint in written(run)])[0]  # a disk may show another rank fewer
    problems: list[str] = []
    # Files are dealt to the ranks, so that terabytes are read once and by all of them; what one finds wrong, all know.
    for step in reversed(steps):
        checkpoint = run.checkpoint(step)
        in_share = damage(checkpoint, slice(world.rank, None, world.size))
        problem = next(filter(None, world.gather(in_share)), None)
        if problem is None:
            _pass_over(run, world, problems, checkpoint)
            return checkpoint
        problems.append(f"{checkpoint.root.name}: {problem}")
    if problems:
        what = f"no checkpoint is intact: {'; '.join(problems[:3])}"
        todo = f"restore one, or remove {run.root / 'checkpoints'} to begin again from step 0"
        raise UserError(str(run.root / "checkpoints"), what, todo)
    return None


def _pass_over(run: RunDir, world: World, problems: Sequence[str], checkpoint: Checkpoint) -> None:
    """Give damaged checkpoints another name (collective): training will write their steps again."""
    if world.is_first:
        for problem in problems:
            root = run.root / "checkpoints" / problem.partition(":")[0]
            renamed = _free(root.with_name(f"damaged-{root.name}"))
            root.rename(renamed)
            what = f"damaged checkpoint {problem}; it is {renamed.name} now"
            print(f"{what}, going on from step {checkpoint.step}", flush=True)
    world.barrier()


def _free(path: Path) -> Path:
    """``path``, or with a number behind where that is taken."""
    return next(p for p in (path, *(path.with_name(f"{path.name}.{n}") for n in range(2, 1000))) if not p.exists())


def last(run: RunDir) -> Checkpoint:
    """The newest checkpoint that is whole, of a run that nobody trains. Raises ``UserError`` where there is none."""
    problems: list[str] = []
    for checkpoint in reversed(written(run)):
        problem = damage(checkpoint)
        if problem is None:
            for passed in problems:
                print(f"damaged checkpoint {passed}; taking step {checkpoint.step}", flush=True)
            return checkpoint
        problems.append(f"{checkpoint.root.name}: {problem}")
    if problems:
        what = f"no checkpoint is intact: {'; '.join(problems[:3])}"
        raise UserError(str(run.root / "checkpoints"), what, "restore one, or train again in a new run: name=…")
    raise UserError(str(run.root), "has no checkpoint to export", "train first: galley run")
