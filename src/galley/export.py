"""``python -m galley.export RUN/run.json``: from a checkpoint to what the rest of the world can load, checked.

``GALLEY_EXPORT_STEP`` chooses the checkpoint: a step, ``best`` (by held-out loss) or ``last``. Nothing appears under
``export/`` before it has been loaded back with plain transformers (and peft) and compared with the trained model.
"""

from __future__ import annotations

import galley.quiet  # noqa: F401  # isort: skip
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from galley import card, checkpoint, consolidate, evaluate, model, pissa, prepare, whole
from galley.batches import Batch
from galley.checkpoint import Reader
from galley.data import Manifest, tokenizer_folder
from galley.errors import UserError
from galley.rundir import Attempt, Checkpoint, RunDir, fsync_path, read_json, write_atomic
from galley.spec import RunSpec
from galley.stage import Superseded, run_stage

TOLERANCE = {
    ("float32", False): 1e-4, ("float32", True): 1e-4, ("float16", False): 5e-3, ("float16", True): 1e-2,
    ("bfloat16", False): 2e-2, ("bfloat16", True): 5e-2,
}  # fmt: skip
"""Largest relative difference of centred logits, by dtype and by whether an adapter was merged (which rounds)."""


@dataclass(frozen=True)
class Check:
    """One comparison of logits on the probes."""

    what: str
    against: str
    difference: float
    tolerance: float
    same_top: float
    """Share of probes whose likeliest next token is the same."""


def choose(run: RunDir, which: str) -> Checkpoint:
    """The checkpoint of a step, ``best`` or ``last``. Raises ``UserError`` where there is none."""
    if which == "last":
        return whole.last(run)
    standing = run.checkpoints()
    found = checkpoint.best_checkpoint(run) if which == "best" else None
    if which.isdigit():
        found = next((each for each in standing if each.step == int(which)), None)
    if found is None:
        steps = ", ".join(str(each.step) for each in standing)
        raise UserError("step", f"no checkpoint is {which!r}", f"use last, or one of {steps}")
    if problem := whole.damage(found):
        raise UserError(str(found.root), f"is damaged: {problem}", "use step=last, which takes the newest whole one")
    return found


def relative_difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖ over logits [probes, vocabulary], each row centred: an offset of all logits means nothing."""
    a, b = (each - each.mean(dim=-1, keepdim=True) for each in (mine, theirs))
    return float((a - b).norm() / b.norm())


def _device(spec: RunSpec, manifest: Manifest) -> str:
    """A GPU where two copies of the unquantised model fit (the merged one is checked), else the CPU."""
    if spec.placement.device == "cpu" or not torch.cuda.is_available():  # a job of its own may have no GPU
        return "cpu"
    width = 4 if spec.task.model.dtype == "float32" else 2
    free, _ = torch.cuda.mem_get_info(0)
    return "cuda:0" if 2.2 * width * manifest.model.parameters < free else "cpu"


@dataclass
class Exporter:
    """Builds the export of one checkpoint in a folder of its own, then checks it."""

    spec: RunSpec
    run: RunDir
    manifest: Manifest
    checkpoint: Checkpoint
    out: Path

    def __post_init__(self) -> None:
        self.reader = Reader(self.checkpoint)
        self.probes = load_file(self.checkpoint.root / "probes.safetensors")
        self.device = _device(self.spec, self.manifest)
        self.dtype = model.DTYPES[self.spec.task.model.dtype]
        self.folder = self.manifest.model.path
        self.checks: list[Check] = []

    def build(self) -> None:
        """Write ``model/`` and, for an adapter, ``adapter/``; fill ``checks``."""
        target = self.out / "model"
        target.mkdir(parents=True)
        kind = self.spec.task.method.kind
        if kind == "full":
            consolidate.write_full(self.folder, self.spec.task.model, self.reader, target)
        else:
            self._write_adapter(self._attach(self._quantised() if kind in model.QUANTISED else self._base()))
            self._write_merged(self._base(), target)
        consolidate.copy_companions(self.folder, self.spec.task.model, target)
        self._write_tokenizer(target)
        self._check_model(target, kind)

    def _quantised(self) -> Any:
        task = self.spec.task
        return model.load_quantised(self.folder, task.model, task.method.kind, torch.device(self.device))

    def _base(self) -> Any:
        """What the adapter is merged into: the base, dequantised where it was quantised."""
        if self.spec.task.method.kind in model.QUANTISED:
            return self._quantised().dequantize(dtype=self.dtype)
        return model.load_plain(self.folder, self.spec.task.model, self.dtype, self.device)

    def _attach(self, base: Any) -> Any:
        """The adapter with the checkpoint's weights, in the precision that the forward pass used.

        Under ZeRO-0 peft's own layers compute in fp32; modules that are trained in full go through autocast.
        """
        wrapped = model.begun_adapter(base, self.spec, self.manifest, self.run)
        stage = int((read_json(self.checkpoint.manifest) or {})["zero_stage"])
        for name, parameter in model.trained(wrapped).items():
            dtype = self.dtype if stage > 0 or ".modules_to_save." in name else torch.float32
            parameter.data = self.reader.whole(name).view(parameter.shape).to(parameter.device, dtype)
        return wrapped

    def _write_adapter(self, wrapped: Any) -> None:
        # peft would add whole embeddings where the base that it finds has fewer rows, and complain of one on a hub.
        wrapped.save_pretrained(str(self.out / "adapter"), save_embedding_layers=False)
        self._write_tokenizer(self.out / "adapter")
        base = wrapped.unload()
        if self.spec.task.method.init == "pissa":
            pissa.as_lora(self.out / "adapter", self.run.adapter_init, self.spec.task.method, self.dtype)
            base = self._base()
        again = PeftModel.from_pretrained(base, str(self.out / "adapter"), autocast_adapter_dtype=False)
        self._compare("adapter", "the trained model", self._logits(again), self.probes["logits"], self._rounds_again())

    def _rounds_again(self) -> bool:
        """LLM.int8 rounds activations to 256 steps: what else differs a little then differs more, as in merging."""
        return self.spec.task.method.kind == "lora_int8"

    def _write_merged(self, base: Any, target: Path) -> None:
        wrapped = self._attach(base)
        self.unmerged = self._logits(wrapped)
        for parameter in model.trained(wrapped).values():
            parameter.data = parameter.data.float()  # so that the sum is rounded once, not its parts
        merged = wrapped.merge_and_unload()
        merged.to(self.dtype).save_pretrained(str(target), max_shard_size="4GB")

    def _check_model(self, target: Path, kind: str) -> None:
        loaded = model.load_plain(str(target), self.spec.task.model, self.dtype, self.device)
        logits = self._logits(loaded)
        if kind in model.QUANTISED:
            against = "the dequantised base with the adapter"
            self._compare("model (merged)", against, logits, self.unmerged, merged=True)
            drift = relative_difference(logits, self.probes["logits"])
            print(f"the merged model differs from the quantised one that was trained by {drift:.2e} (relative, logits)")
        else:
            merged = kind == "lora"
            name = "model (merged)" if merged else "model"
            self._compare(name, "the trained model", logits, self.probes["logits"], merged)

    def _logits(self, loaded: Any) -> torch.Tensor:
        tokens, targets = (self.probes[name].to(self.device) for name in ("tokens", "targets"))
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        return evaluate.probe_logits(loaded, Batch([], tokens, positions, targets, tokens.numel()))

    def _compare(self, what: str, against: str, mine: torch.Tensor, theirs: torch.Tensor, merged: bool) -> None:
        tolerance = TOLERANCE[(self.spec.task.model.dtype, merged)]
        same = float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
        check = Check(what, against, relative_difference(mine, theirs), tolerance, same)
        self.checks.append(check)
        print(
            f"{what}: logits differ from {against} by {check.difference:.2e} (relative; at most {tolerance:.0e}), "
            f"likeliest token the same in {same:.0%} of {len(mine)} probes",
            flush=True,
        )
        if not check.difference <= tolerance:
            raise UserError(
                "export",
                f"{what} does not compute what was trained: logits differ by {check.difference:.2e}, more than "
                f"{tolerance:.0e}",
                f"nothing was exported; what was built is in {self.out}",
            )

    def _write_tokenizer(self, target: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_folder(self.run), trust_remote_code=self.spec.task.model.trust_remote_code
        )
        tokenizer.save_pretrained(str(target))
        settings = Path(self.folder) / "generation_config.json"
        generation = GenerationConfig.from_pretrained(self.folder) if settings.exists() else GenerationConfig()
        if self.manifest.model.eos_ids:
            generation.eos_token_id = list(self.manifest.model.eos_ids)
        generation.save_pretrained(str(target))
        (target / "README.md").write_text(card.render(self.spec, self.manifest, self.checkpoint), encoding="utf-8")


def work(spec: RunSpec, run: RunDir, attempt: Attempt) -> None:
    """Export one checkpoint, replacing an earlier export."""
    chosen = choose(run, os.environ.get("GALLEY_EXPORT_STEP", "last"))
    torch.set_num_threads(spec.placement.threads * spec.placement.ranks_per_node)
    print(f"exporting step {chosen.step}", flush=True)
    building = run.root / ".export.building"
    shutil.rmtree(building, ignore_errors=True)
    exporter = Exporter(spec, run, prepare.model_folder(spec, run), chosen, building)
    exporter.build()
    facts = {"step": chosen.step, "method": spec.task.method.kind, "checks": [asdict(each) for each in exporter.checks]}
    write_atomic(building / "export.json", json.dumps(facts, indent=1))
    if attempt.is_superseded():
        raise Superseded(attempt)
    _swap_in(building, run)
    print(f"exported to {run.export}", flush=True)


def _swap_in(building: Path, run: RunDir) -> None:
    """Put what was built in the place of an earlier export, which is there until then."""
    for path in [*building.rglob("*"), building]:
        fsync_path(path)
    before = run.root / ".export.before"
    shutil.rmtree(before, ignore_errors=True)
    if run.export.exists():
        run.export.rename(before)
    building.rename(run.export)
    fsync_path(run.root)
    shutil.rmtree(before, ignore_errors=True)


def main(argv: list[str]) -> int:
    """Export the run whose ``run.json`` ``argv`` names."""
    return run_stage("export", work, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
