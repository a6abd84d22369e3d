"""What ``all-linear`` means: every linear layer that peft can adapt and that text passes through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from train.test_families import SIZES

from galley.contract.errors import UserError
from galley.contract.spec import Method
from galley.model.adapter import attach_adapter, fused_experts, left_out, missed
from galley.model.linear import all_linear

VISION = {
    "gemma3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 28, "patch_size": 14},
    "qwen3_vl": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
                 "deepstack_visual_indexes": [0]},
    "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
                   "fullatt_block_indexes": [0]},
    "mistral3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "image_size": 28, "patch_size": 14, "head_dim": 16},
}  # fmt: skip
TOWERS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen3_vl": ["model.visual"],
    "qwen2_5_vl": ["model.visual"],
    "mistral3": ["model.vision_tower", "model.multi_modal_projector"],
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXTS: dict[str, dict[str, Any]] = {
    "gemma3": {"head_dim": 16, "sliding_window": 16},
    "qwen3_vl": {"head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
    "qwen2_5_vl": {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}},
    "mistral3": {"model_type": "mistral", "head_dim": 16},
}


def seeing(kind: str) -> Any:
    """A small vision-language model of ``kind``."""
    import torch
    from transformers import AutoConfig

    from galley.model.towers import auto_class

    torch.manual_seed(0)
    more = {"image_token_id": 5, "image_token_index": 5, "vision_start_token_id": 6, "video_token_id": 7}
    config = AutoConfig.for_model(kind, text_config=SIZES | TEXTS[kind], vision_config=VISION[kind], **more)
    return auto_class(config).from_config(config)


def make(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | settings))


def attach(model: Any, **method: Any) -> Any:
    manifest: Any = SimpleNamespace(model=SimpleNamespace(added_token_ids=[], source="x"))
    return attach_adapter(model, Method(rank=2, **method), manifest)


def adapted(wrapped: Any) -> set[str]:
    """Names of the layers that have an adapter."""
    return {
        name.removeprefix("base_model.model.") for name, module in wrapped.named_modules() if hasattr(module, "lora_A")
    }


EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OTHER = "they compute something else than a linear layer, which peft cannot wrap"
LEFT_OUT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama4_text": (
        {"head_dim": 16, "intermediate_size_mlp": 64, "moe_layers": [1], **EXPERTS},
        [f"no adapter on 1 x feed_forward.router: {OTHER}"],
    ),
    "phimoe": (
        {**EXPERTS, "num_experts_per_tok": 2},
        [f"no adapter on 2 x mlp.router: {OTHER}"],
    ),
    "mamba": (
        {"state_size": 4, "intermediate_size": 128, "time_step_rank": 4},
        [
            "no adapter on 2 x mixer.x_proj, 2 x mixer.dt_proj, 2 x mixer.out_proj: "
            "Mamba's kernels use these matrices without calling the layers"
        ],
    ),
    "qwen3_next": (
        {
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        [],
    ),
    "llama": ({}, []),
    "falcon": ({}, []),
}


SHARED = {f"model.layers.{n}.mlp.shared_expert.{which}_proj" for n in (0, 1) for which in ("gate", "up", "down")}
LOST = (
    "no adapter on 2 x mlp.shared_expert.gate_proj, 2 x mlp.shared_expert.up_proj, 2 x mlp.shared_expert.down_proj: "
    "peft takes their names for those of the experts"
)


@pytest.mark.parametrize("kind", list(LEFT_OUT))
def test_what_peft_cannot_adapt_is_left_out_and_said(kind: str) -> None:
    import torch

    settings, lines = LEFT_OUT[kind]
    model = make(kind, **settings)
    wanted, without = all_linear(model)
    assert left_out(model, Method()) == lines
    assert set(wanted) | set(without) == {
        name for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }  # fmt: skip
    wrapped = attach(model)
    lost = missed(model, Method())
    assert set(wanted) - adapted(wrapped) == (set() if kind != "qwen3_next" else SHARED)
    assert lost == ([] if kind != "qwen3_next" else [LOST])
    assert not adapted(wrapped) & set(without)
    tokens = torch.randint(2, 256, (1, 9))
    wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert all(each.grad is not None for name, each in wrapped.named_parameters() if each.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj", "down_proj"]])
@pytest.mark.parametrize("kind", list(VISION))
def test_no_adapter_reaches_a_tower(kind: str, targets: Any) -> None:
    import torch

    model = seeing(kind)
    lines = left_out(model, Method(targets=targets))
    wrapped = attach(model, targets=targets)
    found = adapted(wrapped)
    assert found
    assert all("language_model" in name for name in found)
    if targets == "all-linear":
        assert len(lines) == 1
        assert lines[0].endswith("text does not pass through them")
    tokens = torch.randint(8, 256, (1, 9))
    more = {"token_type_ids": torch.zeros_like(tokens)} if kind == "gemma3" else {}
    wrapped(input_ids=tokens, labels=tokens, use_cache=False, **more).loss.backward()
    assert all(each.grad is not None for name, each in wrapped.named_parameters() if each.requires_grad)


@pytest.mark.parametrize("kind", list(VISION))
def test_an_unused_tower_is_frozen(kind: str) -> None:
    from galley.model.towers import freeze_unused, unused_by_text

    model = seeing(kind)
    assert unused_by_text(model) == TOWERS[kind]
    assert fused_experts(model) == []
    said = freeze_unused(model)
    assert said is not None
    assert said.endswith(", ".join(TOWERS[kind]))
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(tuple(TOWERS[kind]))}


def test_a_text_model_has_no_tower() -> None:
    from galley.model.towers import freeze_unused

    model = make("llama")
    assert freeze_unused(model) is None
    assert all(each.requires_grad for each in model.parameters())


def test_an_architecture_without_linear_layers_is_refused() -> None:
    class Bare:
        config = SimpleNamespace(model_type="bare")

        def named_modules(self) -> list[Any]:
            return []

        def get_output_embeddings(self) -> None:
            return None

    from galley.model.adapter import _linear

    with pytest.raises(UserError, match=r"method.targets: a bare model has no linear layer that peft can adapt"):
        _linear(Bare())
