"""How long the command line takes to start: ``python benchmarks/cli_startup.py [RUNS]``.

Each command runs in a fresh process, a few times; the median counts. Exit status 1 where one is over its budget.
"""

import json
import os
import platform
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


def seconds(words: str, cwd: str) -> float:
    """One start of ``galley WORDS`` in a fresh process."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "galley_launch", *words.split()]
    subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begun


def measure(runs: int) -> list[dict[str, object]]:
    """A row for each command: median, fastest and slowest of ``runs`` starts, after one that warms the disk cache."""
    rows = []
    with tempfile.TemporaryDirectory() as cwd:
        for words, budget in COMMANDS.items():
            seconds(words, cwd)
            times = [seconds(words, cwd) for _ in range(runs)]
            middle = statistics.median(times)
            row = {"command": words, "median_s": middle, "min_s": min(times), "max_s": max(times), "budget_s": budget}
            rows.append(row | {"within": middle <= budget})
    return rows


def where() -> dict[str, object]:
    """Hardware and versions."""
    names = ("fire", "pydantic", "pyyaml", "rich")
    versions = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(), **versions}


def main() -> int:
    rows = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
    print(f"{'galley …':<60}{'median':>8}{'min':>8}{'max':>8}{'budget':>8}")
    for row in rows:
        times = "".join(f"{row[key]:>8.3f}" for key in ("median_s", "min_s", "max_s", "budget_s"))
        print(f"{row['command']!s:<60}{times}{'' if row['within'] else '  over'}")
    results = Path(__file__).with_name("results")
    results.mkdir(exist_ok=True)
    path = results / f"cli_startup-{date.today().isoformat()}.json"
    path.write_text(json.dumps({"date": date.today().isoformat(), "where": where(), "rows": rows}, indent=2) + "\n")
    print(f"\nwrote {path.relative_to(ROOT)}")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
