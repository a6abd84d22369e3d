"""``pytest -p recipes.result``: what became of each recipe, as a table in ``GALLEY_RECIPES_RESULT``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import pytest

COLUMNS = ("recipe", "twin", "method", "ZeRO", "ranks", "losses of steps 1 to 4", "resumed", "export differs by")
_found: dict[str, dict[str, object]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "test_a_recipe_trains" not in report.nodeid:
        return
    row = _found.setdefault(
        report.nodeid, {"recipe": report.nodeid.rpartition("[")[2].rstrip("]"), "outcome": "passed"}
    )
    if report.when == "call":
        row["seconds"] = f"{report.duration:.0f}"
    if report.outcome != "passed":
        row["outcome"] = report.outcome
    row.update(report.user_properties)


def pytest_sessionfinish() -> None:
    path = os.environ.get("GALLEY_RECIPES_RESULT")
    if path and _found:
        Path(path).write_text(_page(list(_found.values())), encoding="utf-8")


def _page(rows: list[dict[str, object]]) -> str:
    from recipes.bench import OVERRIDES  # pytest knows only now where the packages are

    libraries = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed")
    )
    columns = (*COLUMNS, "seconds", "outcome")
    lines = [
        f"# Every recipe, run on a twin of its model, {time.strftime('%Y-%m-%d')}",
        "",
        f"{libraries}; {os.cpu_count()} cores, {platform.machine()}. `make test-recipes` wrote this.",
        "",
        "A twin has the real model's architecture, control tokens and chat template (shortened), two layers, 64 wide, "
        "and random weights. Each recipe is composed, prepared and trained for four steps; it is then set back to its "
        "checkpoint of step 2, resumed from it and exported. *Resumed*: losses, gradient norms and the checkpoint of "
        "step 4, compared with those of the run that was not set back. *Export*: how far the logits of the model (and "
        "of the adapter) are from the trained model's, relative. Beside two ranks for many GPUs, not as recipes say:",
        "",
        *(f"- `{key}={value}`: {why}" for key, (value, why) in OVERRIDES.items()),
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"
