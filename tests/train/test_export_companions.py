"""What an export carries beside its weights: the name of its base, generation settings, and tensors kept in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from safetensors.torch import load_file
from train.planted import Case, Exported, make_model, weights_of, write_weights

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import Manifest, read_manifest
from galley.export import bases
from galley.model import generation
from galley.prepare.convert import grow_embedding
from galley.storage.weights import fingerprint

pytestmark = pytest.mark.slow

SAMPLE = [[toy.make_documents(1)[0]]]


def a_run(root: Path, model: Path, found: str) -> tuple[RunSpec, Manifest, RunDir]:
    """A run whose model was found as ``found``, a path or a hub id, and lies in ``model``."""
    run = RunDir(root)
    spec = toy.make_spec(run, model, method="lora")
    toy.write_data(run, model, SAMPLE, None, packed=False)
    paths = spec.placement.paths.model_copy(update={"model": found})
    placement = spec.placement.model_copy(update={"paths": paths})
    return spec.model_copy(update={"placement": placement}), read_manifest(run), run


def test_the_base_of_an_adapter_can_be_loaded(tmp_path: Path) -> None:
    model = toy.make_model(tmp_path / "model")
    spec, manifest, run = a_run(tmp_path / "folder", model, str(model))
    named = bases.name_base(spec, manifest, run)
    assert (named.name, named.revision, named.hub_id) == (str(model), None, None)

    spec, manifest, run = a_run(tmp_path / "hub", model, "org/model")
    facts = manifest.model.model_copy(update={"revision": "7" * 40})
    named = bases.name_base(spec, manifest.model_copy(update={"model": facts}), run)
    assert (named.name, named.revision, named.hub_id) == ("org/model", "7" * 40, "org/model")


def test_the_base_of_a_gguf_outlives_the_cache(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    cached = toy.make_model(tmp_path / "cache" / "models" / "gguf-1")
    spec, manifest, run = a_run(tmp_path / "run", cached, str(tmp_path / "some.Q4_1.gguf"))
    for _ in range(2):  # an export may be made again
        named = bases.name_base(spec, manifest, run)
    assert named.name == str(run.base)
    assert "some.Q4_1.gguf" in named.note
    shutil.rmtree(tmp_path / "cache")
    assert AutoModelForCausalLM.from_pretrained(named.name).config.num_hidden_layers == 2


def test_a_base_that_cannot_be_linked_is_named_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    cached = toy.make_model(tmp_path / "cache" / "models" / "gguf-1")
    spec, manifest, run = a_run(tmp_path / "run", cached, str(tmp_path / "some.gguf"))
    monkeypatch.setattr(bases.os, "link", refuse)
    named = bases.name_base(spec, manifest, run)
    assert named.name == str(cached)
    assert "before the cache is cleared" in named.note
    assert not run.base.exists()
    assert not list(run.root.glob(".base*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9},  # without do_sample, as Llama 2 once had it
        {"do_sample": False, "top_k": 20, "temperature": 0.0},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
        {"pad_token_id": -1},
    ],
)
def test_generation_settings_that_transformers_will_not_save_are_carried_over(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    source = toy.make_model(tmp_path / "source")
    (source / generation.FILE).write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(source)
    loaded.generation_config.eos_token_id = [1, 5]
    with pytest.raises(ValueError, match="invalid"):
        loaded.save_pretrained(tmp_path / "refused")
    generation.save_model(loaded, tmp_path / "saved")
    generation.carry_over(source, tmp_path / "saved", [1, 5])
    assert json.loads((tmp_path / "saved" / generation.FILE).read_text()) == settings | {"eos_token_id": [1, 5]}
    assert "warning: generation_config.json is carried over" in capsys.readouterr().out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.generation_config.eos_token_id == [1, 5]

    grown = grow_embedding(source, fingerprint(source), ["<a>"], toy.VOCAB + 1, tmp_path / "cache", trust=False)
    assert json.loads((grown / generation.FILE).read_text()) == settings


def test_good_generation_settings_keep_their_end_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy.make_model(tmp_path / "source")
    (source / generation.FILE).write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    (tmp_path / "target").mkdir()
    generation.carry_over(source, tmp_path / "target", [1])
    written = json.loads((tmp_path / "target" / generation.FILE).read_text())
    assert (written["temperature"], written["do_sample"], written["eos_token_id"]) == (0.6, True, [1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_transformers_keeps_in_fp32_is_not_rounded(tmp_path: Path, method: str) -> None:
    case = Case("deepseek_v3 (fp32 buffers)", method, "bfloat16")
    base = weights_of(make_model(tmp_path / "base", case.architecture))
    (name,) = [name for name in base if name.endswith("e_score_correction_bias")]
    base[name] = torch.tensor([1.0, 1.0005, 1.001, 1.0015])
    assert len(set(base[name].to(torch.bfloat16).tolist())) == 1, "bf16 would make them one"
    write_weights(tmp_path / "base", base)
    made = Exported(tmp_path, case)
    assert all(check.verified for check in made.checks.values()), made.checks
    exported = weights_of(tmp_path / "export" / "model")
    assert exported[name].dtype == torch.float32
    assert torch.equal(exported[name], base[name])
    assert exported["lm_head.weight"].dtype == torch.bfloat16


def test_an_adapter_on_a_base_with_fewer_rows_loads_by_its_card(tmp_path: Path) -> None:
    """``AutoPeftModelForCausalLM`` gives the base the rows of the tokens that the adapter brings."""
    from peft import AutoPeftModelForCausalLM

    case = Case("meta-llama/Llama-3.2-1B-Instruct", "lora", "float32", added=(254, 255))
    made = Exported(tmp_path, case)
    folder = made.exporter.out / "adapter"
    toy.write_tokenizer(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    small = tmp_path / "small"
    shutil.copytree(tmp_path / "base", small)
    from transformers import AutoModelForCausalLM

    shrunk = AutoModelForCausalLM.from_pretrained(small)
    shrunk.resize_token_embeddings(254)
    shrunk.save_pretrained(small)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(small)}))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")
    rows = load_file(folder / "adapter_model.safetensors")
    (trained,) = [value for name, value in rows.items() if "trainable_tokens" in name]
    assert loaded.get_input_embeddings().weight.shape[0] == toy.VOCAB
    assert torch.equal(loaded.merge_and_unload().get_input_embeddings().weight[[254, 255]], trained.to(loaded.dtype))
