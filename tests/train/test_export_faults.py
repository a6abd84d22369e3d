"""A wrong export is told from rounding: faults planted in exports are caught, and healthy ones pass with room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train.planted import ARCHITECTURES, NORM, SMALL, Case, make_model, make_run, sweep

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.export import consolidate, export, lowrank
from galley.export.checks import conclude
from galley.export.logitcheck import agreement, in_float32
from galley.export.weightcheck import Weights
from galley.ranks.stage import Unverified

pytestmark = pytest.mark.slow

LLAMA, QWEN_MOE = "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-30B-A3B-Instruct-2507"
CASES = [
    Case(LLAMA, "lora", "bfloat16", SMALL, {"dora": True}),
    Case("qwen2 (biases)", "full", "float16", NORM),
    Case(QWEN_MOE, "lora", "float32", NORM, {"targets": "all-linear+experts"}, added=(7, 9)),
]


def check_sweep(root: Path, case: Case) -> None:
    healthy, faults = sweep(root, case)
    for check in healthy.values():
        assert check.verified, check
        assert check.largest == 0, "healthy weights are those of the checkpoint, to the bit or to one rounding"
        assert check.difference <= check.tolerance / 2, check
        assert check.agree == check.probes
    missed = [planted for planted in faults if not planted.caught]
    assert not missed
    assert len({(planted.part, planted.fault) for planted in faults}) >= 10


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        Case(LLAMA, "lora", "bfloat16", SMALL, {"init": "pissa"}), Case(LLAMA, "lora_int8", "bfloat16", NORM),
        Case(LLAMA, "qlora", "bfloat16", NORM), Case(LLAMA, "lora", "bfloat16", NORM, {"rslora": True}, stage=0),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_exports_by_every_method_are_told_from_rounding(tmp_path: Path, case: Case) -> None:
    check_sweep(tmp_path, case)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrong_exports_of_every_family_are_told_from_rounding(tmp_path: Path, name: str, dtype: str) -> None:
    for method, size in (("lora", SMALL), ("full", NORM)):
        check_sweep(tmp_path / method, Case(ARCHITECTURES[name], method, dtype, size))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_wrong_export_is_told_from_rounding(tmp_path: Path, case: Case) -> None:
    check_sweep(tmp_path, case)


def a_run(root: Path, case: Case) -> tuple[RunSpec, RunDir]:
    spec, run, _ = make_run(root / "run", make_model(root / "base", case.architecture), case)
    run.attempt(1).root.mkdir(parents=True)
    return spec, run


def checks_in(folder: Path) -> dict[str, bool]:
    facts = json.loads((folder / "export.json").read_text())
    return {check["what"]: check["verified"] for check in facts["checks"]}


def test_a_merged_model_that_differs_leaves_the_adapter_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = a_run(tmp_path, Case(QWEN_MOE))
    merge = lowrank.merge

    def merge_wrongly(wrapped: Any) -> Any:
        for name, parameter in wrapped.named_parameters():
            if ".1." in name and ".lora_B." in name:
                parameter.data *= 1.1
        return merge(wrapped)

    monkeypatch.setattr(lowrank, "merge", merge_wrongly)
    with pytest.raises(Unverified, match=r"model \(merged\) is not verified: .*layers.1") as caught:
        export.work(spec, run, run.attempt(1))
    assert "adapter is not" not in str(caught.value)
    assert {path.name for path in run.export.iterdir()} == {"adapter", "export.json"}
    assert {path.name for path in run.unverified.iterdir()} == {"model", "export.json"}
    assert checks_in(run.export) == checks_in(run.unverified) == {"adapter": True, "model (merged)": False}
    assert "Not verified" not in (run.export / "adapter" / "README.md").read_text()
    assert "> - model.layers.1" in (run.unverified / "model" / "README.md").read_text()

    monkeypatch.setattr(lowrank, "merge", merge)
    export.work(spec, run, run.attempt(1))
    assert {path.name for path in run.export.iterdir()} == {"adapter", "model", "export.json"}
    assert not run.unverified.exists()


def test_a_merge_that_dies_leaves_the_adapter_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, run = a_run(tmp_path, Case(LLAMA))

    def die(_: Any) -> Any:
        raise MemoryError("no room for it")

    monkeypatch.setattr(lowrank, "merge", die)
    with pytest.raises(Unverified, match="merged model could not be made or checked: MemoryError: no room for it"):
        export.work(spec, run, run.attempt(1))
    assert checks_in(run.export) == {"adapter": True}


def test_an_export_that_does_not_load_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, run = a_run(tmp_path, Case(LLAMA, "full"))
    write = consolidate.write_full

    def write_half(folder: str, model: Any, reader: Any, out: Path) -> None:
        write(folder, model, reader, out)
        (path,) = out.glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-100])

    monkeypatch.setattr(consolidate, "write_full", write_half)
    with pytest.raises(Unverified, match="the model could not be made or checked"):
        export.work(spec, run, run.attempt(1))
    assert not run.export.exists()
    assert "could not be done" in (run.unverified / "model" / "README.md").read_text()


def noisy(exact: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
    return exact + size * noise * exact.std()


def test_rounding_of_any_size_passes_and_another_model_does_not() -> None:
    exact = 3 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    for size in (1e-4, 1e-2, 5e-2):  # of a quiet processor, a usual one, a wild one
        found = agreement(noisy(exact, size, 1), noisy(exact, size, 2), exact, "bfloat16")
        assert found.right, size
        assert found.agree == 4, size
        assert found.rounding == pytest.approx(size, rel=0.2)
        wrong = agreement(noisy(exact, 6 * max(size, 5e-3), 1), noisy(exact, size, 2), exact, "bfloat16")
        assert not wrong.right, size
    assert not agreement(noisy(exact, 1e-2, 1).roll(1, -1), noisy(exact, 1e-2, 2), exact, "bfloat16").right
    assert not agreement(noisy(exact, 0.3, 1), noisy(exact, 0.3, 2).fill_(float("nan")), exact, "bfloat16").right
    assert not agreement(exact.clone().fill_(float("nan")), noisy(exact, 1e-2, 2), exact, "bfloat16").right


def test_a_probe_whose_expert_flipped_is_counted_not_fatal(capsys: pytest.CaptureFixture[str]) -> None:
    exact = 3 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    trained = noisy(exact, 1e-2, 1)
    trained[2] = noisy(exact, 0.3, 3)[2]
    found = agreement(trained, noisy(exact, 1e-2, 2), exact, "bfloat16")
    assert (found.right, found.agree) == (True, 3)
    assert conclude("model (merged)", "the trained model", Weights(3), found).verified
    assert "warning: model (merged): 1 of 4 probes differ" in capsys.readouterr().out
    assert not conclude("model", "the trained model", Weights(3, 1.0, ["a layer is stale"]), found).verified


def test_computing_in_fp32_is_what_a_model_in_fp32_computes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "base", QWEN_MOE)
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = narrow(tokens).logits
        with in_float32(narrow):
            logits = narrow(tokens).logits
        torch.testing.assert_close(logits, wide(tokens).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(narrow(tokens).logits, before)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
