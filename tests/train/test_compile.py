"""Compiled layers compute what the layers compute, and a resumed run goes on to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, write_data, write_tokenizer

from galley.contract.rundir import RunDir

pytestmark = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(16)]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_compiled_layers(tmp_path: Path, llama: Path, train: Train, ranks: Ranks) -> None:
    plain, run = RunDir(tmp_path / "plain"), RunDir(tmp_path / "run")
    for each, compiled in ((plain, False), (run, True)):
        spec = make_spec(each, llama, method="lora", compiled=compiled, steps=4, cadence={"save_every": 2})
        write_data(each, llama, SAMPLES, None, packed=False)
        train(each, spec)
    whole = metrics(run)
    assert whole == pytest.approx(metrics(plain), rel=1e-4)
    assert metrics(run, "step_s")[0] > 3 * metrics(plain, "step_s")[0], "nothing was compiled"
    run.checkpoint(4).manifest.unlink()
    train(run, spec)
    assert metrics(run) == whole
    write_tokenizer(run.data / "tokenizer")
    assert ranks.run("galley.export.export:main", [str(run.spec)], 1, run.root / "export.log") == [0]
    adapter = json.loads((run.export / "export.json").read_text())["checks"][0]
    assert adapter["direct"] == 0, "what it is compared with was computed by compiled layers"
