"""How long the command line takes to start in two checkouts, side by side: ``cli_startup_ratio.py BEFORE AFTER``.

Starts alternate, so that other work on the machine falls on both; CPU seconds (user and system) count, not the clock.
Both run with the Python and the packages of this process.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

COMMANDS = (["--help"], ["recipes"], ["plan", "smollm2-135m-lora", "device=cpu"])
STARTS = 60
CODE = "import sys; sys.path.append(sys.argv.pop(1)); from galley_launch.cli import main; sys.exit(main())"


def cpu_seconds(tree: Path, words: list[str], folder: str) -> float:
    """Of one start of the command line of ``tree``."""
    environment = os.environ | {"PYTHONPATH": f"{tree / 'launch'}:{tree / 'src'}"}
    # -S: no site, whose editable installs would be found first; packages come last instead.
    command = [sys.executable, "-S", "-c", CODE, sysconfig.get_path("purelib"), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(before: str, after: str) -> None:
    """Print a table of seconds and ratios."""
    trees = [Path(before).resolve(), Path(after).resolve()]
    print("| command | before, s | after, s | ratio of medians | ratio of minima |\n|---|---|---|---|---|")
    for words in COMMANDS:
        seconds: tuple[list[float], list[float]] = ([], [])
        with tempfile.TemporaryDirectory() as folder:
            for number in range(STARTS + 1):
                for index in (0, 1) if number % 2 else (1, 0):
                    seconds[index].append(cpu_seconds(trees[index], words, folder))
        old, new = (values[1:] for values in seconds)  # the first start compiles what it imports
        medians = statistics.median(old), statistics.median(new)
        ratios = f"{medians[1] / medians[0]:.2f} | {min(new) / min(old):.2f}"
        print(f"| `galley {' '.join(words)}` | {medians[0]:.3f} | {medians[1]:.3f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
