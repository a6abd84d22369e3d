"""Which architectures are packed: those whose packed and separate logits agree."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, GPT2Config, Lfm2Config, LlamaConfig, Qwen3NextConfig

from galley.contract.errors import UserError
from galley.contract.spec import Model
from galley.model.attention import BY_DOCUMENT
from galley.prepare.isolation import _verdict, attends_by_document, layers_needed, measure, packing_refused, shrink

KEPT_APART = ["llama", "qwen3", "gemma3_text"]


@pytest.mark.parametrize("kind", KEPT_APART)
def test_attention_keeps_documents_apart(kind: str) -> None:
    assert measure(shrink(CONFIG_MAPPING[kind]()), "sdpa", trust=False) < 1e-5


@pytest.mark.parametrize("kind", [*KEPT_APART, "mistral", "olmo2", "phi3"])
def test_attention_by_document_computes_the_same(kind: str) -> None:
    assert measure(shrink(CONFIG_MAPPING[kind]()), "sdpa", trust=False, together=BY_DOCUMENT) < 1e-5


def test_a_short_window_is_kept() -> None:
    config = shrink(CONFIG_MAPPING["mistral"](sliding_window=8))
    assert measure(config, "sdpa", trust=False, together=BY_DOCUMENT) < 1e-5


def test_other_attention_and_dropout_are_not_computed_by_document(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.save_pretrained(tmp_path / "plain")
    config.attention_dropout = 0.1
    config.save_pretrained(tmp_path / "dropout")
    assert attends_by_document(tmp_path / "plain", Model(path="x"), tmp_path)
    assert not attends_by_document(tmp_path / "plain", Model(path="x", attention="eager"), tmp_path)
    assert not attends_by_document(tmp_path / "dropout", Model(path="x"), tmp_path)
    GPT2Config(n_embd=64, n_head=4).save_pretrained(tmp_path / "gpt2")
    assert not attends_by_document(tmp_path / "gpt2", Model(path="x"), tmp_path), "its dropout has another name"
    GPT2Config(n_embd=64, n_head=4, attn_pdrop=0.0).save_pretrained(tmp_path / "gpt2")
    assert attends_by_document(tmp_path / "gpt2", Model(path="x"), tmp_path)


CONVOLUTION = Lfm2Config(
    hidden_size=256, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=4,
    layer_types=["conv", "conv", "full_attention"] * 5 + ["conv"],
)  # fmt: skip
RECURRENCE = Qwen3NextConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)


@pytest.mark.parametrize("config", [CONVOLUTION, RECURRENCE], ids=["lfm2", "qwen3_next"])
def test_what_runs_along_the_sequence_does_not(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "model")
    reason = packing_refused(tmp_path / "model", Model(path="x"), tmp_path)
    assert reason is not None
    assert f"in a {config.model_type} model" in reason
    (note,) = (tmp_path / "isolation").iterdir()
    assert json.loads(note.read_text())["error"] > 1e-2


PARTICULAR = ["gemma4_text", "gemma4", "cwm", "qwen3_vl", "mistral3"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PARTICULAR)
def test_particular_configurations_are_read_and_packed(kind: str, tmp_path: Path) -> None:
    """Settings of single layers, ends of text that must be numbers, parts that see."""
    config = CONFIG_MAPPING[kind]()
    before = repr(config)
    assert _verdict(config, "sdpa", "sdpa", trust=False)["reason"] is None
    assert repr(config) == before


def test_settings_of_single_layers_are_kept() -> None:
    small = shrink(CONFIG_MAPPING["gemma4_text"]())
    assert [small.per_layer_config[layer].head_dim for layer in range(small.num_hidden_layers)] == [256] * 5 + [512]


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlm-roberta"])
def test_a_model_that_looks_ahead_is_refused(kind: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=rf"model.path: a {kind} model is bidirectional: .*is_decoder in config.json"):
        packing_refused(tmp_path / "model", Model(path="x"), tmp_path)
    CONFIG_MAPPING[kind](is_decoder=True).save_pretrained(tmp_path / "model")
    packing_refused(tmp_path / "model", Model(path="x"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("florence2", "has an encoder for its text: it is not a causal language model"),
        ("pix2struct", "has an encoder for its text"),
        ("blip-2", "does not run on text alone, as a tiny copy of it shows (TypeError: "),
        ("paligemma", "is bidirectional"),
    ],
)
def test_a_model_that_sees_and_cannot_write_alone_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model.path: a {kind} model {reason}")):
        _verdict(CONFIG_MAPPING[kind](), "sdpa", "sdpa", trust=False)


def test_an_answer_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaConfig(hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path / "model")
    assert packing_refused(tmp_path / "model", Model(path="x"), tmp_path) is None
    monkeypatch.setattr("galley.prepare.isolation.measure", None)
    assert packing_refused(tmp_path / "model", Model(path="x"), tmp_path) is None


def test_what_cannot_be_tried_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("shapes differ\nin many ways")

    LlamaConfig().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("galley.prepare.isolation.measure", fail)
    reason = packing_refused(tmp_path / "model", Model(path="x"), tmp_path)
    assert reason == "its architecture could not be checked (RuntimeError: shapes differ)"


def test_a_shrunken_twin_has_every_kind_of_layer() -> None:
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=26)
    small = shrink(config)
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert small.num_hidden_layers == len(small.layer_types) == layers_needed(config) == 6
    assert config.num_hidden_layers == 26
    assert shrink(LlamaConfig(num_hidden_layers=1)).num_hidden_layers == 1
