"""Small real runs: a two-layer Llama, synthetic prepared data, and a spec, without the control plane or a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from galley.contract.rundir import Checkpoint, RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import COLUMNS
from galley.data.prepared import Manifest, ModelFacts, SplitFacts
from galley.storage.weights import fingerprint

VOCAB = 256

Train = Callable[[RunDir, RunSpec], None]
"""The ``train`` fixture: train a run whose data and spec are written."""


def make_model(folder: Path, layers: int = 2, hidden: int = 64, seed: int = 0, **settings: Any) -> Path:
    """Save a small Llama with random weights; its tokenizer is not needed, for data come prepared."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        | settings
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


Document = tuple[list[int], int]
"""Tokens, and how many of them at the end are supervised."""


def make_documents(count: int, seed: int = 0, shortest: int = 4, longest: int = 24) -> list[Document]:
    """Documents of unequal length with a pattern to learn: each token follows from the one before."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        size = int(rng.integers(shortest, longest + 1))
        first = int(rng.integers(2, VOCAB))
        tokens = [(first + 7 * i) % (VOCAB - 2) + 2 for i in range(size)]
        documents.append((tokens, int(rng.integers(1, size))))
    return documents


def write_split(folder: Path, samples: list[list[Document]]) -> SplitFacts:
    """Write prepared samples, each of one or more documents."""
    arrays: dict[str, list[int]] = {name: [] for name in COLUMNS}
    arrays["samples"].append(0)
    for row, documents in enumerate(samples):
        supervised = 0
        for tokens, learnt in documents:
            arrays["documents"].append(len(arrays["tokens"]))
            arrays["sources"].append(row)
            arrays["tokens"] += tokens
            arrays["positions"] += range(len(tokens))
            arrays["labels"] += [-100] * (len(tokens) - learnt) + tokens[len(tokens) - learnt :]
            supervised += learnt
        arrays["supervised"].append(supervised)
        arrays["samples"].append(len(arrays["tokens"]))
    arrays["documents"].append(len(arrays["tokens"]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        COLUMNS[name].save(folder, np.array(values, np.int64))
    lengths = np.diff(arrays["samples"])
    return SplitFacts(
        rows=len(samples), samples=len(samples), documents=len(arrays["sources"]), tokens=len(arrays["tokens"]),
        supervised=sum(arrays["supervised"]), longest=int(lengths.max()),
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token for each id, for what an export copies and a generation needs."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1", pad_token="w0").save_pretrained(folder)


def count_parameters(model: Path) -> int:
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


def write_data(
    run: RunDir, model: Path, train: list[list[Document]], held_out: list[list[Document]] | None, packed: bool
) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= config.get("text_config", {})
    facts = ModelFacts(
        path=str(model), source=str(model), fingerprint=fingerprint(model), parameters=count_parameters(model),
        vocab=config["vocab_size"], hidden_size=config["hidden_size"], layers=config["num_hidden_layers"],
    )  # fmt: skip
    manifest = Manifest(
        schema=1, key="toy", content="toy", sources=[], packed=packed, max_length=512,
        train=write_split(run.data / "train", train),
        held_out=write_split(run.data / "held_out", held_out) if held_out else None,
        model=facts, template_hash="", versions={},
    )  # fmt: skip
    run.data_manifest.write_text(manifest.model_dump_json(by_alias=True))


def deepspeed_config(
    stage: int, dtype: str, micro: int, accumulation: int, world: int, offload: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 640, "stage3_prefetch_bucket_size": 4096}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    config: dict[str, Any] = {
        "train_batch_size": micro * accumulation * world, "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation, "zero_optimization": zero, "steps_per_print": 10**9,
    }  # fmt: skip
    if dtype == "bfloat16" and stage == 0:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif dtype == "float16":
        config |= {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def make_spec(
    run: RunDir, model: Path, *, method: str = "full", stage: int = 2, offload: bool = False, world: int = 1,
    dtype: str = "float32", samples: int = 8, micro: int = 2, steps: int = 6, packing: bool = False,
    checkpointing: bool = False, cadence: dict[str, Any] | None = None, duration: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None, profile: int = 0, compiled: bool = False,
    zero: dict[str, Any] | None = None,
) -> RunSpec:  # fmt: skip
    accumulation = samples // (micro * world)
    config = deepspeed_config(stage, dtype, micro, accumulation, world, offload)
    config["zero_optimization"] |= zero or {}
    spec = RunSpec.model_validate({
        "schema": 1, "name": run.root.name,
        "task": {
            "model": {"path": str(model), "dtype": dtype},
            "data": {"path": "toy.jsonl", "packing": packing, "max_length": 64},
            "method": {"kind": method, "rank": 4, "alpha": 8}, "batch": {"samples": samples},
            "optimizer": {"lr": 3e-3, "weight_decay": 0.1}, "duration": duration or {"steps": steps}, "seed": 7,
            "seeding": 2,
        } | (task or {}),
        "placement": {
            "device": "cpu", "ranks_per_node": world, "micro_batch": micro, "accumulation": accumulation, "threads": 1,
            "activation_checkpointing": checkpointing, "profile": profile, "compile": compiled,
            "deepspeed": config,
            "paths": {"run": str(run.root), "model": str(model), "data": "toy.jsonl", "cache": str(run.root / "cache")},
        },
        "cadence": cadence or {}, "origin": {"recipe": "toy", "version": "0"},
    })  # fmt: skip
    run.root.mkdir(parents=True, exist_ok=True)
    run.spec.write_text(spec.to_json())
    return spec


def metrics(run: RunDir, key: str = "loss") -> list[float]:
    """One value a step."""
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def rank_logs(run: RunDir) -> str:
    logs = sorted(run.root.glob("attempts/*/logs/rank-*.log"))
    return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs)


def write_data_sums(run: RunDir) -> None:
    """Checksums of prepared data in its manifest, as prepare leaves them."""
    from galley.data.prepared import read_manifest
    from galley.prepare.prepare import write_manifest
    from galley.storage.sums import of_folder

    found = {name: value for name, value in of_folder(run.data).items() if name != "manifest.json"}
    write_manifest(read_manifest(run).model_copy(update={"checksums": found}), run)


def reseal(checkpoint: Checkpoint) -> None:
    """Give a checkpoint that a test has changed the checksums that it would have had."""
    from galley.storage.sums import SEAL, crc32, seal

    manifest = json.loads(checkpoint.manifest.read_text())
    manifest["files"] = {name: (checkpoint.root / name).stat().st_size for name in manifest["files"]}
    manifest["checksums"] = {name: crc32(checkpoint.root / name) for name in manifest["files"]}
    checkpoint.manifest.write_text(json.dumps(manifest | {SEAL: seal(manifest)}))
