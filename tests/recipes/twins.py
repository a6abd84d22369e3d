"""A twin of each recipe's model: its kind and its particulars, two layers, 64 wide, random weights, a toy tokenizer.

Twins lie in a hub's cache under the real models' names, so that recipes find them as they are written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prepare.conftest import train_tokenizer
from recipes.tongues import tongue

from galley_launch.recipe import model_facts

LAYERS, WIDTH, HEADS = 2, 64, 4
COMMIT = "7" * 40
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
PARTICULARS: dict[str, dict[str, Any]] = {
    "meta-llama/": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
        }
    },
    "google/gemma-3": ALTERNATING | {"query_pre_attn_scalar": 32},
    "allenai/Olmo-3": ALTERNATING,
    "HuggingFaceTB/SmolLM3": {"no_rope_layers": [1, 0]},
    "mistralai/": {"sliding_window": None},
    "Qwen/Qwen3-30B": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True
    },
    "microsoft/Phi-4-mini": {
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512, "short_factor": [1.0] * 6, "long_factor": [1.5] * 6,
        },
    },
}  # fmt: skip
"""What makes a family's architecture its own, in small; by the beginning of the hub id."""


def snapshot(hub: Path, model: str) -> Path:
    """Where the hub's cache has the twin of ``model``."""
    return hub / f"models--{model.replace('/', '--')}" / "snapshots" / COMMIT


def settings(model: str) -> dict[str, Any]:
    """The configuration of the twin of ``model``, but for its tokens."""
    real = model_facts.table()[model]
    square = real["heads"] * real["head_dim"] == real["hidden_size"]
    small = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": max(1, HEADS * real["kv_heads"] // real["heads"]),
        "head_dim": WIDTH // HEADS * (1 if square else 2), "max_position_embeddings": 1024,
        "tie_word_embeddings": real["tied"],
    }  # fmt: skip
    own = [more for beginning, more in PARTICULARS.items() if model.startswith(beginning)]
    return small | (own[0] if own else {})


def shapes(config: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The shapes of a twin of this ``config.json``, named as in the launcher's table of models."""
    found = {
        "model_type": config["model_type"], "hidden_size": WIDTH, "layers": LAYERS, "vocab": vocabulary,
        "heads": HEADS, "kv_heads": config["num_key_value_heads"], "head_dim": config["head_dim"],
        "intermediate": config.get("moe_intermediate_size", 2 * WIDTH), "tied": config["tie_word_embeddings"],
    }  # fmt: skip
    return found | ({"experts": config["num_local_experts"]} if "num_local_experts" in config else {})


def make(hub: Path, model: str) -> None:
    """Save the twin of ``model`` in the cache ``hub``, its weights in bf16 as the real one's are."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    speaks, folder = tongue(model), snapshot(hub, model)
    tokenizer = train_tokenizer(list(speaks.specials), bos_token=speaks.bos, eos_token=speaks.eos)
    tokenizer.chat_template = speaks.template
    ids = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }  # fmt: skip
    set_seed(0)
    config = AutoConfig.for_model(model_facts.table()[model]["model_type"], **settings(model), **ids)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ref = folder.parents[1] / "refs" / "main"
    ref.parent.mkdir()
    ref.write_text(COMMIT)


def main(argv: list[str]) -> int:
    """``HUB MODEL``: make one twin."""
    make(Path(argv[0]), argv[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
