"""Every causal architecture that the installed transformers knows, as a small twin: prepare, LoRA, export.

``python tests/architectures/sweep.py RESULT.md [minutes]`` goes on where it stopped (``RESULT.md.jsonl`` has what is
known), and writes the table. It forks from one process that has imported everything. An architecture that Galley
cannot train must be refused in one line; a traceback is a failure, and the exit status 1.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src"), str(ROOT / "launch")]
os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

from prepare.conftest import CHATML, rows, train_tokenizer, write_jsonl  # noqa: E402
from ranks import Ranks  # noqa: E402

CACHE = Path(os.environ.get("GALLEY_CACHE") or Path(tempfile.gettempdir()) / f"galley-architectures-{os.getuid()}")
"""Where DeepSpeed's operators are compiled once, for all that is tried."""
STAGES = ("prepare", "train", "export")
PRELOAD = (
    "bitsandbytes", "galley.prepare.prepare", "galley.prepare.arrays", "galley.prepare.fetch",
    "galley.prepare.isolation", "galley.prepare.convert",
    "galley.model.loading", "prepare.conftest", "architectures.small", "recipes.bench",
)  # fmt: skip
Row = dict[str, Any]


def kinds() -> list[str]:
    """Model types that transformers has a causal language model, or one that sees and writes text, for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_twin(argv: list[str]) -> int:
    """``KIND FOLDER``: save a twin with random weights, and its tokenizer; 3 where transformers itself cannot."""
    import torch
    from architectures.small import WIDE, make

    from galley.model.towers import auto_class

    kind, folder = argv[0], Path(argv[1])
    tokenizer = train_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    try:
        config = make(kind, len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        with torch.device("meta"):
            size = sum(each.numel() for each in auto_class(config).from_config(config).parameters())
        if size > WIDE:
            raise ValueError(f"its twin has {size / 1e6:,.0f}M parameters")
        auto_class(config).from_config(config).save_pretrained(folder)
    except Exception as error:  # transformers' default configurations do not all make a model
        (folder / "no-twin").write_text(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}")
        return 3
    return 0


def write_spec(root: Path, model: Path, data: Path, attention: str) -> Path:
    """A run of two steps with LoRA on everything linear, under ZeRO-2 in bf16 on one CPU rank."""
    from galley.contract.spec import RunSpec

    run = root / "run"
    run.mkdir()
    paths = {"run": str(run), "model": str(model), "data": str(data), "cache": str(CACHE)}
    spec = {
        "schema": 1, "name": "sweep", "origin": {"recipe": "sweep", "version": "0"},
        "task": {
            "model": {"path": str(model), "attention": attention, "dtype": "bfloat16"},
            "data": {"path": str(data), "max_length": 128}, "method": {"kind": "lora", "rank": 4, "alpha": 8},
            "optimizer": {"lr": 1e-3}, "batch": {"samples": 2}, "duration": {"steps": 2},
        },
        "placement": {
            "device": "cpu", "activation_checkpointing": False, "micro_batch": 2, "paths": paths,
            "deepspeed": {
                "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "steps_per_print": 10**9,
                "data_types": {"grad_accum_dtype": "fp32"},
            },
        },
    }  # fmt: skip
    file = run / "run.json"
    file.write_text(RunSpec.model_validate(spec).to_json())
    return file


def last_word(run: Path, log: Path) -> str:
    """The line that says what went wrong: the recorded error's, else the log's last."""
    found = [json.loads(path.read_text())["message"] for path in sorted(run.glob("attempts/*/errors/*.json"))]
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return str(found[-1] if found else lines[-1] if lines else "nothing was said")


def try_one(ranks: Ranks, kind: str, root: Path) -> Row:
    """What became of one architecture."""
    began, model, log = time.monotonic(), root / "model", root / "log"
    model.mkdir()
    status = ranks.run("architectures.sweep:make_twin", [kind, str(model)], 1, log)[0]
    if status:
        note = model / "no-twin"
        why = note.read_text() if note.exists() else last_word(root, log)
        return {"kind": kind, "outcome": "no twin", "stage": "", "line": why, "seconds": time.monotonic() - began}
    data = write_jsonl(root / "rows.jsonl", rows(12))
    for attention in ("sdpa", "eager"):
        shutil.rmtree(root / "run", ignore_errors=True)
        row = _stages(ranks, write_spec(root, model, data, attention), log)
        if row["outcome"] != "refused" or "attention=eager" not in row["line"]:
            break
    return {"kind": kind, "attention": attention, **row, "seconds": time.monotonic() - began}


def _stages(ranks: Ranks, spec: Path, log: Path) -> Row:
    notes = []
    for stage in STAGES:
        log.unlink(missing_ok=True)
        call = "recipes.bench:prepare" if stage == "prepare" else f"galley.{stage}.{stage}:main"
        status = ranks.run(call, [str(spec)], 1, log)[0]
        everything = log.read_text(errors="replace") if log.exists() else ""
        everything += "".join(path.read_text() for path in spec.parent.glob("attempts/*/logs/rank-*.log"))
        notes += [line for line in everything.splitlines() if line.startswith(("warning: ", "no adapter on"))]
        if status:
            outcome = "refused" if status == 2 else "failed"
            return {"outcome": outcome, "stage": stage, "line": last_word(spec.parent, log), "log": everything[-3000:]}
    packed = json.loads((spec.parent / "data" / "manifest.json").read_text())["packed"]
    return {"outcome": "passed", "stage": "", "line": "", "packed": packed, "notes": list(dict.fromkeys(notes))}


def sweep(known: Path, minutes: float, wanted: list[str]) -> list[Row]:
    """Try what ``known`` does not have yet, for about so many minutes; returns all that is known."""
    done = [json.loads(line) for line in known.read_text().splitlines()] if known.exists() else []
    left = [kind for kind in wanted if kind not in {row["kind"] for row in done}]
    until = time.monotonic() + 60 * minutes
    if not left:
        return done
    ranks = Ranks(preload=PRELOAD)
    for kind in left:
        if time.monotonic() > until:
            break
        with tempfile.TemporaryDirectory() as folder:
            row = try_one(ranks, kind, Path(folder))
        done.append(row)
        with known.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{len(done)}/{len(wanted)} {kind}: {row['outcome']} {row['stage']} {row['line'][:160]}", flush=True)
    ranks.close()
    return done


def page(found: list[Row], total: int) -> str:
    """The table."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    counts = {name: sum(row["outcome"] == name for row in found) for name in ("passed", "refused", "no twin", "failed")}
    lines = [
        f"# Every causal architecture of transformers as a small twin, {time.strftime('%Y-%m-%d')}",
        "",
        f"{versions}; {os.cpu_count()} cores. `make test-architectures` wrote this.",
        "",
        "A twin has an architecture's default configuration with few layers and heads, and random weights. Each is "
        "prepared, trained with LoRA on everything linear (two steps, bf16, ZeRO-2), exported and compared with what "
        f"was trained. {len(found)} of {total} tried: {counts['passed']} passed, {counts['refused']} refused in one "
        f"line, {counts['no twin']} of which transformers makes no small model, {counts['failed']} failed.",
        "",
        "| architecture | outcome | packed | seconds | what was said |",
        "|---|---|---|---|---|",
    ]
    order = ("failed", "refused", "no twin", "passed")
    for row in sorted(found, key=lambda row: (order.index(row["outcome"]), row["kind"])):
        said = row["line"] or " ".join(row.get("notes", []))
        cells = [
            row["kind"],
            f"{row['outcome']} {row['stage']}".strip(),
            {True: "yes", False: "no"}.get(row.get("packed"), ""),
        ]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} | {_cell(said)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """One table cell, without the folder of the day."""
    import re

    return re.sub(r"/\S*/(model|run)\b", r"\1", text).replace("|", "\\|")[:240]


def main(argv: list[str]) -> int:
    """``RESULT.md [minutes] [kind …]``."""
    result, minutes = Path(argv[0]), float(argv[1]) if len(argv) > 1 else 1e6
    wanted = argv[2:] or kinds()
    found = sweep(result.with_suffix(".jsonl"), minutes, wanted)
    result.write_text(page(found, len(wanted)))
    return int(any(row["outcome"] == "failed" for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
