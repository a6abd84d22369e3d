"""``python -m galley.prepare RUN/run.json``: everything that ranks need, on this machine's disk, before any starts.

The model and tokenizer are fetched and pinned, conversations become packed arrays (:mod:`galley.data.prepared`) in the
shared cache, and the run directory gets its own names for them, so that it is whole when it is copied elsewhere. One
process: ranks never tokenise and never reach a hub. Doing it again costs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from galley.contract import pace, stages
from galley.contract.errors import UserError
from galley.contract.rundir import Attempt, RunDir, fsync_path, write_atomic
from galley.contract.spec import Data, RunSpec
from galley.data.prepared import (
    FORMAT,
    HELD_OUT,
    TOKENIZER,
    TRAIN,
    Manifest,
    ModelFacts,
    damage,
    is_complete,
    read_manifest,
)
from galley.model import kernels
from galley.prepare import counts
from galley.prepare.convert import is_made
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.table import FORMATS
from galley.prepare.sources import check_sources, find_sources
from galley.ranks.operators import build_operators
from galley.ranks.stage import run_stage
from galley.storage import sums
from galley.storage.cache import digest, link_tree
from galley.storage.weights import fingerprint, is_whole
from galley.track import trackers

if TYPE_CHECKING:
    from galley.prepare.arrays import Arrays, Job
    from galley.prepare.pretrained import Pretrained


def work(spec: RunSpec, run: RunDir, attempt: Attempt) -> None:
    """Prepare ``run``. Raises :class:`UserError` for what the user can fix; leaves nothing half made."""
    del attempt
    trackers.check_installed(spec)
    kernels.check_installed(spec)
    began = time.monotonic()
    if not sys.stderr.isatty():  # a progress bar is one endless line in a file
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    manifest = ready(run, request_key(spec))
    if manifest is None:
        manifest = make(spec, run)
    else:
        check_sources(manifest.sources, spec)
        manifest = model_folder(spec, run)
    if spec.task.method.init == "pissa" and not run.adapter_init.exists():
        from galley.model.model import begin_adapter

        begin_adapter(spec, manifest, run.adapter_init)
    build_operators(spec)
    shown = [*(f"data: {line}" for line in counts.lines(manifest)), *_examples(run, manifest)]
    print("\n".join([*shown, *(f"warning: {line}" for line in manifest.warnings)]), flush=True)
    print(f"data: ready in {time.monotonic() - began:.1f} s", flush=True)
    for warning in pace.warnings(spec, manifest.train.samples):
        print(f"warning: {warning}", flush=True)


def _examples(run: RunDir, manifest: Manifest) -> list[str]:
    """The rows that ``galley prepare`` asks to see; none before training."""
    count = int(os.environ.get("GALLEY_EXAMPLES", "0"))
    if not count:
        return []
    from galley.prepare.examples import examples

    return examples(run, manifest, count)


def request_key(spec: RunSpec) -> str:
    """Hash of what the task asks of prepare; no file is opened for it."""
    task = spec.task
    data, usual = task.data.model_dump(mode="json"), Data(path="-").model_dump(mode="json")
    # Settings that came later count only where they are set: what older runs prepared stays theirs.
    if FORMATS.get(task.data.format, CHAT).tag is None:
        del data["format"]
    for name in (
        "columns",
        "system",
        "subset",
        "learn",
        "sources",
        "gates",
        "rewritten_turns",
        "refused_rows",
        "thinking",
    ):
        if data[name] == usual[name]:
            del data[name]
    return digest([task.model.model_dump(mode="json"), data, task.seed])


def ready(run: RunDir, key: str) -> Manifest | None:
    """The manifest, where the run has whole prepared data for the request ``key``."""
    try:
        manifest = read_manifest(run)
    except (OSError, ValueError):
        return None
    if manifest.key != key or not is_complete(run, manifest):
        return None
    if problem := damage(run, manifest):
        print(f"data: {run.data}: {problem}; preparing again", flush=True)
        return None
    return manifest


def model_folder(spec: RunSpec, run: RunDir) -> Manifest:
    """The manifest, with a model that is on this machine and is the one that the run began with.

    It is fetched again where it is missing, for the run may have come from another machine. Quick where it is here.
    Raises :class:`UserError` where it cannot be had or has changed, and where the run has no prepared data.
    """
    try:
        manifest = read_manifest(run)
    except (OSError, ValueError):
        what = "is missing, or from another version"
        raise UserError(str(run.data_manifest), what, "prepare the run's data: galley run") from None
    model = manifest.model
    same = _stands(model)
    if same:
        return manifest
    if same is False and model.path == spec.placement.paths.model:
        what = f"'{model.path}' changed since the run began"
        raise UserError("model.path", what, "put it back as it was, or start a new run")
    why = "is not on this machine" if same is None else "changed since the run began"
    print(f"model: {model.path} {why}, fetching it again", flush=True)
    return _fetch_again(manifest, spec, run)


def _stands(model: ModelFacts) -> bool | None:
    """Whether the folder is as it was when the run began; None where it is not on this machine, or not whole."""
    folder = Path(model.path)
    try:
        if not is_whole(folder):
            return None
        # A hub's snapshot is named after its commit, and what Galley made after what it was made from.
        return model.revision is not None or is_made(folder) or fingerprint(folder) == model.fingerprint
    except OSError as error:
        what = f"'{folder}' cannot be read ({error.strerror})"
        raise UserError("model.path", what, "check its permissions") from None


def _fetch_again(manifest: Manifest, spec: RunSpec, run: RunDir) -> Manifest:
    from galley.prepare.fetch import fetch_model
    from galley.prepare.pretrained import with_rows

    cache = Path(spec.placement.paths.cache)
    fetched = fetch_model(spec, cache, manifest.model.revision)
    if fetched.fingerprint != manifest.model.fingerprint:
        what = f"'{spec.placement.paths.model}' is not the model that the run began with"
        raise UserError("model.path", what, "bring that one here, or start a new run")
    model, trust = manifest.model, spec.task.model.trust_remote_code
    path = with_rows(fetched, model.added_tokens, model.added_token_ids, cache, trust)
    moved = manifest.model_copy(update={"model": model.model_copy(update={"path": str(path)})})
    write_manifest(moved, run)
    return read_manifest(run)


def make(spec: RunSpec, run: RunDir) -> Manifest:
    """Do all of it: sources, model, arrays, and the manifest last."""
    from galley.prepare.arrays import Job, prepare_arrays
    from galley.prepare.formats.base import Limits
    from galley.prepare.pretrained import find_pretrained

    cache, data = Path(spec.placement.paths.cache), spec.task.data
    sources, facts = find_sources(spec)
    model = find_pretrained(spec, cache)
    if model.packing_refused and data.packing:
        print(f"warning: not packed, every sample is one document: {model.packing_refused}", flush=True)
    job = Job(
        sources=sources,
        fingerprints=facts,
        limits=Limits(data.max_length, data.overlong, gates=data.gates),
        held_out=data.held_out,
        seed=spec.task.seed,
        tokens=model.tokens,
        vocab=model.facts.vocab,
        packed=data.packing and model.packing_refused is None,
    )
    arrays = prepare_arrays(job, cache)
    manifest = _describe(spec, job, arrays, model)
    install(arrays.folder, run, manifest)
    return manifest


def _describe(spec: RunSpec, job: Job, arrays: Arrays, model: Pretrained) -> Manifest:
    return Manifest(
        schema=FORMAT,
        key=request_key(spec),
        content=job.key,
        sources=job.fingerprints,
        packed=job.packed,
        packing_reason=model.packing_refused if spec.task.data.packing else None,
        max_length=job.limits.max_length,
        train=arrays.train,
        held_out=arrays.held_out,
        model=model.facts,
        template_hash=job.tokens.template_hash,
        versions=arrays.versions,
        checksums=arrays.checksums,
        warnings=arrays.warnings,
    )


def install(folder: Path, run: RunDir, manifest: Manifest) -> None:
    """Give the cache entry's files names in the run directory; the manifest goes first and comes last."""
    run.data_manifest.unlink(missing_ok=True)
    run.data.mkdir(parents=True, exist_ok=True)
    fsync_path(run.data)
    for old in run.data.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink()
    for name in (TRAIN, HELD_OUT, TOKENIZER):
        if (folder / name).is_dir():
            link_tree(folder / name, run.data / name)
    write_manifest(manifest, run)


def write_manifest(manifest: Manifest, run: RunDir) -> None:
    """Write ``data/manifest.json``: from now on the data exists."""
    value = json.loads(manifest.model_copy(update={"crc32": None}).model_dump_json(by_alias=True))
    write_atomic(run.data_manifest, json.dumps(value | {sums.SEAL: sums.seal(value)}, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Prepare the run whose ``run.json`` ``argv`` names."""
    return run_stage(stages.PREPARE.name, work, argv)
