"""Valid inputs of every kind, small: a user's folder with recipes, profiles, JSONs, rows, models and runs."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import yaml

from galley.contract.rundir import RunDir

RECIPE: dict[str, Any] = {
    "about": "a valid recipe", "model": {"path": "model", "dtype": "bfloat16"},
    "data": {"path": "rows.jsonl", "held_out": 0.05, "max_length": 512},
    "method": {"kind": "lora", "rank": 16, "alpha": 32, "targets": "all-linear", "dropout": 0.0},
    "optimizer": {"name": "adamw", "lr": 2e-4, "betas": [0.9, 0.95], "clip": 1.0},
    "schedule": {"kind": "cosine", "warmup": 0.03}, "batch": {"samples": 16}, "duration": {"steps": 20},
    "cadence": {"eval_every": 5, "save_every": 5, "keep": 2}, "deepspeed": "zero2", "micro_batch": 2,
    "tracking": {"wandb": {"project": "p"}},
}  # fmt: skip
PROFILE: dict[str, Any] = {
    "about": "a valid profile", "partition": "gpu", "account": "me", "gpus_per_node": 4, "cores_per_rank": 8,
    "time": "12:00:00", "modules": ["cuda/12.8"], "venv": "/opt/venv", "variables": {"NCCL_DEBUG": "WARN"},
    "secrets": ["HF_TOKEN"], "interface": "ib0", "scratch": "/local", "attempts": 5, "exclude_hours": 2.5,
    "side": {"partition": "cpu", "cores": 4, "memory": "16G", "time": "1:00:00"}, "patience": {"step": 600},
    "directives": ["--mail-type=END"],
}  # fmt: skip
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "steps_per_print": 100,
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "reduce_bucket_size": "auto",
        "overlap_comm": "auto", "contiguous_gradients": True, "stage3_max_live_parameters": 1e9,
        "stage3_param_persistence_threshold": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]},
    {
        "messages": [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}},
            ]},
            {"role": "tool", "content": "rain"}, {"role": "assistant", "content": "Rain."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object",
        "properties": {}}}}],
    },
    {"messages": [{"role": "user", "content": "日本 🙂"}, {"role": "assistant", "content": "Ça va", "weight": 1}]},
]  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 288,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "hidden_act": "silu", "eos_token_id": 2,
}  # fmt: skip


def tensors() -> dict[str, list[int]]:
    """Names and shapes of a two-layer Llama of :data:`CONFIG`."""
    found = {"model.embed_tokens.weight": [288, 32], "model.norm.weight": [32], "lm_head.weight": [288, 32]}
    for layer in ("model.layers.0", "model.layers.1"):
        attention = {"q_proj": [32, 32], "k_proj": [16, 32], "v_proj": [16, 32], "o_proj": [32, 32]}
        mlp = {"gate_proj": [64, 32], "up_proj": [64, 32], "down_proj": [32, 64]}
        found |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        found |= {f"{layer}.{name}.weight": [32] for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of bfloat16 zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, size = end, 2
        for side in shape:
            size *= side
        end = begin + size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def gguf(path: Path) -> None:
    """A header of GGUF version 3 with the metadata that a Llama has, and no tensors."""

    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    tokens = [f"t{number}" for number in range(32)]
    array = struct.pack("<IQ", 8, len(tokens)) + b"".join(map(string, tokens))
    scores = struct.pack("<IQ", 6, len(tokens)) + struct.pack(f"<{len(tokens)}f", *([0.0] * len(tokens)))
    pairs = [
        ("general.architecture", 8, string("llama")), ("general.alignment", 4, struct.pack("<I", 32)),
        ("tokenizer.ggml.tokens", 9, array), ("tokenizer.ggml.scores", 9, scores),
        ("llama.embedding_length", 4, struct.pack("<I", 64)), ("llama.block_count", 4, struct.pack("<I", 2)),
        ("llama.rope.freq_base", 6, struct.pack("<f", 1e4)), ("general.name", 8, string("a name")),
    ]  # fmt: skip
    body = b"".join(string(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body)


def model(folder: Path) -> None:
    """A model folder whose weights are zeros, in two shards, with a tokenizer and a template."""
    folder.mkdir()
    shapes = tensors()
    names = sorted(shapes)
    for number, part in enumerate((names[:7], names[7:]), 1):
        safetensors(folder / f"model-0000{number}-of-00002.safetensors", {name: shapes[name] for name in part})
    index = {name: f"model-0000{1 if name in names[:7] else 2}-of-00002.safetensors" for name in names}
    put(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": index})
    put(folder / "config.json", CONFIG)
    put(folder / "generation_config.json", {"eos_token_id": [2], "do_sample": True, "temperature": 0.7})
    (folder / "tokenizer.json").write_text(_tokenizer())
    names_of = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    put(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names_of})
    (folder / "chat_template.jinja").write_text(TEMPLATE)


TEMPLATE = """{%- macro turn(message) -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<|im_end|>
{% endmacro -%}
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for message in messages %}{{ turn(message) }}{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


def _tokenizer() -> str:
    """One token a byte, and three special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(other)) for byte in range(256)]
    special = ("<s>", "<|im_start|>", "<|im_end|>")
    added = [
        {"id": 256 + place, "content": word, "special": True, "normalized": False, "single_word": False,
        "lstrip": False,
         "rstrip": False}
        for place, word in enumerate(special)
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    body = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": {letter: place for place, letter in enumerate(letters)}, "merges": []},
    }  # fmt: skip
    return json.dumps(body)


def put(path: Path, body: object) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1))


def run(root: Path, spec: str, submitted: bool) -> None:
    """A run of two attempts that has a checkpoint; of one box, or of a cluster."""
    made = RunDir(root)
    root.mkdir(parents=True)
    body = json.loads(spec)
    body["name"], body["placement"]["paths"]["run"] = root.name, str(root)
    made.spec.write_text(json.dumps(body))
    rows = [
        {"step": step, "steps": 9, "loss": 3 - step / 9, "lr": 1e-4, "grad_norm": 0.5, "tokens": 100,
        "tokens_per_s": 50.5,
         "supervised_tokens": 40, "mfu": 0.3, "peak_memory_gb": 1.2, "step_s": 2.0, "left_s": 7.0}
        for step in range(1, 7)
    ]  # fmt: skip
    rows += [{"step": 6, "held_out_loss": 1.25}, {"step": 6, "stall_s": 0.4, "save_s": 1.0}]
    made.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (4, 6):
        checkpoint = made.checkpoint(step)
        checkpoint.root.mkdir(parents=True)
        safetensors(checkpoint.root / "rank-0.safetensors", {"w": [2, 2]})
        size = (checkpoint.root / "rank-0.safetensors").stat().st_size
        state = {"step": step, "tokens": 600, "held_out_loss": 1.25, "held_out_step": step}
        put(
            checkpoint.manifest,
            {"files": {"rank-0.safetensors": size}, "step": step, "world": 1, "zero_stage": 2, "held_out_loss": 1.25,
             "state": state},
        )  # fmt: skip
    _attempt(made, 1, {"verdict": "stopped", "reason": "user", "step": 4, "message": "", "status": 0}, submitted)
    last = {"verdict": "failed", "reason": "train", "step": 6, "message": "rank 0: RuntimeError: x", "status": 1}
    _attempt(
        made,
        2,
        last | ({"kind": "user", "again": False, "nodes": ["n1"], "ended": 1.7e9} if submitted else {}),
        submitted,
    )
    split = {"rows": 9, "samples": 9, "documents": 9, "tokens": 900, "supervised": 400, "longest": 100}
    facts = {
        "path": "/m",
        "source": "m",
        "fingerprint": "f",
        "parameters": 9,
        "vocab": 9,
        "hidden_size": 8,
        "layers": 2,
    }
    source = {"what": "data", "path": "/rows.jsonl", "size": 9, "mtime_ns": 1, "sha256": "abc"}
    put(
        made.data_manifest,
        {"schema": 1, "key": "k", "content": "c", "sources": [source], "packed": True, "max_length": 512,
        "train": split,
         "held_out": split, "model": facts, "template_hash": "t", "versions": {}},
    )  # fmt: skip
    put(made.export / "export.json", {"step": 6, "checks": [{"what": "model", "difference": 1e-3, "tolerance": 2e-2}]})
    put(made.tracker, {"id": "abc"})
    made.lock.write_text("pid 1, host here\n")
    made.ranks_lock.write_text("")
    if submitted:
        put(made.cluster, {"name": "site", "partition": "gpu", "time": "12:00:00", "attempts": 5, "limit_s": 3600})
        made.jobs.mkdir()
        jobs = [{"job": "101", "stage": "prepare", "time": 1.0}, {"job": "102", "stage": "train", "time": 2.0}]
        made.submitted.write_text("".join(json.dumps(row) + "\n" for row in jobs))
        put(made.excluded, {"n1": {"until": 2e9, "why": "a bad GPU"}})
        put(made.end, {"reason": "stop", "time": 1.0})
        (made.jobs / "logs").mkdir()
        (made.jobs / "logs" / "train-102.out").write_text("slurmstepd: error: *** JOB 102 ON n1 CANCELLED AT x ***\n")


def _attempt(made: RunDir, number: int, end: dict[str, Any], submitted: bool) -> None:
    attempt = made.attempt(number)
    put(attempt.placement, json.loads(made.spec.read_text())["placement"])
    put(attempt.exit, end)
    put(attempt.stop, {"reason": "user", "time": 1.0})
    attempt.logs.mkdir()
    for name in ("prepare", "train", "rank-0", "rank-1"):
        attempt.log(name).write_text(f"{name} says hello\nTraceback (most recent call last):\nRuntimeError: x\n")
    put(
        attempt.error("rank-0"), {"who": "rank-0", "status": 1, "message": "RuntimeError: x", "time": 5.0, "host": "n1"}
    )
    put(
        attempt.heartbeats / "rank-0.json", {"rank": 0, "pid": 9, "host": "n1", "phase": "step", "step": 6, "time": 5.0}
    )
    if submitted:
        put(attempt.job, {"job": f"10{number + 1}", "nodes": ["n1"], "ranks": 4, "checkpoint": 4, "started": 1.69e9})
        check = {"name": "gpu", "ok": False, "detail": "no GPU"}
        put(attempt.preflight / "n1.json", {"node": "n1", "ok": False, "checks": [check]})
        put(attempt.root / "hang-n1.json", {"node": "n1", "rank": 0, "phase": "step", "step": 6, "silent_s": 900})


def make(root: Path, spec: str) -> Path:
    """The whole folder; ``spec`` is the ``run.json`` of its runs."""
    (root / "recipes").mkdir(parents=True)
    (root / "mine.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (root / "recipes" / "child.yaml").write_text("# A child.\nextends: ../mine.yaml\noptimizer: {lr: 1e-4}\n")
    (root / "recipes" / "own.yaml").write_text("# Header.\n" + yaml.safe_dump(RECIPE, sort_keys=False))
    (root / "clusters").mkdir()
    (root / "clusters" / "site.yaml").write_text(yaml.safe_dump(PROFILE, sort_keys=False))
    put(root / "ds.json", DEEPSPEED)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "template.jinja").write_text(TEMPLATE)
    model(root / "model")
    gguf(root / "model.gguf")
    if spec:
        run(root / "runs" / "box", spec, submitted=False)
        run(root / "runs" / "good", spec, submitted=False)
        run(root / "runs" / "job", spec, submitted=True)
    return root


def victims(rng: random.Random, folder: Path, count: int) -> list[Path]:
    """Files, and now and then a folder, below ``folder``."""
    every = sorted(path for path in folder.rglob("*") if path.is_file() or rng.random() < 0.1)
    return rng.sample(every, min(count, len(every)))
