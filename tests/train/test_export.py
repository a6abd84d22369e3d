"""What is exported is what was trained, by the numbers, and anybody's libraries can load it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from ranks import Ranks
from toy import Train, make_documents, make_spec, write_data, write_tokenizer

from galley.contract.errors import UserError
from galley.contract.rundir import UNVERIFIED, RunDir
from galley.export.export import choose

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(24)]
TOKENS = torch.tensor([SAMPLES[0][0][0]])


def trained_run(root: Path, model: Path, train: Train, **settings: Any) -> RunDir:
    run = RunDir(root)
    spec = make_spec(run, model, **{"steps": 6, "cadence": {"save_every": 2, "keep": 3}} | settings)
    write_data(run, model, SAMPLES, SAMPLES[:5], packed=False)
    write_tokenizer(run.data / "tokenizer")
    train(run, spec)
    return run


def export(ranks: Ranks, run: RunDir, step: str = "last") -> int:
    env = {"GALLEY_EXPORT_STEP": step}
    return ranks.run("galley.export.export:main", [str(run.spec)], 1, run.root / "export.log", env)[0]


@pytest.mark.parametrize(
    ("method", "stage", "dtype", "world"),
    [
        ("full", 0, "float32", 1), ("full", 3, "bfloat16", 2), ("full", 2, "bfloat16", 2), ("full", 0, "bfloat16", 1),
        ("lora", 3, "bfloat16", 2), ("lora", 2, "float32", 1), ("qlora", 2, "bfloat16", 1), ("qlora", 3, "float32", 2),
    ],
)  # fmt: skip
def test_an_export_computes_what_was_trained(
    tmp_path: Path, llama: Path, ranks: Ranks, train: Train, method: str, stage: int, dtype: str, world: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained_run(tmp_path, llama, train, method=method, stage=stage, dtype=dtype, world=world)
    assert export(ranks, run) == 0, (run.root / "export.log").read_text()
    facts = json.loads((run.export / "export.json").read_text())
    assert [check["what"] for check in facts["checks"]] == (
        ["model"] if method == "full" else ["adapter", "model (merged)"]
    )
    assert all(check["verified"] and check["difference"] <= check["tolerance"] for check in facts["checks"])
    assert all(check["largest"] == 0 and check["tensors"] >= 20 for check in facts["checks"])
    assert not run.unverified.exists()
    model = AutoModelForCausalLM.from_pretrained(run.export / "model")
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=model.dtype)
    assert str(model.dtype) == f"torch.{dtype}"
    assert not hasattr(model.config, "quantization_config")
    assert (model(TOKENS).logits - base(TOKENS).logits).abs().max() > 0.05, "the base, unchanged"
    assert AutoTokenizer.from_pretrained(run.export / "model").eos_token == "w1"
    assert "loss on assistant tokens only" in (run.export / "model" / "README.md").read_text()
    assert (run.export / "model" / "generation_config.json").exists()


def test_the_adapter_loads_with_peft_on_the_base(tmp_path: Path, llama: Path, ranks: Ranks, train: Train) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained_run(tmp_path, llama, train, method="lora", stage=2, world=2)
    assert export(ranks, run) == 0
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), run.export / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run.export / "model")
    torch.testing.assert_close(with_adapter(TOKENS).logits, merged(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert {path.name for path in (run.export / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md",
    }  # fmt: skip


def test_a_sharded_base_keeps_its_files_and_its_index(tmp_path: Path, ranks: Ranks, train: Train) -> None:
    from transformers import AutoModelForCausalLM

    model = toy.make_model(tmp_path / "plain", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    run = trained_run(tmp_path / "run", tmp_path / "shards", train, stage=3, world=2)
    assert export(ranks, run) == 0
    names = {path.name for path in (tmp_path / "shards").glob("*.safetensors*")}
    assert len(names) > 2
    assert {path.name for path in (run.export / "model").glob("*.safetensors*")} == names


def test_steps_to_choose_from(tmp_path: Path, llama: Path, ranks: Ranks, train: Train) -> None:
    run = trained_run(tmp_path, llama, train, method="lora", cadence={"eval_every": 2, "keep": 3})
    assert [each.step for each in run.checkpoints()] == [2, 4, 6]
    assert choose(run, "last").step == 6
    assert choose(run, "2").step == 2
    losses = toy.metrics(run, "held_out_loss")
    assert choose(run, "best").step == 2 * (losses.index(min(losses)) + 1)
    for wrong in ("3", "newest"):
        with pytest.raises(UserError, match="use last, or one of 2, 4, 6"):
            choose(run, wrong)
    assert export(ranks, run, "2") == 0
    assert json.loads((run.export / "export.json").read_text())["step"] == 2


def test_an_export_that_differs_is_not_claimed_but_kept(
    tmp_path: Path, llama: Path, ranks: Ranks, train: Train
) -> None:
    """As if training had computed something else than what its checkpoint says."""
    from safetensors.torch import load_file, save_file

    run = trained_run(tmp_path, llama, train, method="lora")
    assert export(ranks, run) == 0
    path = run.checkpoints()[-1].root / "probes.safetensors"
    probes = load_file(path)
    probes["logits"] = probes["logits"].roll(1, dims=-1)
    save_file(probes, path)
    toy.reseal(run.checkpoints()[-1])
    assert export(ranks, run) == UNVERIFIED
    error = run.attempt(1).errors()[0]
    assert error["status"] == UNVERIFIED
    assert "its logits are not those of the trained model" in error["message"]
    assert str(run.unverified) in error["message"]
    assert (run.export / "model").exists(), "the earlier export, which was verified, stays"
    for part in ("adapter", "model"):
        card = (run.unverified / part / "README.md").read_text()
        assert "**Not verified.**" in card
        assert "its logits are not those of the trained model" in card
        assert str(run.unverified / part) in card
        execute(card)
    probes["logits"] = probes["logits"].roll(-1, dims=-1)
    save_file(probes, path)
    toy.reseal(run.checkpoints()[-1])
    assert export(ranks, run) == 0
    assert not run.unverified.exists()


def execute(card: str) -> dict[str, Any]:
    """Run the lines that a card gives for loading and generating; returns what they define."""
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(lines, "README.md", "exec"), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    return names


def test_the_lines_of_both_cards_load_and_generate(tmp_path: Path, llama: Path, ranks: Ranks, train: Train) -> None:
    run = trained_run(tmp_path, llama, train, method="lora")
    assert export(ranks, run) == 0
    adapter, merged = ((run.export / part / "README.md").read_text() for part in ("adapter", "model"))
    assert "library_name: peft" in adapter
    assert "the adapter alone" in adapter
    assert "library_name: transformers" in merged
    assert "it is no adapter" in merged
    assert "base_model:" not in adapter + merged, "a path is no model on a hub"
    first, second = execute(adapter), execute(merged)
    assert type(first["model"]).__name__ == "PeftModelForCausalLM"
    assert type(second["model"]).__name__ == "LlamaForCausalLM"
    tokens = TOKENS[:, :4]
    torch.testing.assert_close(first["model"](tokens).logits, second["model"](tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_full_models_card_says_how_to_use_it(tmp_path: Path, llama: Path, ranks: Ranks, train: Train) -> None:
    run = trained_run(tmp_path, llama, train, method="full", dtype="bfloat16")
    tokenizer = run.data / "tokenizer" / "tokenizer_config.json"
    template = "{% for message in messages %}w7 {{ message.content }}{% endfor %}w8"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": template}))
    assert export(ranks, run) == 0
    card = (run.export / "model" / "README.md").read_text()
    assert "apply_chat_template" in card
    assert "no adapter" not in card
    assert execute(card)["model"].dtype == torch.bfloat16


def test_an_export_onto_another_base_is_refused(tmp_path: Path, llama: Path, ranks: Ranks, train: Train) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    run = trained_run(tmp_path / "run", model, train, method="lora")
    toy.make_model(model, seed=1, tie_word_embeddings=True)
    assert export(ranks, run) == 2
    assert "changed since the run began" in run.attempt(1).errors()[0]["message"]
    assert not run.export.exists()
