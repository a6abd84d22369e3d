"""PiSSA: the adapter begins as the principal part of the weights, and its export fits the base as it was released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import Train, make_spec, metrics, write_data, write_tokenizer
from train.plain import plain_losses
from train.test_methods import ADAPTER, SAMPLES, exports, resumes_to_the_bit, tolerance

from galley.contract.rundir import RunDir

pytestmark = pytest.mark.slow
METHOD = ADAPTER | {"kind": "lora", "init": "pissa"}


def go(train: Train, run: RunDir, model: Path, **settings: Any) -> None:
    from galley.data.prepared import read_manifest
    from galley.model.model import begin_adapter

    spec = make_spec(run, model, steps=4, cadence={"save_every": 2, "keep": 9}, **settings)
    write_data(run, model, SAMPLES, None, packed=False)
    write_tokenizer(run.data / "tokenizer")
    begin_adapter(spec, read_manifest(run), run.adapter_init)
    train(run, spec)


@pytest.mark.parametrize(("stage", "world", "dtype"), [(0, 1, "float32"), (2, 2, "bfloat16"), (3, 2, "float32")])
def test_it_begins_as_the_base_and_learns_what_peft_learns(
    tmp_path: Path, untied: Path, ranks: Ranks, train: Train, monkeypatch: pytest.MonkeyPatch,
    stage: int, world: int, dtype: str,
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"dtype": dtype, "task": {"method": METHOD}}
    run = RunDir(tmp_path / "run")
    go(train, run, untied, stage=stage, world=world, **settings)
    lora = plain_losses(tmp_path / "lora", untied, SAMPLES, method="lora", dtype=dtype, steps=4)
    assert metrics(run)[0] == pytest.approx(lora[0], rel=tolerance(dtype)), "it computes what the base computes"
    assert metrics(run)[-1] != pytest.approx(lora[-1], rel=1e-2), "it learns otherwise"
    monkeypatch.setattr("galley.model.model.load", lambda *_: of_peft(untied, dtype))
    theirs = plain_losses(tmp_path / "peft", untied, SAMPLES, method="lora", dtype=dtype, steps=4)
    assert metrics(run) == pytest.approx(theirs, rel=1e-2)
    resumes_to_the_bit(train, run)
    exports(ranks, run)
    config = json.loads((run.export / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (16, 3)])
def test_a_layer_smaller_than_the_rank(tmp_path: Path, shape: tuple[int, int]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from galley.model import pissa

    def wrapped() -> Any:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
        return get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))

    inputs = torch.randn(5, shape[1])
    before = wrapped()(inputs)
    pissa.make(wrapped(), 0, tmp_path / "begin.safetensors")
    begun = wrapped()
    pissa.apply(begun, tmp_path / "begin.safetensors", torch.float32)
    assert torch.allclose(begun(inputs), before, atol=1e-5)


def of_peft(folder: Path, dtype: str) -> Any:
    """peft's own PiSSA, of a whole decomposition."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa"
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False)
