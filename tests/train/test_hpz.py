"""ZeRO++ hpZ: a second partition of the weights inside each node changes where they come from, not what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

pytestmark = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(16)]
HPZ = {"zero_hpz_partition_size": 2}


def spec_of(run: RunDir, model: Path, method: str, zero: dict[str, int] | None) -> RunSpec:
    settings: dict[str, Any] = {"dtype": "bfloat16", "cadence": {"save_every": 2}, "steps": 4, "zero": zero}
    return make_spec(run, model, stage=3, world=4, micro=1, method=method, **settings)


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_two_nodes_of_two_ranks(tmp_path: Path, llama: Path, train: Train, method: str) -> None:
    plain, run = RunDir(tmp_path / "plain"), RunDir(tmp_path / "run")
    for each, zero in ((plain, None), (run, HPZ)):
        spec = spec_of(each, llama, method, zero)
        write_data(each, llama, SAMPLES, None, packed=False)
        train(each, spec)
    assert metrics(run) == metrics(plain)
    assert metrics(run, "grad_norm") == metrics(plain, "grad_norm")
    run.checkpoint(4).manifest.unlink()  # go on from step 2
    train(run, spec)
    assert metrics(run) == metrics(plain)
