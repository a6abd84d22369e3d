"""What a checkpoint costs training: step times while one is written, beside step times while none is.

    python benchmarks/saving.py --model FOLDER

One run of full fine-tuning, two CPU ranks, which saves every eighth step: weights and both moments of every parameter.
Writes ``results/saving-DATE.md``. See README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rows
import throughput

HERE = Path(__file__).resolve().parent
EVERY, WARMUP = 8, 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--steps", type=int, default=39)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()
    given.device = "cpu"
    return given


def train(work: Path, given: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """The metrics' rows of one run, and the bytes of a checkpoint in GB."""
    file = rows.write(work / "rows.jsonl")
    command, log = throughput.galley("galley", "full", given.steps, work, file, given)
    command += [f"cadence.save_every={EVERY}", "cadence.keep=1"]
    subprocess.run(command, env=throughput.environment(work, given), check=True)
    saved = sum(path.stat().st_size for path in (log.parent / "checkpoints").rglob("*") if path.is_file())
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()], saved / 1e9


def compare(found: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Step times by what was going on: a step's row comes after its time, a stall's when the writing begins."""
    beside: list[float] = []
    alone: list[float] = []
    stalls: dict[int, float] = {}
    writing = False
    for row in found:
        if "stall_s" in row and row["step"] < steps:
            writing, stalls[row["step"]] = True, row["stall_s"]
        elif "save_s" in row:
            writing = False
        elif "loss" in row and row["step"] > WARMUP:
            (beside if writing else alone).append(row["step_s"])
    first = [next(r["step_s"] for r in found if "loss" in r and r["step"] == step + 1) for step in stalls]
    return {
        "alone_s": statistics.median(alone),
        "beside_s": statistics.median(beside),
        "first_s": statistics.median(first),
        "stall_s": statistics.median(stalls.values()),
        "save_s": statistics.median(row["save_s"] for row in found if "save_s" in row and row["step"] < steps),
        "steps_alone": len(alone),
        "steps_beside": len(beside),
    }


def page(facts: dict[str, Any], given: argparse.Namespace, gigabytes: float) -> str:
    box, alone = throughput.hardware(), facts["alone_s"]
    held_up = facts["first_s"] + facts["stall_s"]
    lines = [
        f"# What a checkpoint costs training, {datetime.date.today().isoformat()}",
        "",
        f"{throughput.describe(given.model)}, full fine-tuning, {given.ranks} ranks x 4 x 512 tokens, ZeRO-2, bf16; a "
        f"checkpoint of {gigabytes:.2f} GB every {EVERY} steps.",
        f"{box['cpu']}, {box['cores']} cores, {box['memory_gb']} GB, {box['system']}.",
        "",
        "| medians | seconds | of a step without |",
        "|---|---:|---:|",
        f"| a step while nothing is written ({facts['steps_alone']}) | {alone:.3f} | 1.000 |",
        f"| a step while a checkpoint is written ({facts['steps_beside']}) | {facts['beside_s']:.3f} | "
        f"{facts['beside_s'] / alone:.3f} |",
        f"| the first step after a save began, and what training waited for the copy before it | {held_up:.3f} | "
        f"{held_up / alone:.3f} |",
        f"| of which it waited | {facts['stall_s']:.3f} | {facts['stall_s'] / alone:.3f} |",
        f"| the save, from its beginning to a checkpoint that stands | {facts['save_s']:.3f} | "
        f"{facts['save_s'] / alone:.3f} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    given = arguments()
    given.model = str(Path(given.model).absolute())
    given.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="galley-bench-saving-"))
    found, gigabytes = train(work, given)
    text = page(compare(found, given.steps), given, gigabytes)
    path = given.out / f"saving-{datetime.date.today().isoformat()}.md"
    path.write_text(text, encoding="utf-8")
    shutil.rmtree(work)
    print(f"\n{text}\n{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
