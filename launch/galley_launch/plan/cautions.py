"""Notes on what is probably a mistake in a run, but may be intended, with the setting that helps.

What is certainly wrong is refused instead: see :mod:`galley_launch.recipe.deepspeed_rules`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from galley.contract import pace
from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import RunSpec
from galley_launch.recipe import catalogue
from galley_launch.recipe.catalogue import Source
from galley_launch.recipe.model_facts import Facts
from galley_launch.recipe.schema import Recipe

_ADAPTER_RATES = (1e-5, 5e-3)
"""Peak learning rates that adapters are trained with, under AdamW."""
_FULL_RATES = ((5e8, 1e-6, 2e-3), (2e9, 1e-6, 5e-4), (float("inf"), 1e-7, 1e-4))
"""The same for full fine-tuning: (parameters of the model up to which this holds, lowest rate, highest rate)."""
_LION = 3
"""Lion's rate is this many times lower than AdamW's (Chen et al., 2023), because its updates are signs."""
_LARGEST = 4 << 20
"""Bytes up to which a data file is read for an estimate: parsing these takes some 50 ms."""
_BYTES, _AROUND = 4.0, 6
"""Bytes of text in a token, and tokens that a template puts template a message: within a third for most languages."""
_FILLED = 0.95
"""Share of a packed sample that documents fill; the rest is padding."""


def of_rate(recipe: Recipe, source: Source, typed: set[str], facts: Facts) -> list[str]:
    """Notes on a learning rate that does not suit the method. ``typed``: keys given on the command line."""
    rate, full, lion = recipe.optimizer.lr, recipe.method.kind == "full", recipe.optimizer.name == "lion"
    if kept := _kept_rate(recipe, _rate_set_for(source, typed)):
        return [kept]
    low, high = _rates(full, facts)
    scale = _LION if lion else 1
    low, high = low / scale, high / scale
    if low <= rate <= high:
        return []
    where = f"far {'above' if rate > high else 'below'} what {'full fine-tuning' if full else 'an adapter'} takes"
    return [f"optimizer.lr {rate:g} is {where} ({low:.0e} to {high:.0e} for a model of this size)"]


def _kept_rate(recipe: Recipe, set_for: tuple[str, str] | None) -> str:
    """A note where the rate was set for another method or optimizer (``set_for``) than is used now; else empty."""
    if set_for is None:
        return ""
    kind, name = recipe.method.kind, recipe.optimizer.name
    # Adapters take about ten times the rate of full fine-tuning, AdamW three times that of Lion. Of two changes at once
    # only the method's, which matters more, is mentioned.
    if (set_for[0] == "full") != (kind == "full"):
        factor, times = (
            (0.1, "a tenth of an adapter's") if kind == "full" else (10, "ten times that of full fine-tuning")
        )
        given, now = f"method.kind={set_for[0]}", f"method.kind={kind}"
    elif (set_for[1] == "lion") != (name == "lion"):
        factor, times = (1 / _LION, "a third of AdamW's") if name == "lion" else (_LION, "three times Lion's")
        given, now = f"optimizer.name={set_for[1]}", f"optimizer.name={name}"
    else:
        return ""
    rate = recipe.optimizer.lr
    return (
        f"optimizer.lr {rate:g} was set for {given}; {now} usually takes {times}: set optimizer.lr={rate * factor:.2g}"
    )


def _rates(full: bool, facts: Facts) -> tuple[float, float]:
    if not full:
        return _ADAPTER_RATES
    # A transformer layer has about 12 hidden² weights: 4 in attention (queries, keys, values, output) and 8 in the MLP
    # (two matrices of hidden x 4 hidden). Embeddings are left out: only the order of magnitude matters here.
    size = facts.parameters or 12 * (facts.layers or 0) * (facts.hidden_size or 0) ** 2
    if not size:  # an unknown model: any rate that suits some model
        return _FULL_RATES[-1][1], _FULL_RATES[0][2]
    return next((low, high) for limit, low, high in _FULL_RATES if size <= limit)


def _rate_set_for(source: Source, typed: set[str]) -> tuple[str, str] | None:
    """Method and optimizer of the recipe that set the rate; None where it was typed, or is the schema's default."""
    if source.run or "optimizer.lr" in typed:
        return None
    file = source.set_by.get("optimizer.lr")
    tree = catalogue.read(Path(file)).tree if file else source.tree
    section: Any = tree.get("optimizer")
    if not isinstance(section, dict) or "lr" not in section:
        return None
    method: Any = tree.get("method")
    kind = str(method.get("kind", "lora")) if isinstance(method, dict) else "lora"
    return kind, str(section.get("name", "adamw"))


def of_length(spec: RunSpec, run: RunDir) -> list[str]:
    """Notes on a run of too few steps: exact once the data are prepared, an estimate before.

    There is no estimate for data on a hub, for large files, and for formats other than JSON lines.
    """
    prepared = (read_json(run.data_manifest) or {}).get("train")
    if isinstance(prepared, dict) and isinstance(prepared.get("samples"), int):
        return pace.warnings(spec, max(1, prepared["samples"]))
    if spec.task.duration.epochs is None:
        return pace.warnings(spec, 1)  # the number of steps does not depend on the data
    samples = _estimate(spec)
    return pace.warnings(spec, samples, "about ") if samples else []


def _estimate(spec: RunSpec) -> int | None:
    """About how many samples the training split will have; None where that takes too long to find out."""
    path, data = Path(spec.placement.paths.data or ""), spec.task.data
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        rows = list(_row_tokens(path.read_bytes()))
    except (OSError, ValueError):
        return None  # prepare says what is wrong with the file
    share = 1 - data.held_out
    if not data.packing:  # a row is a sample of its own
        return max(1, round(len(rows) * share)) if rows else None
    # A longer row counts as one full sample, as with overlong=truncate.
    tokens = sum(min(size, data.max_length) for size in rows) * share
    return max(1, round(tokens / data.max_length / _FILLED)) if rows else None


def _row_tokens(content: bytes) -> Iterator[float]:
    """About how many tokens each row takes."""
    for line in content.splitlines():
        if line.strip():
            row = json.loads(line)
            messages = row.get("messages") if isinstance(row, dict) else None
            strings = list(_strings(row))
            template = _AROUND * len(messages) if isinstance(messages, list) else 0
            yield sum(len(text.encode("utf-8", "replace")) for text in strings) / _BYTES + template


def _strings(value: Any) -> Iterator[str]:
    """Every string in a row but the names of roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _strings(item)
