"""``python -m galley.export RUN/run.json``: from a checkpoint to what the rest of the world can load, checked.

``GALLEY_EXPORT_STEP`` chooses the checkpoint: a step, ``best`` (by held-out loss) or ``last``. Nothing appears under
``export/`` before it has been loaded back with plain transformers (and peft) and compared with the trained model.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from galley.checkpoint import checkpoint, whole
from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.rundir import Attempt, Checkpoint, RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest, tokenizer_folder
from galley.export import card, consolidate, lowrank, weightcheck
from galley.export.bases import name_base, write_name
from galley.export.checks import Check, conclude, problem
from galley.export.logitcheck import Agreement, agreement, in_float32, relative_differences
from galley.export.merged import Merged
from galley.export.publish import publish
from galley.export.trained import Trained
from galley.model import model, pissa
from galley.model.generation import carry_over, save_model
from galley.model.towers import auto_class
from galley.objective import probes, table
from galley.prepare import prepare
from galley.ranks.stage import Superseded, Unverified, run_stage


def choose(run: RunDir, which: str) -> Checkpoint:
    """The checkpoint of a step, ``best`` or ``last``. Raises ``UserError`` where there is none."""
    if which == "last":
        return whole.last(run)
    by_step = {standing.step: standing for standing in run.checkpoints()}
    chosen = checkpoint.best_checkpoint(run) if which == "best" else None
    if which.isdigit():
        chosen = by_step.get(int(which))
    if chosen is None:
        steps = ", ".join(map(str, by_step))
        raise UserError("step", f"no checkpoint is {which!r}", f"use last, or one of {steps}")
    if problem := whole.damage(chosen):
        raise UserError(str(chosen.root), f"is damaged: {problem}", "use step=last, which takes the newest intact one")
    return chosen


TRAINED = "the trained model"


@dataclass
class Exporter:
    """Builds the export of one checkpoint in a folder of its own, and checks it."""

    spec: RunSpec
    run: RunDir
    manifest: Manifest
    checkpoint: Checkpoint
    out: Path

    def __post_init__(self) -> None:
        self.trained = Trained(self.spec, self.run, self.manifest, self.checkpoint)
        self.folder = self.manifest.model.path
        self.probes = load_file(self.checkpoint.root / "probes.safetensors")
        self.base_name = name_base(self.spec, self.manifest, self.run)
        self.checks: dict[str, Check] = {}
        self.failures: dict[str, str] = {}

    def build(self) -> None:
        """Write ``model/`` and, for an adapter, ``adapter/``; fill ``checks`` and ``failures``."""
        kind = self.spec.task.method.kind
        if kind == "full":
            target = self._target("model")
            consolidate.write_full(self.folder, self.spec.task.model, self.trained.reader, target)
            self._add_companions(target)
            self._try("model", lambda: self.check_model(target, {}, TRAINED, self.probes["logits"]))
            return
        base = self.trained.quantised() if kind in model.QUANTISED else self.trained.base()
        self._write_adapter(self.trained.attach(base))
        self._try("merged model", self._export_merged)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        """Do ``work``; what goes wrong is kept in ``failures``, so that what was written is not lost with it."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.failures[what] = f"{type(error).__name__}: {error}".splitlines()[0]

    def _target(self, part: str) -> Path:
        (self.out / part).mkdir(parents=True)
        return self.out / part

    def _write_adapter(self, wrapped: Any) -> None:
        folder, method = self.out / "adapter", self.spec.task.method
        # peft would add whole embeddings where the base that it finds has fewer rows, and complain of one on a hub.
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
        want = {name: parameter.data.cpu() for name, parameter in model.trained(wrapped).items()}
        scales = {name: lowrank.scale(layer, method) for name, layer in lowrank.layers(wrapped).items()}
        base = wrapped.unload()
        if method.init == "pissa":
            pissa.as_lora(folder, self.run.adapter_init, method, self.trained.dtype)
            want = pissa.doubled(want, self.run.adapter_init, self.trained.dtype)
            base = self.trained.base()
        write_name(self.base_name, folder)
        self._try("adapter", lambda: self.check_adapter(folder, base, want, scales))

    def check_adapter(self, folder: Path, base: Any, want: dict[str, torch.Tensor], scales: dict[str, float]) -> None:
        """Load the adapter in ``folder`` with peft on ``base``, and compare it with what was trained."""
        again = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
        stored = load_file(folder / "adapter_model.safetensors")
        weights = weightcheck.compare_adapter(stored, dict(again.named_parameters()), want)
        weightcheck.compare_scales(lowrank.scales(again), scales, weights)
        logits = self._agreement(again, self.probes["logits"])
        self.checks["adapter"] = conclude("adapter", TRAINED, weights, logits)

    def _export_merged(self) -> None:
        against, expected, layers = self._write_merged(self.trained.base())
        self._add_companions(self.out / "model")
        self.check_model(self.out / "model", layers, against, expected)

    def _write_merged(self, base: Any) -> tuple[str, torch.Tensor, dict[str, lowrank.Layer]]:
        """Write the merged model. Returns what its logits are to be compared with (in words, and these logits), and the
        layers of the adapter.
        """
        wrapped = self.trained.attach(base)
        layers = lowrank.layers(wrapped)
        against, expected = TRAINED, self.probes["logits"]
        if self.spec.task.method.kind in model.QUANTISED:
            # Training computed with quantised weights, the export has them dequantised and rounded to its dtype: only
            # the dequantised base with the adapter, not yet merged, computes what the merged model must.
            against, expected = "the dequantised base with the adapter", self._logits(wrapped)
            drift = float(relative_differences(expected, self.probes["logits"]).median())
            print(f"dequantised, the model differs from the one that was trained by {drift:.2e} (relative, logits)")
        save_model(lowrank.merge(wrapped), self._target("model"), max_shard_size="4GB")
        return against, expected, layers

    def _add_companions(self, target: Path) -> None:
        consolidate.copy_companions(self.folder, self.spec.task.model, target)
        carry_over(Path(self.folder), target, self.manifest.model.eos_ids)

    def check_model(self, target: Path, layers: dict[str, lowrank.Layer], against: str, expected: torch.Tensor) -> None:
        """Load the model in ``target`` as anybody would, and compare it with what was trained.

        ``layers``: those of the adapter that was merged; none where all weights were trained. ``expected``: logits
        [probes, vocabulary] of what ``against`` says.
        """
        loaded = model.load_plain(str(target), self.spec.task.model, self.trained.dtype, self.trained.device)
        weights = Merged(self.trained, layers).compare(loaded)
        weights.wrong += weightcheck.compare_configuration(self.folder, target, self.spec.task.model)
        logits = self._agreement(loaded, expected)
        what = "model" if self.spec.task.method.kind == "full" else "model (merged)"
        self.checks["model"] = conclude(what, against, weights, logits)

    def _agreement(self, loaded: Any, expected: torch.Tensor) -> Agreement:
        exported = self._logits(loaded)
        if self.trained.dtype == torch.float32:
            return agreement(expected, exported, exported, self.spec.task.model.dtype)
        with in_float32(loaded):
            exact = self._logits(loaded)
        return agreement(expected, exported, exact, self.spec.task.model.dtype)

    def _logits(self, loaded: Any) -> torch.Tensor:
        return probes.again(table.of(self.spec.task), loaded, self.probes, self.trained.device)

    def write_cards(self) -> dict[str, bool]:
        """Give each part its tokenizer and its card. Returns which parts are verified, by their folders' names."""
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder(self.run), trust_remote_code=self.spec.task.model.trust_remote_code
        )
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.spec.task.model.trust_remote_code)
        factory, verified = auto_class(config).__name__, {}
        for part in ("adapter", "model"):
            folder, check = self.out / part, self.checks.get(part)
            if folder.is_dir():
                verified[part] = check is not None and check.verified
                tokenizer.save_pretrained(str(folder))
                carry_over(Path(self.folder), folder, self.manifest.model.eos_ids)
                target = (self.run.export if verified[part] else self.run.unverified).absolute() / part
                described = card.Part(part, target, check, factory, bool(tokenizer.chat_template))
                text = card.render(self.spec, self.manifest, self.checkpoint, described, self.base_name)
                (folder / "README.md").write_text(text, encoding="utf-8")
        return verified


def work(spec: RunSpec, run: RunDir, attempt: Attempt) -> None:
    """Export one checkpoint, replacing an earlier export. Raises ``Unverified`` where a part of it failed its check."""
    chosen = choose(run, os.environ.get("GALLEY_EXPORT_STEP", "last"))
    torch.set_num_threads(spec.placement.threads * spec.placement.ranks_per_node)
    print(f"exporting step {chosen.step}", flush=True)
    building = run.root / ".export.building"
    shutil.rmtree(building, ignore_errors=True)
    try:
        _export(spec, run, attempt, chosen, building)
    finally:  # on a disk that is full, it would be in the way
        shutil.rmtree(building, ignore_errors=True)


def _export(spec: RunSpec, run: RunDir, attempt: Attempt, chosen: Checkpoint, building: Path) -> None:
    exporter = Exporter(spec, run, prepare.model_folder(spec, run), chosen, building)
    exporter.build()
    verified, checks = exporter.write_cards(), list(exporter.checks.values())
    facts = {"step": chosen.step, "method": spec.task.method.kind, "checks": [asdict(check) for check in checks]}
    if attempt.is_superseded():
        raise Superseded(attempt)
    publish(building, run, verified, facts | {"failures": exporter.failures})
    folders = [run.export] if any(verified.values()) else []
    if not all(verified.values()):
        folders.append(run.unverified)
    print(f"exported to {' and '.join(map(str, folders))}", flush=True)
    wrong = problem(checks, exporter.failures)
    if wrong:
        where = f"; it is in {run.unverified}, whose README says how to use it" if run.unverified.exists() else ""
        raise Unverified(f"export: {wrong}{where}")


def main(argv: list[str]) -> int:
    """Export the run whose ``run.json`` ``argv`` names."""
    return run_stage(stages.EXPORT.name, work, argv)
