"""An objective of a test's own trains, is measured, resumes and is exported, and the product knows nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from toy import make_documents, make_spec, metrics, write_data, write_tokenizer

from galley.contract.rundir import RunDir
from galley.data.batches import Batch, collate, order
from galley.data.columns import IGNORED, Split
from galley.objective import sft, table

pytestmark = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(24)]
HELD_OUT = SAMPLES[:5]
HERE = "test_objective_seam"


class SampleMean:
    """Each sample counts the same, however many of its tokens are supervised, with some label smoothing."""

    def units(self, batch: Batch) -> int:
        return int((batch.targets != IGNORED).any(1).sum())

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits.float()
        settings: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "none", "label_smoothing": 0.1}
        terms = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), **settings)
        supervised = (batch.targets != IGNORED).sum(1).clamp_min(1)
        return (terms.view(batch.targets.shape).sum(1) / supervised).sum()

    def probe_batch(self, split: Split, device: torch.device) -> Batch:
        return sft.probe_batch(split, device)

    def probe_outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        return sft.probe_outputs(model, batch)


def train(argv: list[str]) -> int:
    from galley.train.train import main

    table.OBJECTIVES["sft"] = SampleMean()  # of a forked rank, which ends with this
    return main(argv)


def export(argv: list[str]) -> int:
    from galley.export.export import main

    table.OBJECTIVES["sft"] = SampleMean()
    return main(argv)


def trained(ranks: Ranks, root: Path, llama: Path, *durations: int) -> RunDir:
    run = RunDir(root)
    write_data(run, llama, SAMPLES, HELD_OUT, packed=False)
    write_tokenizer(run.data / "tokenizer")
    for steps in durations:
        constant = {"schedule": {"kind": "constant", "warmup": 0.0}}  # so that a longer duration is the same run
        make_spec(run, llama, world=2, steps=steps, task=constant, cadence={"eval_every": 2})
        assert ranks.run(f"{HERE}:train", [str(run.spec)], 2, run.root / "log") == [0, 0], (
            run.root / "log"
        ).read_text()
    return run


def test_a_foreign_objective_trains_is_measured_resumes_and_is_exported(
    tmp_path: Path, llama: Path, ranks: Ranks
) -> None:
    from galley.contract.spec import Model, RunSpec
    from galley.model.model import load_plain

    run = trained(ranks, tmp_path / "parts", llama, 2, 4)
    whole = trained(ranks, tmp_path / "whole", llama, 4)
    assert metrics(run) == metrics(whole)
    assert metrics(run, "held_out_loss") == metrics(whole, "held_out_loss")
    assert len(metrics(run)) == 4

    model = load_plain(str(llama), Model(path=str(llama), dtype="float32"), torch.float32)
    split, spec = Split.open(run.data / "train"), RunSpec.read(run.spec)
    batch = collate(split, order(spec.task, len(split)).batch(1), False, torch.device("cpu"))
    objective = SampleMean()
    expected = float(objective.loss(model, batch).detach()) / objective.units(batch)
    assert metrics(run)[0] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(float(sft.loss(model, batch).detach()) / sft.units(batch), rel=1e-3)

    assert ranks.run(f"{HERE}:export", [str(run.spec)], 1, run.root / "export.log") == [0]
    facts = json.loads((run.export / "export.json").read_text())
    assert facts["checks"]
    assert all(check["verified"] for check in facts["checks"])
