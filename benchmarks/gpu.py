"""Galley on a GPU beside TRL and Unsloth: an 8B model in full, with LoRA and QLoRA, on packed samples of 4096 tokens.

    python benchmarks/gpu.py [--only full|lora|qlora] [--trl-python VENV/bin/python] [--unsloth-python VENV/bin/python]
    python benchmarks/gpu.py --toy          the same on a CPU, with two small layers: does the script work?

Needs no network. Writes ``results/gpu-DATE.json`` and ``.md``; a method that is measured later on the same day and the
same GPU joins the file. Exit status 2 where there is no GPU, 1 where a run failed. See README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_table
import silicon
import synthetic
import throughput
import watch

HERE = Path(__file__).resolve().parent
METHODS = ("full", "lora", "qlora")
GALLEY = {
    "full": ["full.yaml", "deepspeed=zero3", "optimizer.name=adamw_8bit"],
    "lora": ["lora.yaml", "deepspeed=zero2"],
    "qlora": ["lora.yaml", "deepspeed=zero2", "method.kind=qlora"],
}
"""Recipe and settings. In full: bf16 weights 2, fp32 copy 4, fp32 gradients 4 and 8-bit moments 2 bytes a weight are
97 of the 150 GB (10⁹ bytes) that an H200 has, and 33 GB of activations fit beside them without being computed twice.
fp32 moments would be 6 bytes more. ZeRO-3 because it steps a billion weights at a time: ZeRO-2 needs 4 bytes a weight
more in its step, and bitsandbytes counts a tensor's elements in 32 bits."""
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {"full": {"zero": 3, "optimizer": "adamw_bnb_8bit"}, "lora": {"zero": 0}, "qlora": {"zero": 0}},
    "unsloth": {"full": {"zero": 0, "optimizer": "adamw_8bit"}, "lora": {"zero": 0}, "qlora": {"zero": 0}},
}
"""TRL in full as Galley; adapters without DeepSpeed, which is quicker on one GPU. Unsloth never uses it, so in full it
has no fp32 copy of the weights."""
REAL = {"shape": synthetic.LLAMA_8B, "length": 4096, "samples": 8, "warmup": 3, "measured": 6, "device": "cuda"}
SMALL = {"shape": synthetic.TOY, "length": 64, "samples": 2, "warmup": 1, "measured": 2, "device": "cpu"}
LEAST_S = 20.0
"""No run is begun that has less time than this."""
DOCUMENTS = 4
"""Documents in a sample, each of a quarter of its length."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=METHODS, help="one method: each takes a few minutes")
    parser.add_argument("--toy", action="store_true", help="two small layers on the CPU")
    parser.add_argument("--trl-python", default="", help="python of an environment with TRL and bitsandbytes")
    parser.add_argument("--unsloth-python", default="", help="python of an environment with Unsloth")
    parser.add_argument(
        "--budget", type=float, default=570, help="seconds for everything; who is left then is left out"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting for Galley")
    parser.add_argument("--work", type=Path, help="folder for the model (16 GB), kept; without: temporary")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    given.until = time.monotonic() + given.budget
    present = silicon.gpus()
    if not given.toy and not present:
        print("gpu: nvidia-smi shows no GPU here; run this where there is one, or try it with --toy", file=sys.stderr)
        return 2
    given.plan = SMALL if given.toy else REAL
    given.device, given.ranks = given.plan["device"], 1
    pythons = {"galley": sys.executable, "trl": given.trl_python, "unsloth": given.unsloth_python}
    given.pythons = {name: python for name, python in pythons.items() if python}
    given.out.mkdir(parents=True, exist_ok=True)
    work = given.work or Path(tempfile.mkdtemp(prefix="galley-gpu-"))
    try:
        return measure(begin(present, given), work.absolute(), given)
    finally:
        if given.work is None:
            shutil.rmtree(work, ignore_errors=True)


def begin(present: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """The record without results, or with today's earlier ones of the same setting on the same GPUs."""
    record = {
        "date": datetime.date.today().isoformat(),
        "toy": given.toy,
        "hardware": throughput.hardware() | {"gpus": [] if given.toy else present},
        "versions": {name: throughput.versions(python) for name, python in given.pythons.items()},
        "setting": {key: given.plan[key] for key in ("shape", "length", "samples", "warmup", "measured")},
        "rates": silicon.in_child(silicon.rates, given.device),
        "results": [],
    }
    before = place(record, given).with_suffix(".json")
    earlier = json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {}
    same = earlier and all(earlier[key] == record[key] for key in ("toy", "setting"))
    if same and earlier["hardware"]["gpus"] == record["hardware"]["gpus"]:
        record["results"] = earlier["results"]
        record["versions"] = earlier["versions"] | record["versions"]
    return record


def place(record: dict[str, Any], given: argparse.Namespace) -> Path:
    """Where the results go, without a suffix."""
    return given.out / f"gpu-{'toy-' if given.toy else ''}{record['date']}"


def measure(record: dict[str, Any], work: Path, given: argparse.Namespace) -> int:
    """Run everyone; write the results after each, so that an interruption loses one. Returns the exit status."""
    plan = given.plan
    print(f"bf16 matrix products: {record['rates']['measured'] / 1e12:.4g} TFLOP/s; making the model", flush=True)
    folder = work / ("toy" if given.toy else "llama-8b")
    model = silicon.in_child(synthetic.write_model, folder, plan["shape"], given.device)
    count = steps(plan) * plan["samples"] * DOCUMENTS
    rows = synthetic.write_rows(work / "rows.jsonl", count, plan["length"] // DOCUMENTS)
    failures = 0
    for method in [given.only] if given.only else METHODS:
        for who in given.pythons:
            result = {"method": method, "contestant": who, **contest(who, method, model, rows, given)}
            failures += "failed" in result
            keep(record, result | shares(result, record, model), given)
            print(gpu_table.line(result), flush=True)
    print(f"\n{gpu_table.page(record)}\n{place(record, given)}.json")
    return 1 if failures else 0


def steps(plan: dict[str, Any]) -> int:
    """Steps that a run is asked for: one more than are watched, so that it is not saving when it is ended."""
    return int(plan["warmup"] + plan["measured"] + 1)


def contest(who: str, method: str, model: Path, rows: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What was seen of one run in a directory of its own, ended after its last measured step; or how it failed."""
    left = given.until - time.monotonic()
    if left < LEAST_S:
        return {"failed": f"not begun: {left:.0f} s are left of --budget {given.budget:.0f}"}
    work = Path(tempfile.mkdtemp(prefix=f"{who}-", dir=model.parent))
    command, log = (galley if who == "galley" else partial(peer, who))(method, model, rows, work, given)
    output = given.out / f"gpu-{method}-{who}.log"
    env = throughput.environment(work, given) | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one GPU for everyone
    wanted = steps(given.plan) - 1
    seen = watch.watch(command, env, log, output, left, enough=wanted)
    if len(seen.ends) < wanted:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it left no word"]
        why = f"out of time after {seen.seconds:.0f} s" if seen.seconds >= left else said[-1][-300:]
        return {"failed": f"{len(seen.ends)} of {wanted} steps; {why}; see {output}"}
    result = summary(seen, log, given.plan["warmup"])
    output.unlink()
    shutil.rmtree(work, ignore_errors=True)
    return result


def summary(seen: watch.Watched, log: Path, warmup: int) -> dict[str, Any]:
    """Speed and memory of a run; the memory is what torch allocated on the GPU, on a CPU what the process held."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    held = [line["peak_memory_gb"] for line in lines if "peak_memory_gb" in line]
    ends = [end for end, _ in seen.ends]
    return {
        "tokens_per_s": round(seen.tokens_per_s(warmup), 1),
        "first_step_s": round(seen.first_step_s, 1),
        "step_s": [round(after - before, 3) for before, after in pairwise(ends[warmup - 1 :])],
        "step_tokens": [int(tokens) for _, tokens in seen.ends],
        "peak_memory_gb": max(held) if held else round(max(each.rss for each in seen.ranks.values()) / 1e9, 3),
        "loss": [round(line["loss"], 4) for line in lines if "loss" in line][: len(ends)],
    }


def galley(method: str, model: Path, rows: Path, work: Path, given: argparse.Namespace) -> tuple[list[str], Path]:
    """Command, and the file that gets a line a step."""
    plan, (recipe, *settings) = given.plan, GALLEY[method]
    settings += [
        f"name={method}", f"runs={work}", f"model.path={model}", f"data.path={rows}", "data.format=text",
        f"data.max_length={plan['length']}", f"batch.samples={plan['samples']}", "micro_batch=1",
        f"duration.steps={steps(plan)}", "ranks=1", *(["device=cpu"] if given.toy else []), *given.set,
    ]  # fmt: skip
    command = [sys.executable, "-m", "galley_launch", "run", str(HERE / "recipes" / recipe), *settings]
    return command, work / method / "metrics.jsonl"


def peer(
    who: str, method: str, model: Path, rows: Path, work: Path, given: argparse.Namespace
) -> tuple[list[str], Path]:
    """Command, and the file that gets a line a step: TRL under torchrun, Unsloth as a plain process."""
    plan, log = given.plan, work / "steps.jsonl"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    script = [*(torchrun if who == "trl" else []), str(HERE / f"{who}_sft.py")]
    words = {
        "model": model, "rows": rows, "method": method, "setting": "packed", "steps": steps(plan), "micro": 1,
        "accumulation": plan["samples"], "length": plan["length"], "out": work / "out", "steps-file": log,
    } | PEERS[who][method]  # fmt: skip
    return [given.pythons[who], *script, *(f"--{name}={value}" for name, value in words.items())], log


def shares(result: dict[str, Any], record: dict[str, Any], model: Path) -> dict[str, Any]:
    """The result's MFU, of the maker's peak (on a CPU of the measured rate) and of the measured rate."""
    if "failed" in result:
        return {}
    from galley.storage.weights import count_parameters
    from galley.train.metrics import flops_per_token

    setting, rates = record["setting"], record["rates"]
    text = SimpleNamespace(**setting["shape"])
    known = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    full, document = result["method"] == "full", setting["length"] / DOCUMENTS
    flops = flops_per_token(known, count_parameters(model), full, document)
    speed = flops * result["tokens_per_s"]
    mfu = {"mfu": speed / (rates["sheet"] or rates["measured"]), "of_measured": speed / rates["measured"]}
    return {"flops_per_token": flops} | {name: round(value, 4) for name, value in mfu.items()}


def keep(record: dict[str, Any], result: dict[str, Any], given: argparse.Namespace) -> None:
    """Put a result in the place of an earlier one of its kind, and write both files."""
    others = [
        each for each in record["results"]
        if (each["method"], each["contestant"]) != (result["method"], result["contestant"])
    ]  # fmt: skip
    record["results"] = sorted([*others, result], key=lambda each: METHODS.index(each["method"]))
    target = place(record, given)
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(gpu_table.page(record), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
