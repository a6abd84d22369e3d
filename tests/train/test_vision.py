"""Vision-language checkpoints as text models: what text does not pass through stays and is exported as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, write_data, write_tokenizer
from train.test_targets import TOWERS, seeing

from galley.contract.rundir import RunDir

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(16)]
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def save(kind: str, folder: Path) -> Path:
    seeing(kind).save_pretrained(folder)
    for name in PROCESSORS:
        (folder / name).write_text(json.dumps({"image_processor_type": "AnyImageProcessor", "name": name}))
    return folder


@pytest.mark.parametrize(
    ("kind", "method", "stage"),
    [("qwen2_5_vl", "lora", 2), ("qwen3_vl", "full", 2), ("mistral3", "full", 3), ("gemma3", "lora", 3)],
)
def test_text_is_trained_and_the_tower_is_exported_as_it_was(
    tmp_path: Path, ranks: Ranks, train: Train, kind: str, method: str, stage: int
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from galley.model.towers import auto_class

    model = save(kind, tmp_path / "model")
    run = RunDir(tmp_path / "run")
    optimizer = {"lr": 3e-3, "weight_decay": 0.5}
    spec = make_spec(
        run, model, method=method, stage=stage, world=2, steps=4, dtype="bfloat16", task={"optimizer": optimizer}
    )
    write_data(run, model, SAMPLES, None, packed=False)
    write_tokenizer(run.data / "tokenizer")
    train(run, spec)
    losses = metrics(run)
    assert sum(losses[2:]) < sum(losses[:2]), "the second epoch's, of the same documents"
    log = run.attempt(1).log("rank-0").read_text()
    assert "not trained, for text does not pass through them: " in log
    assert ", ".join(TOWERS[kind]) in log
    status = ranks.run("galley.export.export:main", [str(run.spec)], 1, tmp_path / "export.log")
    assert status == [0], (tmp_path / "export.log").read_text()
    for name in PROCESSORS:
        assert (run.export / "model" / name).read_text() == (model / name).read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run.export / "model"))
    assert set(before) == set(after), "the hub's names"
    seen = [name for name in before if "visual" in name or "vision" in name or "projector" in name]
    assert seen
    assert all(after[name].equal(before[name].to(after[name].dtype)) for name in seen)
    assert any(not after[name].equal(before[name].to(after[name].dtype)) for name in set(before) - set(seen))
    config = AutoConfig.from_pretrained(run.export / "model")
    assert type(auto_class(config).from_pretrained(run.export / "model")).__name__.endswith("ForConditionalGeneration")
    if method == "lora":
        names = load_file(run.export / "adapter" / "adapter_model.safetensors")
        assert all("language_model" in name for name in names)


def test_activation_checkpointing_that_the_architecture_lacks_names_the_setting(tmp_path: Path, ranks: Ranks) -> None:
    import torch
    from train.test_families import SIZES
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("ctrl", vocab_size=256, n_embd=64, n_layer=2, n_head=4, dff=64, n_positions=64)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(SIZES | raw))
    run = RunDir(tmp_path / "run")
    attention = {"model": {"path": str(tmp_path / "model"), "dtype": "float32", "attention": "eager"}}
    make_spec(run, tmp_path / "model", method="full", checkpointing=True, task=attention)
    write_data(run, tmp_path / "model", SAMPLES, None, packed=False)
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [2], (
        tmp_path / "log"
    ).read_text()
    message = run.attempt(1).errors()[0]["message"]
    assert message == (
        "activation_checkpointing: transformers has no activation checkpointing for a ctrl model; "
        "use activation_checkpointing=false"
    )
