"""How cost grows: tokens a second and memory of a rank, with length, model size and ranks, for LoRA and full, on a CPU.

    python benchmarks/cost.py            about 15 minutes on two quiet cores
    python benchmarks/cost.py --quick    two minutes, small models: does the script work?
    python benchmarks/cost.py --draw results/cost-DATE.json      only the figure and the table again

Each point is a run of the command line, a few steps long. Writes ``results/cost-DATE.json``, ``.svg`` and ``.md``.
See README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cost_figure
import synthetic
import throughput
import watch

HERE = Path(__file__).resolve().parent
METHODS = ("lora", "full")
WARMUP, MEASURED, ENOUGH_TOKENS = 2, 3, 4096
"""Steps before, and at least so many that are measured: more of short ones, until they are so many tokens."""
LEAST_S = 20.0
"""No point is begun that has less time than this."""


@dataclass(frozen=True)
class Design:
    """What is varied, each around the same middle: ``length`` tokens, ``layers`` layers, one rank."""

    shape: dict[str, Any]
    length: int
    layers: int
    lengths: dict[str, tuple[int, ...]]
    """For each method, with ``layers`` layers."""
    deep_lengths: tuple[int, ...]
    """For LoRA, with the most layers."""
    sizes: tuple[int, ...]
    """Layers."""
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One run."""

    method: str
    layers: int
    length: int
    ranks: int


WHOLE = Design(
    shape=synthetic.SMOLLM2,
    length=512,
    layers=6,
    lengths={"lora": (256, 512, 1024, 2048, 4096, 8192), "full": (256, 1024, 4096, 8192)},
    deep_lengths=(2048, 8192),
    sizes=(2, 6, 12, 30),
    ranks=(1, 2, 4),
)
QUICK = Design(
    shape=synthetic.TOY,
    length=64,
    layers=1,
    lengths={"lora": (64, 128), "full": (128,)},
    deep_lengths=(),
    sizes=(1, 2),
    ranks=(1, 2),
)


def points(design: Design) -> list[Point]:
    """Every run of the design once, the dearest first: should time run out, the cheap middle is what is missing."""
    middle, layers = design.length, design.layers
    found = {Point("lora", max(design.sizes), length, 1) for length in design.deep_lengths}
    for method in METHODS:
        found |= {Point(method, layers, length, 1) for length in design.lengths[method]}
        found |= {Point(method, size, middle, 1) for size in design.sizes}
        found |= {Point(method, layers, middle, ranks) for ranks in design.ranks}
    return sorted(found, key=lambda each: (-each.layers * each.length * each.ranks, each.method))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points of a small model")
    parser.add_argument("--draw", type=Path, help="a record to draw again; nothing is run")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one point may take")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for all; what is left then is left out")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.draw:
        cost_figure.write(json.loads(given.draw.read_text(encoding="utf-8")), given.draw.with_suffix(""))
        return 0
    design = QUICK if given.quick else WHOLE
    given.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="galley-cost-"))
    try:
        return measure(design, work, given)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(design: Design, work: Path, given: argparse.Namespace) -> int:
    """Run every point; write the record after each. Returns the exit status: 1 where a point failed."""
    date, until = datetime.date.today().isoformat(), time.monotonic() + given.budget
    record: dict[str, Any] = {
        "date": date, "quick": given.quick, "hardware": throughput.hardware(),
        "versions": throughput.versions(sys.executable), "design": asdict(design), "warmup": WARMUP, "results": [],
    }  # fmt: skip
    place, todo = given.out / f"cost-{'quick-' if given.quick else ''}{date}", points(design)
    for number, point in enumerate(todo, start=1):
        result = asdict(point) | run(point, design, work, min(given.limit, until - time.monotonic()))
        record["results"].append(result)
        print(f"{number}/{len(todo)}  {describe(result)}", flush=True)
        place.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    cost_figure.write(record, place)
    print(f"\n{place}.md")
    return int(any("failed" in each for each in record["results"]))


def describe(result: dict[str, Any]) -> str:
    """A result in words."""
    return f"{cost_figure.what(result)}: {result.get('failed') or cost_figure.measured(result)}"


def run(point: Point, design: Design, work: Path, limit_s: float) -> dict[str, Any]:
    """What was seen of one run in a directory of its own, ended after its last measured step; or how it failed."""
    if limit_s < LEAST_S:
        return {"failed": "not begun: no time is left"}
    model = synthetic.write_model(work / f"layers-{point.layers}", design.shape | {"num_hidden_layers": point.layers})
    steps = WARMUP + max(MEASURED, ENOUGH_TOKENS // point.length if design is WHOLE else MEASURED)
    here = Path(tempfile.mkdtemp(dir=work))
    rows = synthetic.write_rows(here / "rows.jsonl", 2 * (steps + 1) * point.ranks, point.length // 2)
    log, output = here / "point" / "metrics.jsonl", here / "log"
    env = throughput.environment(work, SimpleNamespace(ranks=point.ranks, device="cpu"))
    seen = watch.watch(command(point, model, rows, steps + 1, here), env, log, output, limit_s, enough=steps)
    if len(seen.ends) < steps:
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it left no word"]
        why = f"out of time after {seen.seconds:.0f} s" if seen.seconds >= limit_s else said[-1][-300:]
        return {"failed": f"{len(seen.ends)} of {steps} steps; {why}"}
    result = summary(seen, log, steps, model)
    shutil.rmtree(here, ignore_errors=True)
    return result


def command(point: Point, model: Path, rows: Path, steps: int, here: Path) -> list[str]:
    """One sample a rank and step, of two documents that fill it."""
    settings = [
        "name=point", f"runs={here}", f"model.path={model}", f"data.path={rows}", "data.format=text",
        f"data.max_length={point.length}", f"batch.samples={point.ranks}", "micro_batch=1",
        f"duration.steps={steps}", "device=cpu", f"ranks={point.ranks}",
    ]  # fmt: skip
    return [sys.executable, "-m", "galley_launch", "run", str(HERE / "recipes" / f"{point.method}.yaml"), *settings]


def summary(seen: watch.Watched, log: Path, steps: int, model: Path) -> dict[str, Any]:
    """Speed by the run's own clock, for short steps are shorter than the stop-watch's; memory from outside."""
    from galley.storage.weights import count_parameters

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    taken = [line for line in lines if "step_s" in line][WARMUP:steps]
    return {
        "weights": count_parameters(model),
        "tokens_per_s": round(sum(each["tokens"] for each in taken) / sum(each["step_s"] for each in taken), 1),
        "step_s": [each["step_s"] for each in taken],
        "tokens_a_step": taken[0]["tokens"],
        "memory_gb": round(max(each.rss for each in seen.ranks.values()) / 1e9, 3),
        "anonymous_gb": round(max(each.anonymous for each in seen.ranks.values()) / 1e9, 3),
        "first_step_s": round(seen.first_step_s, 1),
        "load": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
