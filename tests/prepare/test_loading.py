"""What a checkpoint lacks, or has otherwise than its configuration says, is refused before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import rows, write_jsonl

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.model.loading import check_loading

Tensors = dict[str, Any]
Make = Callable[..., tuple[RunSpec, RunDir]]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
DOWN = "model.layers.1.mlp.down_proj.weight"


def save(folder: Path, kind: str, **settings: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return save(tmp_path_factory.mktemp("mixture"), "qwen3_moe", **experts)


def changed(source: Path, target: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy whose tensors went through ``change`` and whose config.json holds ``config`` too."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    known = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(known | config))
    return target


def without(*endings: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if not name.endswith(endings)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): each for name, each in tensors.items()}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{name}": each for name, each in tensors.items()}


def longer(*names: str, by: int = 8) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        import torch

        return tensors | {name: torch.cat([tensors[name], tensors[name][:by]]) for name in names}

    return change


def with_tensor(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    import torch

    return lambda tensors: tensors | {name: torch.ones(shape)}


def typed(name: str, dtype: str) -> Callable[[Tensors], Tensors]:
    import torch

    return lambda tensors: tensors | {name: tensors[name].to(getattr(torch, dtype))}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_loading(folder, trust=False)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def same(tensors: Tensors) -> Tensors:
    return tensors


ENDS = ("model.embed_tokens.weight", "lm_head.weight")
LACKING = [
    (prefixed("module."), {}, "lacks 21 of the 21 tensors of a LlamaForCausalLM: ", "its names begin with 'module.'"),
    (prefixed("_orig_mod."), {}, "lacks 21 of", "its names begin with '_orig_mod.'"),
    (without(DOWN), {}, f"lacks 1 of the 21 tensors of a LlamaForCausalLM: {DOWN}; ", "would be random"),
    (renamed("down_proj", "w2"), {}, "model.layers.1.mlp.down_proj.weight", "holds 2 that the model does not know"),
    (renamed(DOWN, "model.layers.1.mlp.down.weight"), {}, DOWN, "model.layers.1.mlp.down.weight"),
    (without("lm_head.weight"), {}, "lacks 1 of the 21 tensors", "tie_word_embeddings to true"),
    (without("embed_tokens.weight"), {}, "lacks 1 of", "model.embed_tokens.weight"),
    (without("embed_tokens.weight", "lm_head.weight"), {"tie_word_embeddings": True}, "lacks 2 of", "embed_tokens"),
    (same, {"num_hidden_layers": 3}, "lacks 9 of the 30 tensors", "model.layers.*.input_layernorm.weight"),
    (same, {"attention_bias": True}, "lacks 8 of", "self_attn.q_proj.bias"),
    (longer(*ENDS), {}, "lm_head.weight of '", "has 104 rows, and its config.json a vocab_size of 96; set"),
    (same, {"vocab_size": 64}, "lm_head.weight of", "has 96 rows, and its config.json a vocab_size of 64"),
    (same, {"intermediate_size": 24}, "6 tensors of", "have other shapes than its config.json says"),
    (typed(DOWN, "float8_e4m3fn"), {}, "already quantised", f"{DOWN} is stored as F8_E4M3"),
    (typed(DOWN, "int8"), {}, "already quantised", f"{DOWN} is stored as I8"),
    (
        same,
        {"architectures": ["LlamaForSequenceClassification"]},
        "not a language model",
        "LlamaForSequenceClassification",
    ),
    (with_tensor("score.weight", 2, 32), {}, "not a language model", "its files hold score.weight"),
    (with_tensor("v_head.summary.weight", 1, 32), {}, "not a language model", "its files hold v_head.summary.weight"),
    (with_tensor("model.layers.0.mlp.up_proj.lora_A.default.weight", 4, 32), {}, "not merged", "merge_and_unload"),
]


@pytest.mark.parametrize(("change", "config", "first", "then"), LACKING)
def test_what_the_checkpoint_lacks_is_named(
    llama: Path, tmp_path: Path, change: Any, config: Any, first: str, then: str
) -> None:
    line = refusal(changed(llama, tmp_path / "model", change, **config))
    assert line.startswith("model.path: ")
    assert first in line
    assert then in line


@pytest.mark.parametrize(
    ("change", "config", "named"),
    [
        (without("layers.1.mlp.experts.3.down_proj.weight"), {}, "model.layers.1.mlp.experts.down_proj [3, "),
        (without("layers.1.mlp.experts.3.up_proj.weight"), {}, "model.layers.1.mlp.experts.gate_up_proj do not fit"),
        (without("layers.0.mlp.gate.weight"), {}, "lacks 1 of the 25 tensors"),
        (same, {"num_local_experts": 8}, "have other shapes than its config.json says"),
    ],
)
def test_a_mixture_that_lacks_an_expert_is_refused(
    mixture: Path, tmp_path: Path, change: Any, config: Any, named: str
) -> None:
    assert named in refusal(changed(mixture, tmp_path / "model", change, **config))


def test_a_classifier_whose_head_is_its_embedding_is_refused(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **{**SIZES, "pad_token_id": 0}, tie_word_embeddings=True)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    assert "is not a language model: its files hold score.weight" in refusal(tmp_path / "model")


def test_what_is_whole_passes_and_what_is_not_used_is_counted(
    llama: Path, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = without("lm_head.weight")
    tied = changed(llama, tmp_path / "tied", one, tie_word_embeddings=True)
    reversed_ = changed(llama, tmp_path / "reversed", without("embed_tokens.weight"), tie_word_embeddings=True)
    bare = changed(
        llama, tmp_path / "bare", lambda tensors: renamed("model.", "")(one(tensors)), tie_word_embeddings=True
    )
    for folder in (llama, mixture, tied, reversed_, bare):
        assert check_loading(folder, trust=False) is not None
    assert capsys.readouterr() == ("", "")
    more = changed(llama, tmp_path / "more", with_tensor("model.mtp.weight", 3))
    assert check_loading(more, trust=False) is not None
    assert capsys.readouterr().out == (
        "warning: model.path: 1 tensors of its files are not used by LlamaForCausalLM: model.mtp.weight\n"
    )


def test_a_head_that_is_tied_and_yet_another_matrix_is_refused(llama: Path, tmp_path: Path) -> None:
    line = refusal(changed(llama, tmp_path / "model", same, tie_word_embeddings=True))
    assert "ties lm_head.weight to model.embed_tokens.weight, and its files hold two different matrices" in line
    assert "set tie_word_embeddings to false" in line
    equal = changed(
        llama,
        tmp_path / "equal",
        lambda tensors: tensors | {ENDS[1]: tensors[ENDS[0]].clone()},
        tie_word_embeddings=True,
    )
    assert check_loading(equal, trust=False) is not None
    rounded = changed(equal, tmp_path / "rounded", typed(ENDS[1], "bfloat16"))
    assert check_loading(rounded, trust=False) is not None, "the same matrix, once in less precision"


def test_buffers_count_as_weights(tmp_path: Path) -> None:
    gemma = save(tmp_path / "gemma", "gemma4_text", **{**SIZES, "hidden_size_per_layer_input": 0}, global_head_dim=8)
    line = refusal(changed(gemma, tmp_path / "model", without("layers.1.layer_scalar")))
    assert "lacks 1 of" in line
    assert "model.layers.1.layer_scalar" in line


FOLDERS = [
    ({"model.safetensors": "lfs", "tokenizer.json": "lfs"}, "holds git-LFS pointers", "run git lfs pull there"),
    ({"config.json": "lfs"}, "git-LFS pointers in the place of files: config.json", "run git lfs pull there"),
    ({"adapter_config.json": "{}"}, "holds an adapter_config.json beside the model", "merge the adapter first"),
]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000000\n"


@pytest.mark.parametrize(("files", "what", "todo"), FOLDERS)
def test_a_folder_that_is_not_what_it_seems(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Any, files: dict[str, str], what: str, todo: str
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for name, content in files.items():
        (folder / name).write_text(LFS if content == "lfs" else content)
    line = refused(make_run(folder, write_jsonl(tmp_path / "rows.jsonl", rows(4)))[1])
    assert what in line
    assert todo in line


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "deeper/model.safetensors", "", "..", 7, None, ["a"]]
)
def test_an_index_stays_in_its_folder(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Any, shard: Any
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refused(make_run(folder, write_jsonl(tmp_path / "rows.jsonl", rows(4)))[1])
    assert "as the file of a tensor, no file name of that folder; download the model again" in line


def test_preparation_refuses_what_the_checkpoint_lacks(
    make_run: Make, model_folder: Path, tmp_path: Path, refused: Any
) -> None:
    folder = changed(model_folder, tmp_path / "model", without(DOWN))
    line = refused(make_run(folder, write_jsonl(tmp_path / "rows.jsonl", rows(4)))[1])
    assert line.startswith(f"model.path: '{folder}' lacks 1 of the 21 tensors of a LlamaForCausalLM: {DOWN}")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads (5)"),
        ({"hidden_size": "wide"}, "transformers makes no "),
        ({"vocab_size": -4}, "transformers makes no "),
        ({"hidden_act": "sillu"}, "KeyError"),
        ({"rope_parameters": {"rope_type": "yarrn", "rope_theta": 1e4}}, "transformers makes no "),
    ],
)
def test_a_configuration_of_which_no_model_can_be_built(llama: Path, tmp_path: Path, config: Any, named: str) -> None:
    line = refusal(changed(llama, tmp_path / "model", same, **config))
    assert line.startswith("model.path: transformers makes no ")
    assert named in line
    assert line.endswith("give a text model whose config.json is complete")


def test_an_architecture_without_the_shapes_of_a_text_model(tmp_path: Path) -> None:
    from transformers import BltConfig

    BltConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert "transformers makes no blt of" in refusal(tmp_path)
