"""``pytest -p slurm.result``: what the tests of the cluster saw, as a table in ``GALLEY_SLURM_RESULT``."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

_found: dict[str, dict[str, object]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    row = _found.setdefault(report.nodeid, {"seconds": 0.0, "outcome": "passed"})
    if report.when == "call":
        row["seconds"] = report.duration
    if report.outcome != "passed":
        row["outcome"] = report.outcome
    row.update(report.user_properties)


def pytest_sessionfinish() -> None:
    path = os.environ.get("GALLEY_SLURM_RESULT")
    if path and _found:
        Path(path).write_text(_page(_found, _before(Path(path))), encoding="utf-8")


def _before(path: Path) -> dict[str, str]:
    """Rows of scenarios in the table that is there, from an earlier run of that day: a scenario's latest run stands."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| run_")}


def scenario(nodeid: str) -> str:
    """``run_nodes: a power cut [first]`` of ``tests/slurm/test_run_nodes.py::test_a_power_cut[first]``."""
    path, _, name = nodeid.partition("::")
    words, bracket, which = name.removeprefix("test_").partition("[")
    return (
        f"{Path(path).stem.removeprefix('test_')}: {words.replace('_', ' ')}{' ' + bracket if bracket else ''}{which}"
    )


def _page(found: dict[str, dict[str, object]], before: dict[str, str]) -> str:
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    runs = {name: row for name, row in found.items() if "attempts" in row}
    others = [row for name, row in found.items() if name not in runs]
    passed = sum(row["outcome"] == "passed" for row in others)
    rows = before | {scenario(name): _row(name, row) for name, row in runs.items()}
    lines = [
        f"# Submitted runs on a live cluster, {time.strftime('%Y-%m-%d')}",
        "",
        f"{version or 'Slurm'} (slurmctld, munged, three slurmd in namespaces of their own), {os.cpu_count()} cores, "
        f"{platform.machine()}. `make test-slurm` and runs of its parts wrote this: of each scenario the latest run.",
        "",
        "*attempts*: how each attempt of the run ended, verdict (reason, kind of failure). A run that ends in *done* "
        "has each step once and, to the bit, the losses of the same run undisturbed.",
        "",
        "| scenario | attempts | seconds | outcome |",
        "|---|---|---:|---|",
        *(rows[name] for name in sorted(rows)),
    ]
    if others:
        lines += ["", f"Beside these, {passed} of {len(others)} tests that train nothing passed."]
    return "\n".join(lines) + "\n"


def _row(name: str, row: dict[str, object]) -> str:
    return f"| {scenario(name)} | {row['attempts']} | {float(str(row['seconds'])):.0f} | {row['outcome']} |"


def endings(found: Iterable[tuple[str, str, str]]) -> str:
    """``failed (failure, node) → done`` of attempts' verdicts, reasons and kinds."""
    texts = []
    for verdict, reason, kind in found:
        more = ", ".join(word for word in (reason, kind) if word and word != "finished")
        texts.append(f"{verdict or 'lost'} ({more})" if more else verdict or "lost")
    return " → ".join(texts)
