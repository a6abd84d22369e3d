"""Galley beside TRL's SFTTrainer: useful tokens a second, memory of a rank, time to the first step, in one run.

    python benchmarks/throughput.py --model FOLDER --trl-python VENV/bin/python --methods lora,full --steps 25

Every contestant gets the same model, rows, ranks, micro-batch, length, ZeRO stage and precision, one after the other.
Writes ``results/throughput-DATE.json`` and ``.md``. See README.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import rows
import watch

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "unsloth")
COLUMNS = ("method", "contestant", "useful tokens/s", "of TRL's best", "first step, s", "peak GB a rank: RSS", "PSS",
           "anonymous", "steady steps")  # fmt: skip
NAMES = {
    "galley": "Galley",
    "galley-split": "Galley, one at a time",
    "galley-compiled": "Galley, two at a time, compiled",
    "trl-packed": "TRL, packed",
    "trl-split": "TRL, packed, one at a time",
    "trl-unpadded": "TRL, padding-free",
    "trl-plain": "TRL as it comes",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--trl-python", default="", help="python of an environment with TRL; without: Galley alone")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--contestants", default=",".join(NAMES))
    parser.add_argument("--steps", type=int, default=25, help="all steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that are reported apart")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that one contestant may take")
    parser.add_argument("--dry", action="store_true", help="skip the run of one step that compiles and fills caches")
    given = parser.parse_args()
    if not 1 <= given.warmup < given.steps:
        parser.error(f"--warmup {given.warmup} is not between 1 and --steps {given.steps}")
    return given


def environment(work: Path, given: argparse.Namespace) -> dict[str, str]:
    """What every contestant gets: its share of cores, caches of its own, no hub."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("GALLEY", "OMP_"))}
    env |= {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // given.ranks)),
        "GALLEY_CACHE": str(work / "cache"),
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return env | ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if given.device == "cpu" else {})


def galley(
    who: str, method: str, steps: int, work: Path, file: Path, given: argparse.Namespace
) -> tuple[list[str], Path]:
    """Command, and the file that gets a line a step."""
    settings = {
        "name": method,
        "runs": str(work),
        "model.path": given.model,
        "data.path": str(file),
        "duration.steps": str(steps),
        "ranks": str(given.ranks),
        **({"device": "cpu"} if given.device == "cpu" else {}),
        "batch.samples": str(4 * given.ranks),
        "micro_batch": {"galley-split": "1", "galley-compiled": "2"}.get(who, "4"),
        "compile": "true" if who == "galley-compiled" else "false",
    }
    recipe = HERE / "recipes" / f"{method}.yaml"
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "galley_launch", "run", str(recipe), *words], work / method / "metrics.jsonl"


def trl(who: str, method: str, steps: int, work: Path, file: Path, given: argparse.Namespace) -> tuple[list[str], Path]:
    """Command, and the file that gets a line a step."""
    setting = who.removeprefix("trl-")
    log = work / "steps.jsonl"
    torchrun = [given.trl_python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.ranks)]
    paths = ["--model", given.model, "--rows", str(file), "--out", str(work / "out"), "--steps-file", str(log)]
    what = ["--method", method, "--setting", setting, "--steps", str(steps)]
    return [*torchrun, str(HERE / "trl_sft.py"), *paths, *what], log


def contest(who: str, method: str, steps: int, file: Path, given: argparse.Namespace) -> watch.Watched:
    """Run one contestant in a directory of its own, from cold data caches."""
    work = Path(tempfile.mkdtemp(prefix=f"galley-bench-{who}-"))
    if who.startswith("galley"):
        command, log = galley(who, method, steps, work, file, given)
    else:
        command, log = trl(who, method, steps, work, file, given)
    output = given.out / f"{who}-{method}.log"
    seen = watch.watch(command, environment(work, given), log, output, given.limit)
    if seen.status != 0 or len(seen.ends) < steps:
        tail = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        sys.exit(f"throughput: {who} took {len(seen.ends)} of {steps} steps, status {seen.status}; {output}:\n{tail}")
    shutil.rmtree(work)
    output.unlink()
    return seen


def versions(python: str) -> dict[str, str]:
    """Versions of what matters in an environment."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{'python': sys.version.split()[0], **{{p: have[p] for p in {PACKAGES} if p in have}}}}))"
    )
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return found


def describe(model: str) -> str:
    """A model folder's name and size in words."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    shape = f"{config['num_hidden_layers']} layers of {config['hidden_size']}, vocabulary {config['vocab_size']}"
    return f"{Path(model).name} ({config['model_type']}, {shape})"


def hardware() -> dict[str, Any]:
    """What this was measured on, and whether anything else was running."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory * 1024 / 1e9, 1),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def table(record: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    setting, box = record["setting"], record["hardware"]
    head = (
        f"# Throughput, {record['date']}\n\n"
        f"{setting['model']}, {setting['ranks']} ranks x 4 x 512 tokens, ZeRO-2, bf16; rows of the standard library's "
        f"documentation (sha256 {setting['rows_sha256'][:12]}).\n"
        f"{box['cpu']}, {box['cores']} cores, {box['memory_gb']} GB, {box['system']}; "
        f"load before: {box['load_before']}.\n\n"
        f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}\n"
    )
    lines = [_line(each, record["results"]) for each in record["results"]]
    sides = [f"{name}: {', '.join(f'{k} {v}' for k, v in side.items())}" for name, side in record["versions"].items()]
    return head + "\n".join(lines) + "\n\n" + "\n".join(f"- {side}" for side in sides) + "\n"


def _line(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    best = [r["tokens_per_s"] for r in results if r["method"] == result["method"] and r["contestant"].startswith("trl")]
    ratio = f"{result['tokens_per_s'] / max(best):.2f}" if best else "–"
    peak = result["peak_gb_a_rank"]
    cells = (result["method"], NAMES[result["contestant"]], result["tokens_per_s"], ratio, result["first_step_s"],
             peak["rss"], peak["pss"], peak["anonymous"], result["steady_steps"])  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def contestants(given: argparse.Namespace) -> list[str]:
    """Who takes part."""
    asked = [name for name in given.contestants.split(",") if name]
    return [name for name in asked if name.startswith("galley") or given.trl_python]


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    given.model = str(Path(given.model).absolute())
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "results": []}
    record["versions"] = {"galley": versions(sys.executable)}
    if given.trl_python:
        record["versions"]["trl"] = versions(given.trl_python)
    with tempfile.TemporaryDirectory(prefix="galley-bench-rows-") as folder:
        file = rows.write(Path(folder) / "rows.jsonl")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        record["setting"] = {"model": describe(given.model), "ranks": given.ranks, "steps": given.steps,
                             "warmup": given.warmup, "rows_sha256": digest}  # fmt: skip
        compare(record, file, given)


def compare(record: dict[str, Any], file: Path, given: argparse.Namespace) -> None:
    """Run everyone; write the results after each, so that an interruption loses one."""
    place = given.out / f"throughput-{record['date']}"
    for method in given.methods.split(","):
        for who in contestants(given):
            if not given.dry:
                print(f"{method:<5} {NAMES[who]}: one step, not measured", flush=True)
                contest(who, method, 1, file, given)
            print(f"{method:<5} {NAMES[who]}: {given.steps} steps", flush=True)
            seen = contest(who, method, given.steps, file, given)
            record["results"].append({"method": method, "contestant": who, **watch.summary(seen, given.warmup)})
            place.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            place.with_suffix(".md").write_text(table(record), encoding="utf-8")
    print(f"\n{table(record)}\n{place}.json")


if __name__ == "__main__":
    main()
