"""Loading under ZeRO-3: no rank holds the whole model."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import make_documents, make_spec, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

pytestmark = pytest.mark.slow


def anonymous() -> int:
    """This process's own resident memory in bytes: mapped files, which the kernel can drop, do not count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load_and_measure(argv: list[str]) -> int:
    """Run on each rank: load the model, writing how much memory that took at its worst."""
    from galley.data.prepared import read_manifest
    from galley.model import model
    from galley.ranks.world import join

    run = RunDir(Path(argv[0]).parent)
    spec = RunSpec.read(argv[0])
    world = join(spec.placement)
    before, worst, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal worst
        while not done.is_set():
            worst = max(worst, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded: Any = model.load(spec, read_manifest(run), world.device)
    done.set()
    watcher.join()
    own = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in loaded.parameters() if hasattr(p, "ds_tensor"))
    (run.root / f"memory-{world.rank}.json").write_text(json.dumps({"peak": worst - before, "own": own}))
    return 0


def load_and_compare(argv: list[str]) -> int:
    """Run on each rank: what is loaded under ZeRO-3 is what plain transformers loads, buffers too, in its precision."""
    import deepspeed
    import torch

    from galley.data.prepared import read_manifest
    from galley.model import model
    from galley.ranks.world import join

    run = RunDir(Path(argv[0]).parent)
    spec = RunSpec.read(argv[0])
    world = join(spec.placement)
    loaded: Any = model.load(spec, read_manifest(run), world.device)
    plain = model.load_plain(spec.task.model.path, spec.task.model, model.DTYPES[spec.task.model.dtype])
    buffers = dict(loaded.named_buffers())
    assert set(buffers) == {name for name, _ in plain.named_buffers()}
    for name, buffer in plain.named_buffers():
        assert buffers[name].dtype == buffer.dtype, name
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0, msg=name)
    for name, parameter in loaded.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            torch.testing.assert_close(parameter.float(), plain.get_parameter(name).float(), rtol=0, atol=0, msg=name)
    (run.root / f"compared-{world.rank}").write_text(" ".join(sorted(buffers)))
    return 0


BUFFERS = {
    "gemma4_text": ({"hidden_size_per_layer_input": 0, "global_head_dim": 16}, "model.layers.0.layer_scalar"),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, "rotary_emb.inv_freq"),
    "glm4_moe": (
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ),
    "llama": ({"tie_word_embeddings": True}, "rotary_emb.inv_freq"),
}
"""Kind to its particulars, and a buffer that it must have: in its files or computed, stored as named or converted."""


@pytest.mark.parametrize("kind", list(BUFFERS))
def test_buffers_and_weights_are_those_of_the_files(tmp_path: Path, ranks: Ranks, kind: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from train.test_families import SIZES
    from transformers import AutoConfig, AutoModelForCausalLM

    particulars, named = BUFFERS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, head_dim=16, **particulars)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name in made.state_dict():
            if "scalar" in name or "bias" in name:
                made.get_parameter_or_buffer(name).copy_(torch.rand(made.state_dict()[name].shape) + 0.5)
    made.save_pretrained(tmp_path / "model")
    if kind == "llama":  # the head alone, of which transformers makes the embedding
        weights = tmp_path / "model" / "model.safetensors"
        tensors = load_file(weights)
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, weights, {"format": "pt"})
    run = RunDir(tmp_path / "run")
    make_spec(run, tmp_path / "model", method="full", stage=3, world=2, dtype="bfloat16")
    write_data(run, tmp_path / "model", [[document] for document in make_documents(8)], None, packed=False)
    statuses = ranks.run("test_sharded:load_and_compare", [str(run.spec)], 2, tmp_path / "log")
    assert statuses == [0, 0], (tmp_path / "log").read_text()
    for rank in range(2):
        assert named in (run.root / f"compared-{rank}").read_text()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_rank_reads_only_its_own_slice(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks, big_model: Path, method: str
) -> None:
    shards = sorted(big_model.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    assert len(shards) == 4
    run = RunDir(tmp_path)
    make_spec(run, big_model, method=method, stage=3, world=2, dtype="bfloat16")
    write_data(run, big_model, [[document] for document in make_documents(8)], None, packed=False)
    assert ranks.run("test_sharded:load_and_measure", [str(run.spec)], 2, tmp_path / "log") == [0, 0], (
        tmp_path / "log"
    ).read_text()
    for rank in range(2):
        found = json.loads((tmp_path / f"memory-{rank}.json").read_text())
        print(f"{method}, rank {rank}: peak {found['peak'] / size:.2f} of the model's size", file=sys.stderr)
        assert 0.45 * size < found["own"] < 0.55 * size
        assert found["peak"] < 0.6 * size


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 500 MB in four shards: big enough that what libraries allocate on the side does not count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("big")
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(
            vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16,
            num_key_value_heads=8, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="130MB")
    finally:
        torch.set_default_dtype(torch.float32)
    return folder
