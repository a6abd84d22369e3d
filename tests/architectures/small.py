"""A small configuration of each causal architecture that the installed transformers knows."""

from __future__ import annotations

from typing import Any

WIDE = 240_000_000
"""Parameters beyond which a twin is made by its settings in ``PARTICULARS``."""
HEADS: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "num_hidden_layers": 2,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
PARTICULARS: dict[str, dict[str, Any]] = {
    "blenderbot": {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4},
    "codegen": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_ctx": 512, "n_positions": 512, "rotary_dim": 8},
    "deepseek_v2": {**HEADS, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {**HEADS, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "n_group": 1,
              "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**HEADS, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {**HEADS, "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 32, "num_dense_layers": 1},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16,
               "n_groups": 1},
    "ministral": HEADS,
    "nemotron": HEADS,
    "plbart": {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
               "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96},
    "prophetnet": {"hidden_size": 64, "num_decoder_layers": 2, "num_encoder_layers": 2,
                   "num_decoder_attention_heads": 4},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32]},
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96},
    "whisper": {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
                "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96},
    "xlstm": {"hidden_size": 64, "num_heads": 4, "num_blocks": 2},
}  # fmt: skip
"""What makes a small model where the family's default configuration, shrunken, makes none."""


def make(kind: str, vocabulary: int, **tokens: int) -> Any:
    """The configuration of a model of ``kind`` with ``vocabulary`` tokens."""
    from transformers import CONFIG_MAPPING

    from galley.prepare.isolation import shrink

    config = CONFIG_MAPPING[kind](**PARTICULARS.get(kind, {}))
    small = config if kind in PARTICULARS else shrink(config)
    text = small.get_text_config()
    for part in {id(each): each for each in (small, text)}.values():
        part.vocab_size, part.initializer_range = vocabulary, 0.02
        for name, value in tokens.items():
            setattr(part, name, value)
    if getattr(text, "vocab_size_per_layer_input", None):
        text.vocab_size_per_layer_input = vocabulary
    return small
