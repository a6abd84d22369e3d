"""How long the command line takes to start: ``python benchmarks/cli_startup.py [RUNS]``.

Each command runs in a fresh process, a few times; the median counts. Exit status 1 where one is over its budget.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "--help": 0.4,
    "recipes": 0.4,
    "show smollm2-135m-lora": 1.0,
    "plan smollm2-135m-lora": 1.0,
    "plan llama3.1-8b-full deepspeed=zero3 device=cpu ranks=2": 1.0,
    "status": 1.0,
}
"""Command to budget in seconds."""


def start(words: str, cwd: str) -> tuple[float, float]:
    """One start of ``galley WORDS`` in a fresh process: seconds on the clock, and of the processor."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "galley_launch", *words.split()]
    subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(runs: int) -> list[dict[str, object]]:
    """A row for each command: median, fastest and slowest of ``runs`` starts, after one that warms the disk cache."""
    rows = []
    with tempfile.TemporaryDirectory() as cwd:
        for words, budget in COMMANDS.items():
            start(words, cwd)
            clock, processor = zip(*(start(words, cwd) for _ in range(runs)), strict=True)
            middle = statistics.median(clock)
            times = {"median_s": middle, "min_s": min(clock), "max_s": max(clock), "cpu_s": min(processor)}
            rows.append({"command": words, **times, "budget_s": budget, "within": middle <= budget})
    return rows


def where() -> dict[str, object]:
    """Hardware and versions."""
    names = ("fire", "pydantic", "pyyaml", "rich")
    versions = {name: metadata.version(name) for name in names}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    return {"python": platform.python_version(), **machine, **versions}


def main() -> int:
    rows = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
    print(f"{'galley …':<60}{'median':>8}{'min':>8}{'max':>8}{'cpu':>8}{'budget':>8}")
    for row in rows:
        times = "".join(f"{row[key]:>8.3f}" for key in ("median_s", "min_s", "max_s", "cpu_s", "budget_s"))
        print(f"{row['command']!s:<60}{times}{'' if row['within'] else '  over'}")
    results = Path(__file__).with_name("results")
    results.mkdir(exist_ok=True)
    path = results / f"cli_startup-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"date": date.today().isoformat(), "where": where(), "rows": rows}, indent=2) + "\n")
    print(f"\nwrote {path.relative_to(ROOT)}")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
