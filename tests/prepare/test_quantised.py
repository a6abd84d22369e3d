"""How much of a model is quantised is said; where nothing is, or an export could not follow, it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from galley.contract.errors import UserError
from galley.model.quantised import check_quantisation

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}


def meta(kind: str, **settings: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))


@pytest.mark.parametrize(("kind", "bits"), [("qlora", "four bits (NF4)"), ("lora_int8", "eight bits")])
def test_the_share_that_is_quantised_is_said(capsys: pytest.CaptureFixture[str], kind: str, bits: str) -> None:
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    total = linear + 2 * 64 * 32 + 5 * 32
    assert check_quantisation(kind, meta("llama")) == pytest.approx(linear / total)
    assert capsys.readouterr().out == f"model: {linear / total:.1%} of its 0.0M weights are in {bits}\n"


def test_experts_that_stay_whole_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    part = check_quantisation("qlora", meta("qwen3_moe", **MIXTURE))
    assert part is not None
    assert 0 < part < 0.5
    warning = capsys.readouterr().out.splitlines()[1]
    assert warning.startswith("warning: method.kind: ")
    assert "its experts (model.layers.*.mlp.experts." in warning
    assert "are not quantised" in warning


@pytest.mark.parametrize("method", ["qlora", "lora_int8"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("falcon", "nothing of a falcon model would be quantised"),
        ("gpt2", "the layers of a gpt2 model are Conv1D (transformer.h.*.attn.c_attn, "),
        ("openai-gpt", "are Conv1D"),
    ],
)
def test_what_cannot_be_quantised_and_exported_is_refused(method: str, kind: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        check_quantisation(method, meta(kind))
    assert reason in str(caught.value)
    assert str(caught.value).endswith("use method.kind=lora")


def test_other_methods_quantise_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_quantisation("lora", meta("gpt2")) is None
    assert check_quantisation("full", meta("falcon")) is None
    assert capsys.readouterr().out == ""


def test_the_share_is_what_bitsandbytes_makes_of_the_model(tmp_path: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from galley.contract.spec import Model
    from galley.model.model import load_quantised
    from galley.model.quantised import share

    for kind in ("llama", "qwen3_moe", "phi3", "gpt_neox"):
        config = AutoConfig.for_model(kind, **SIZES | MIXTURE, pad_token_id=None)
        plain = AutoModelForCausalLM.from_config(config)
        plain.save_pretrained(tmp_path / kind)
        loaded = load_quantised(str(tmp_path / kind), Model(path="x"), "qlora", torch.device("cpu"))
        packed = [each for each in loaded.parameters() if hasattr(each, "quant_state")]
        assert sum(each.quant_state.shape.numel() for each in packed) == share(plain).quantised, kind


def test_the_share_reaches_the_report(make_run: Any, model_folder: Any, tmp_path: Any) -> None:
    from prepare.conftest import rows, write_jsonl

    from galley.data.prepared import read_manifest
    from galley.prepare.prepare import work
    from galley_launch.report.page import summary

    spec, run = make_run(model_folder, write_jsonl(tmp_path / "rows.jsonl", rows(8)), method={"kind": "qlora"})
    work(spec, run, run.attempt(1))
    share = read_manifest(run).model.quantised_share
    assert share is not None
    assert dict(summary(spec, run))["quantised"] == f"{share:.1%} of the weights"
