"""Architectures and settings beyond a Llama: what works, works; what does not is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, write_data, write_tokenizer

from galley.contract.rundir import RunDir
from galley.data.prepared import read_manifest
from galley.prepare.convert import grow_embedding
from galley.storage.weights import fingerprint

pytestmark = pytest.mark.slow

PACKED = [make_documents(36)[i : i + 3] for i in range(0, 36, 3)]
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip


def save_model(folder: Path, kind: str) -> Path:
    import torch
    import transformers

    configs = {
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=16
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    }
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(configs[kind]()).save_pretrained(folder)
    return folder


def prepare(root: Path, model: Path, **settings: Any) -> tuple[RunDir, Any]:
    run = RunDir(root)
    spec = make_spec(run, model, steps=4, packing=True, **settings)
    write_data(run, model, PACKED, None, packed=True)
    write_tokenizer(run.data / "tokenizer")
    return run, spec


@pytest.mark.parametrize(
    ("kind", "method", "stage"),
    [
        ("qwen3", "full", 3), ("gemma3", "lora", 3), ("gemma3", "full", 2), ("qwen3_moe", "full", 3),
        ("qwen3_moe", "full", 2), ("qwen3_moe", "lora", 3), ("qwen3_moe", "qlora", 2),
    ],
)  # fmt: skip
def test_families_train_and_export(
    tmp_path: Path, ranks: Ranks, train: Train, kind: str, method: str, stage: int
) -> None:
    model = save_model(tmp_path / "model", kind)
    run, spec = prepare(tmp_path / "run", model, method=method, stage=stage, world=2, dtype="bfloat16")
    train(run, spec)
    losses = metrics(run)
    assert losses[-1] < losses[0] - 0.01
    status = ranks.run("galley.export.export:main", [str(run.spec)], 1, tmp_path / "export.log")
    assert status == [0], (tmp_path / "export.log").read_text()
    assert sorted(p.name for p in model.glob("*.safetensors")) == ["model.safetensors"]
    if kind == "qwen3_moe":
        from safetensors import safe_open

        with (
            safe_open(run.export / "model" / "model.safetensors", "pt") as exported,
            safe_open(model / "model.safetensors", "pt") as original,
        ):
            assert set(exported.keys()) == set(original.keys()), "the hub's names, so that other tools can load it"


def test_an_attention_that_the_architecture_lacks_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    model = save_model(tmp_path / "model", "gpt_oss")
    run, _ = prepare(tmp_path / "run", model, method="lora")
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [2]
    message = run.attempt(1).errors()[0]["message"]
    assert message.endswith("does not support 'sdpa'; use model.attention=eager")


def add_tokens(run: RunDir, ids: list[int], **more: str) -> None:
    manifest = read_manifest(run)
    added = {"added_tokens": [f"w{i}" for i in ids], "added_token_ids": ids}
    facts = manifest.model.model_copy(update=added | more)
    run.data_manifest.write_text(manifest.model_copy(update={"model": facts}).model_dump_json(by_alias=True))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_a_template_added_are_trained_beside_the_adapter(
    tmp_path: Path, ranks: Ranks, train: Train, tied: bool
) -> None:
    from safetensors.torch import load_file

    model = toy.make_model(tmp_path / "model", tie_word_embeddings=tied)
    run, spec = prepare(tmp_path / "run", model, method="lora", stage=2, world=2)
    added = PACKED[0][0][0][:3]
    add_tokens(run, added)
    train(run, spec)
    status = ranks.run("galley.export.export:main", [str(run.spec)], 1, tmp_path / "export.log")
    assert status == [0], (tmp_path / "export.log").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run.export / "model"))
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied):
        assert {i for i in range(256) if not before[name][i].equal(after[name][i])} == set(added), name


def test_an_adapter_with_added_tokens_loads_as_its_card_says(tmp_path: Path, ranks: Ranks, train: Train) -> None:
    """Its base, as the user has it, lacks their rows."""
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    base = toy.make_model(tmp_path / "base")
    grown = grow_embedding(base, fingerprint(base), ["w256", "w257"], 258, tmp_path / "cache", False)
    run, spec = prepare(tmp_path / "run", grown, method="lora")
    add_tokens(run, [256, 257], source=str(base))
    train(run, spec)
    status = ranks.run("galley.export.export:main", [str(run.spec)], 1, tmp_path / "export.log")
    assert status == [0], (tmp_path / "export.log").read_text()
    with safe_open(run.export / "adapter" / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert all(min(shape) <= 4 for shape in shapes), "two rows and matrices of rank 4, no whole embedding"
    assert "resize_token_embeddings(258)" in (run.export / "adapter" / "README.md").read_text()

    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(258)
    loaded = PeftModel.from_pretrained(plain, str(run.export / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(run.export / "model")
    tokens = torch.tensor([[256, 5, 6, 257]])
    torch.testing.assert_close(loaded(tokens).logits, merged(tokens).logits[..., :258], rtol=1e-4, atol=1e-4)


def test_tokens_beside_an_adapter_are_refused_under_zero_3(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run, _ = prepare(tmp_path / "run", llama, method="lora", stage=3)
    add_tokens(run, [5])
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [2]
    assert "use deepspeed=zero2, or method.kind=full" in run.attempt(1).errors()[0]["message"]


@pytest.mark.long
def test_zero_2_with_an_offloaded_optimizer_saves_and_resumes(tmp_path: Path, llama: Path, train: Train) -> None:
    losses = []
    for offload in (False, True):
        run, spec = prepare(tmp_path / f"offload-{offload}", llama, stage=2, world=2)
        zero = spec.placement.deepspeed["zero_optimization"]
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        for steps in (2, 4):
            longer = spec.task.model_copy(update={
                "duration": spec.task.duration.model_copy(update={"steps": steps}),
                "schedule": spec.task.schedule.model_copy(update={"kind": "constant", "warmup": 0.0}),
            })  # fmt: skip
            run.spec.write_text(spec.model_copy(update={"task": longer}).to_json())
            train(run, spec)
        losses.append(metrics(run))
    assert len(losses[1]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
