"""A sample is never longer than the table of positions that a model learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from galley.contract.errors import UserError
from galley.prepare.positions import check_positions, longest

KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 40, "intermediate_size": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 8},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "dff": 64},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
        "ffn_dim": 64, "word_embed_proj_dim": 32,
    },
    "biogpt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
        "intermediate_size": 64,
    },
}  # fmt: skip


def build(kind: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=64, bos_token_id=0, eos_token_id=1, **{"pad_token_id": 0} | settings)
    return AutoModelForCausalLM.from_config(config).eval()


def forward(model: Any, length: int) -> None:
    import torch

    with torch.no_grad():
        model(torch.randint(2, 64, (1, length)), position_ids=torch.arange(length)[None], use_cache=False)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_table_of_positions_is_as_long_as_it_is(kind: str) -> None:
    import torch

    with torch.device("meta"):
        found = longest(build(kind, KINDS[kind]))
    assert found is not None
    assert found[0] == 40
    model = build(kind, KINDS[kind])
    forward(model, 40)
    with pytest.raises((IndexError, RuntimeError)):
        forward(model, 41)
    check_positions(model, 40)
    with pytest.raises(
        UserError, match=r"data.max_length: 41 is more than the 40 positions .*; use data.max_length=40"
    ):
        check_positions(model, 41)


ROTARY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", ROTARY | {"max_position_embeddings": 40}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("xglm", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 40}),
    ],
)
def test_positions_that_are_computed_have_no_end(kind: str, settings: dict[str, Any]) -> None:
    model = build(kind, settings)
    assert longest(model) is None
    forward(model, 60)


def test_preparation_refuses_a_length_above_the_table(
    make_run: Any, tokenizer: Any, tmp_path: Path, refused: Any
) -> None:
    from prepare.conftest import rows, write_jsonl
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer.save_pretrained(tmp_path / "model")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    line = refused(make_run(tmp_path / "model", write_jsonl(tmp_path / "rows.jsonl", rows(4)))[1])
    assert line == (
        "data.max_length: 128 is more than the 64 positions that the model has (transformer.wpe.weight); "
        "use data.max_length=64 or less"
    )
