"""Ways to train beyond plain full fine-tuning, LoRA and QLoRA: each learns what a plain PyTorch loop learns, resumes to
the bit, and exports what was trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, write_data, write_tokenizer
from train.plain import plain_losses
from train.test_families import SIZES, save_model

from galley.contract.rundir import RunDir

SAMPLES = [[document] for document in make_documents(24)]
ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


def go(train: Train, root: Path, model: Path, **settings: Any) -> RunDir:
    run = RunDir(root)
    spec = make_spec(run, model, **{"steps": 4, "cadence": {"save_every": 2, "keep": 9}} | settings)
    if not run.data_manifest.exists():
        write_data(run, model, SAMPLES, None, packed=False)
        write_tokenizer(run.data / "tokenizer")
    train(run, spec)
    return run


def resumes_to_the_bit(train: Train, run: RunDir) -> None:
    """Throw the last half away, and go on from the first."""
    from galley.contract.spec import RunSpec

    keys = ("loss", "grad_norm", "lr")
    before = [metrics(run, key) for key in keys]
    shutil.rmtree(run.checkpoints()[-1].root)
    train(run, RunSpec.read(run.spec))
    assert "resuming after step 2" in run.attempt(1).log("rank-0").read_text()
    assert [metrics(run, key) for key in keys] == before


def exports(ranks: Ranks, run: RunDir) -> None:
    assert ranks.run("galley.export.export:main", [str(run.spec)], 1, run.root / "export.log") == [0], (
        run.root / "export.log"
    ).read_text()
    checks = json.loads((run.export / "export.json").read_text())["checks"]
    assert checks
    assert all(check["difference"] <= check["tolerance"] for check in checks)


def tolerance(dtype: str) -> float:
    return 1e-4 if dtype == "float32" else 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "method", "stage", "world", "dtype"),
    [
        ("untied", {"kind": "lora", "rslora": True}, 0, 1, "bfloat16"),
        ("untied", {"kind": "lora", "dora": True}, 2, 2, "float32"),
        ("untied", {"kind": "qlora", "dora": True}, 2, 1, "bfloat16"),
        ("untied", {"kind": "lora", "full_modules": ["lm_head"]}, 0, 1, "bfloat16"),
        ("untied", {"kind": "qlora", "full_modules": ["lm_head", "embed_tokens"]}, 3, 2, "bfloat16"),
        ("untied", {"kind": "lora_int8"}, 0, 1, "bfloat16"),
        ("untied", {"kind": "lora_int8"}, 2, 2, "float32"),
        ("mixture", {"kind": "lora", "targets": "all-linear+experts"}, 3, 2, "float32"),
        ("mixture", {"kind": "qlora", "targets": ["q_proj", "experts.down_proj"]}, 2, 2, "bfloat16"),
        ("untied", {"kind": "full", "freeze": ["model.embed_tokens.*", "*.layers.0.*"]}, 0, 1, "bfloat16"),
        ("untied", {"kind": "full", "freeze": ["model.embed_tokens.*", "*.layers.0.*"]}, 3, 2, "float32"),
    ],
    ids=["rslora", "dora", "qdora", "head", "qhead", "int8-0", "int8-2", "moe", "qmoe", "freeze0", "freeze3"],
)  # fmt: skip
def test_a_method_learns_what_a_plain_loop_learns(
    tmp_path: Path, ranks: Ranks, train: Train, request: pytest.FixtureRequest,
    base: str, method: dict[str, Any], stage: int, world: int, dtype: str,
) -> None:  # fmt: skip
    model: Path = request.getfixturevalue(base)
    settings: dict[str, Any] = {"dtype": dtype, "steps": 4, "task": {"method": ADAPTER | method}}
    run = go(train, tmp_path / "run", model, stage=stage, world=world, **settings)
    expected = plain_losses(tmp_path / "plain", model, SAMPLES, **settings)
    assert metrics(run) == pytest.approx(expected, rel=tolerance(dtype))
    assert metrics(run)[0] != pytest.approx(metrics(run)[-1], rel=1e-3), "nothing was learnt"
    resumes_to_the_bit(train, run)
    exports(ranks, run)
    if method["kind"] == "lora_int8":
        unquantised = plain_losses(tmp_path / "lora", model, SAMPLES, method="lora", dtype=dtype, steps=4)
        assert metrics(run) == pytest.approx(unquantised, rel=2e-2)
    if method["kind"] == "full":
        frozen_weights_are_whole_and_nowhere_else(run, model)


def frozen_weights_are_whole_and_nowhere_else(run: RunDir, model: Path) -> None:
    from safetensors.torch import load_file

    from galley.checkpoint.checkpoint import Reader

    before, after = (load_file(folder / "model.safetensors") for folder in (model, run.export / "model"))
    kept = {name for name in before if before[name].to(after[name].dtype).equal(after[name])}
    frozen = {name for name in before if "embed_tokens" in name or "layers.0." in name}
    assert set(after) == set(before)
    assert kept == frozen
    assert set(Reader(run.checkpoints()[-1]).names()) == set(before) - frozen


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world", "kind"), [(2, 2, "full"), (3, 1, "lora")])
def test_noise_on_embeddings_is_drawn_again_and_only_in_training(
    tmp_path: Path, ranks: Ranks, train: Train, untied: Path, stage: int, world: int, kind: str
) -> None:
    method = ADAPTER | {"kind": kind, "neftune": 30.0}
    settings: dict[str, Any] = {"stage": stage, "world": world, "task": {"method": method}}
    run = go(train, tmp_path / "run", untied, **settings)
    alone = settings | {"stage": 1, "world": 1}
    expected = plain_losses(tmp_path / "plain", untied, SAMPLES, ranks=world, steps=4, **alone)
    assert metrics(run) == pytest.approx(expected, rel=1e-4)
    quiet = plain_losses(tmp_path / "quiet", untied, SAMPLES, method=kind, steps=4)
    assert metrics(run) != pytest.approx(quiet, rel=1e-3), "no noise"
    resumes_to_the_bit(train, run)
    exports(ranks, run)  # what was measured on the probes had none


def test_each_token_knows_how_long_its_document_is(tmp_path: Path, llama: Path) -> None:
    import torch

    from galley.data.batches import NOBODY, collate
    from galley.data.columns import Split
    from galley.model.neftune import document_sizes

    documents = make_documents(6, seed=1)
    lengths = [len(tokens) for tokens, _ in documents]
    for packed, samples in ((True, [documents[:2], documents[2:5]]), (False, [[each] for each in documents])):
        write_data(RunDir(tmp_path / str(packed)), llama, samples, None, packed=packed)
        batch = collate(Split.open(tmp_path / str(packed) / "data/train"), [1, 0, NOBODY], packed, torch.device("cpu"))
        sizes = document_sizes(batch)
        assert sizes.shape == batch.tokens.shape
        parts = ([lengths[2:5], lengths[:2]]) if packed else [lengths[1:2], lengths[:1]]
        for row, part in enumerate(parts):
            assert sizes[row, : sum(part)].tolist() == [size for size in part for _ in range(size)]
        assert int(sizes.min()) >= 1


def attached(folder: Path, manifest_of: Path, **method: Any) -> Any:
    import torch

    from galley.contract.spec import Method, Model
    from galley.data.prepared import read_manifest
    from galley.model.adapter import attach_adapter
    from galley.model.model import load_plain

    write_data(RunDir(manifest_of), folder, SAMPLES, None, packed=False)
    base = load_plain(str(folder), Model(path=str(folder), attention="eager"), torch.float32)
    return attach_adapter(base, Method(**ADAPTER | method), read_manifest(RunDir(manifest_of)))


MIXTURES = ["MixtralConfig", "Qwen3MoeConfig", "OlmoeConfig", "GptOssConfig"]


def tiny_mixture(folder: Path, kind: str) -> Path:
    import transformers

    sizes = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = getattr(transformers, kind)(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_matrix_of_every_expert_gets_an_adapter_of_its_own(tmp_path: Path, kind: str) -> None:
    import torch

    from galley.model.adapter import experts_without

    wrapped = attached(tiny_mixture(tmp_path / "model", kind), tmp_path / "run", targets="all-linear+experts")
    found = [
        (name.split(".layers.")[1].split(".")[0], module.parameter_name)
        for name, module in wrapped.named_modules()
        if type(module).__name__ == "ParamWrapper" and "experts" in name
    ]
    assert sorted(found) == [(n, which) for n in ("0", "1") for which in ("down_proj", "gate_up_proj")]
    assert experts_without(wrapped) == []
    before = wrapped(torch.tensor([SAMPLES[0][0][0]])).logits
    for name, parameter in wrapped.named_parameters():
        if "experts" in name and "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(wrapped(torch.tensor([SAMPLES[0][0][0]])).logits, before, atol=1e-3)


def test_what_of_a_mixture_gets_no_adapter_is_known(tmp_path: Path) -> None:
    from galley.contract.errors import UserError
    from galley.model.adapter import experts_without

    folder = tiny_mixture(tmp_path / "oss", "GptOssConfig")
    left = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert experts_without(attached(folder, tmp_path / "a", targets="all-linear")) == left
    assert experts_without(attached(folder, tmp_path / "b", targets=["q_proj", "experts.down_proj"])) == left[1:]
    known = tiny_mixture(tmp_path / "mixtral", "MixtralConfig")
    assert experts_without(attached(known, tmp_path / "c", targets="all-linear")) == []
    assert experts_without(attached(known, tmp_path / "d", targets=["w1", "w2", "w3"])) == []
    for odd in ({"dropout": 0.1}, {"dora": True}):
        with pytest.raises(UserError, match="peft has neither DoRA nor dropout"):
            attached(known, tmp_path / "e", **odd)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"targets": ["q_prok"]}, "method.targets: the model has no 'q_prok'; did you mean 'q_proj'?"),
        ({"full_modules": ["lm_haed"]}, "method.full_modules: the model has no 'lm_haed'; did you mean 'lm_head'?"),
        ({"full_modules": ["lm_head"]}, "method.full_modules: 'lm_head' is tied: embedding and output head are one"),
        ({"full_modules": ["embed_tokens"]}, "peft would train two copies; leave it out, or use method.kind=full"),
    ],
)
def test_names_that_the_model_lacks_and_tied_matrices_are_refused(
    tmp_path: Path, llama: Path, method: dict[str, Any], message: str
) -> None:
    from galley.contract.errors import UserError

    with pytest.raises(UserError) as error:
        attached(llama, tmp_path, **method)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.embed_token.*"], "'model.embed_token.*' matches no weight; the nearest weight is 'model.embed_tokens"),
        (["*"], "['*'] leaves nothing to train; freeze less"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(llama: Path, patterns: list[str], message: str) -> None:
    import torch

    from galley.contract.errors import UserError
    from galley.contract.spec import Model
    from galley.model.adapter import freeze
    from galley.model.model import load_plain

    model = load_plain(str(llama), Model(path=str(llama)), torch.float32)
    with pytest.raises(UserError) as error:
        freeze(model, patterns)
    assert message in str(error.value)
    freeze(load_plain(str(llama), Model(path=str(llama)), torch.float32), ["lm_head.*"])  # tied: its second name
