"""The contents of the report's sections, as texts and tables. A section that a run has nothing for is empty or None."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from statistics import median
from typing import Any

from galley.contract.records import ExitRecord
from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import RunSpec
from galley_launch.base.numbers import count, duration, size_text
from galley_launch.recipe.model_facts import Facts
from galley_launch.recipe.summary import summary as what_it_does
from galley_launch.report import charts
from galley_launch.report.charts import Chart, Point, exact
from galley_launch.report.history import Account, AttemptHistory
from galley_launch.report.rows import Curves, number, objects, section

_CHARTS = {
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Tokens a second",
    "peak_memory_gb": "Peak memory of the first rank, GB",
    "mfu": "Model FLOPs utilisation",
}


@dataclass(frozen=True)
class Table:
    """Rows under their columns. A column whose name begins with ``#`` has numbers, and is aligned to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Tile:
    """One of the large numbers at the top of the page."""

    label: str
    value: str
    note: str = ""


def summary(spec: RunSpec, run: RunDir) -> list[tuple[str, str]]:
    """Keys and values: the model, data, method, batch, duration and place, and where the run came from."""
    model = section(read_json(run.data_manifest) or {}, "model")
    count = model.get("parameters")
    pairs = what_it_does(spec, Facts(parameters=count if isinstance(count, int) else None))
    if isinstance(share := model.get("quantised_share"), float):
        pairs.append(("quantised", f"{share:.1%} of the weights"))
    cluster = read_json(run.cluster) or {}
    if cluster:
        partition = f", partition {cluster['partition']}" if cluster.get("partition") else ""
        pairs.append(("cluster", f"{cluster.get('name')}{partition}, jobs of {cluster.get('time')}"))
    commit = f", commit {spec.origin.commit[:12]}" if spec.origin.commit else ""
    return [*pairs[1:], ("recipe", spec.origin.recipe), ("galley", f"{spec.origin.version}{commit}")]


def tiles(curves: Curves, spent: Account | None, device: str) -> list[Tile]:
    """The numbers at the top."""
    shown = []
    if losses := curves["loss"]:
        shown.append(Tile("loss", loss_text(losses[-1][1]), f"at step {losses[-1][0]:,.0f}"))
    if held_out := curves["held_out_loss"]:
        best = min(held_out, key=lambda point: point[1])
        shown.append(Tile("best held-out loss", loss_text(best[1]), f"at step {best[0]:,.0f}"))
    if speeds := curves["tokens_per_s"]:
        shown.append(Tile("tokens a second", exact(median(value for _, value in speeds)), "median step"))
    if tokens := sum(value for _, value in curves["tokens"]):
        supervised = sum(value for _, value in curves["supervised_tokens"])
        shown.append(Tile("tokens seen", count(tokens), f"{supervised / tokens:.1%} trained on"))
    if spent and spent.wall and losses:
        shown.append(Tile("goodput", f"{spent.goodput:.0%}", f"of {duration(spent.wall)}"))
        kind = "rank-hours" if device == "cpu" else "GPU-hours"
        shown.append(Tile(kind, f"{spent.hours:.3g}", "of all attempts"))
    return shown


def loss_text(value: float) -> str:
    """A loss as the logs have it, with more digits where it is tiny."""
    return f"{value:.4f}" if abs(value) >= 1e-3 else exact(value)


def draw(curves: Curves, histories: Sequence[AttemptHistory]) -> list[Chart]:
    """The charts over steps, the loss first; empty where no step was taken."""
    losses, held_out = curves["loss"], curves["held_out_loss"]
    if not losses and not held_out:
        return []
    ends = [step for points in (losses, held_out) if points for step in (points[0][0], points[-1][0])]
    # All charts share one x axis, from the first to the last step that has a loss, so that they can be compared.
    x, began = charts.over_steps(min(ends), max(ends)), _began(histories)
    drawn = [charts.chart("Loss", losses, x, _last(losses), held_out=held_out, began=began, from_zero=False)]
    for key, title in _CHARTS.items():
        # A learning rate has no noise to average out, and of memory the peak is what matters.
        points, smooth = curves[key], key not in ("lr", "peak_memory_gb")
        spiky, percent, note = key == "grad_norm", key == "mfu", _note(key, points)
        if points:
            drawn.append(
                charts.chart(title, points, x, note, began=began, spiky=spiky, averages=smooth, percent=percent)
            )
    return drawn


def _began(histories: Sequence[AttemptHistory]) -> list[tuple[int, str]]:
    """The step at which every later attempt resumed, and the text of its mark in the charts."""
    later = [attempt for attempt in histories[1:] if attempt.resumed is not None and attempt.steps]
    marks = [(attempt.number, attempt.resumed or 0) for attempt in later]
    return [(step, f"attempt {number} goes on after step {step:,}") for number, step in marks]


def _last(points: list[Point]) -> str:
    return f"{loss_text(points[-1][1])} at step {points[-1][0]:,.0f}" if points else ""


def _note(key: str, points: list[Point]) -> str:
    values = [value for _, value in points] or [0.0]
    if key == "mfu":
        return f"median {charts.share(median(values))}"
    if key == "lr":
        return f"peak {charts.short(max(values), 1e-9)}"
    if key == "peak_memory_gb":
        return f"peak {exact(max(values), 3)}"
    return f"median {exact(median(values), 3)}, at most {exact(max(values), 3)}"


def data(run: RunDir) -> tuple[list[tuple[str, str]], Table | None]:
    """Where the data came from, and the counts of both splits."""
    manifest = read_json(run.data_manifest) or {}
    train, held_out = section(manifest, "train"), section(manifest, "held_out")
    if not train:
        return [], None
    sources = [(str(source.get("what")).replace("_", " "), _source(source)) for source in objects(manifest, "sources")]
    reason = manifest.get("packing_reason")
    if reason:
        sources.append(("not packed", str(reason)))
    columns = ("", "#training", *(["#held out"] if held_out else []))
    counted = [_facts(split, manifest) for split in ((train, held_out) if held_out else (train,))]
    names = [name for name in counted[0] if any(split.get(name) for split in counted)]
    return sources, Table(columns, tuple((name, *(split.get(name, "") for split in counted)) for name in names))


def _source(source: dict[str, Any]) -> str:
    size = f", {size_text(number(source['size']) or 0.0)}" if source.get("size") else ""
    revision = f" at {str(source['revision'])[:12]}" if source.get("revision") else ""
    return f"{source.get('path')}{revision}{size}, sha256 {str(source.get('sha256'))[:12]}…"


def _facts(split: dict[str, Any], manifest: dict[str, Any]) -> dict[str, str]:
    tokens, samples = number(split.get("tokens")) or 0.0, number(split.get("samples")) or 0.0
    # What packing fills: tokens over the positions of all samples, each of max_length.
    room = samples * (number(manifest.get("max_length")) or 0.0)
    supervised = number(split.get("supervised")) or 0.0
    counts = {
        "conversations": _whole(split, "documents"),
        "samples": _whole(split, "samples"),
        "tokens": _whole(split, "tokens"),
        "tokens trained on": f"{supervised:,.0f} ({supervised / tokens:.1%})" if tokens else "",
        "packing fills": f"{tokens / room:.1%}" if manifest.get("packed") and room else "",
        "longest sample": _whole(split, "longest"),
    }
    left = {
        "left out, too long": "dropped_overlong",
        "cut, too long": "truncated",
        "left out, nothing to train on": "dropped_unsupervised",
        "turns not trained on": "turns_masked",
    }
    counts |= {name: _whole(split, key) if split.get(key) else "" for name, key in left.items()}
    for share in split.get("shares") or []:
        tokens = number(share.get("supervised")) or 0.0
        part = f"{tokens / supervised:.1%} of the tokens trained on, " if supervised else ""
        counts[f"from {PurePath(str(share.get('path'))).name}"] = f"{part}{_whole(share, 'documents')} documents"
    return counts


def _whole(split: dict[str, Any], key: str) -> str:
    value = number(split.get(key))
    return f"{value:,.0f}" if value is not None else ""


def checkpoints(run: RunDir) -> Table | None:
    """Every checkpoint that stands; the best by held-out loss and the newest are marked."""
    manifests = [(checkpoint.step, read_json(checkpoint.manifest) or {}) for checkpoint in run.checkpoints()]
    if not manifests:
        return None
    losses = [(number(manifest.get("held_out_loss")), step) for step, manifest in manifests]
    scored = [(loss, step) for loss, step in losses if loss is not None]
    best, newest = (min(scored)[1] if scored else None), manifests[-1][0]
    rows = []
    for step, manifest in manifests[::-1]:  # the newest first
        loss = number(manifest.get("held_out_loss"))
        marks = [name for name, at in (("best", best), ("newest", newest)) if at == step]
        size = size_text(sum(number(size) or 0 for size in section(manifest, "files").values()))
        ranks = manifest.get("world", "?")
        writer = f"{ranks} rank{'' if ranks == 1 else 's'}, ZeRO-{manifest.get('zero_stage', '?')}"
        rows.append((f"{step:,}", "" if loss is None else loss_text(loss), ", ".join(marks), size, writer))
    return Table(("#step", "#held-out loss", "", "#size", "written by"), tuple(rows))


def export(run: RunDir, histories: Sequence[AttemptHistory]) -> tuple[str, Table | None]:
    """A sentence about the export, and its checks."""
    end = histories[-1].end if histories else ExitRecord()
    failed = end.exported is False and end.verdict == "done"
    unverified = failed and bool(end.unverified)
    facts = read_json((run.unverified if unverified else run.export) / "export.json")
    if facts is None or (failed and not unverified):
        return (f"The export failed: {end.export_error or 'see galley why'}" if failed else ""), None
    # An adapter that passes its checks is exported even if the merged model does not: then there are both folders.
    folders = (run.export, run.unverified) if unverified else (run.export,)
    models = [folder / name for folder in folders for name in ("model", "adapter")]
    parts = [f"{path.name} in {path}" for path in models if path.is_dir()]
    rows = [_check(check) for check in objects(facts, "checks")]
    columns = ("what", "", "#logits differ by", "#at most", "#same likeliest token", "compared with")
    step = f"Step {facts['step']}" if "step" in facts else "A model"
    but = ", but is not verified" if unverified else ""
    return f"{step} was exported{but}: {', '.join(parts) or run.export}", Table(columns, tuple(rows)) if rows else None


def _check(check: dict[str, Any]) -> tuple[str, ...]:
    difference, most, same = (number(check.get(key)) for key in ("difference", "tolerance", "same_top"))
    known = difference is not None and most is not None
    # A record without the verdict itself is judged by its difference and the limit for it.
    passed = bool(check.get("verified", (difference or 0.0) <= (most or 0.0)))
    return (
        str(check.get("what", "")),
        "" if not known else "passed" if passed else "FAILED",
        "" if difference is None else f"{difference:.2e}",
        "" if most is None else f"{most:.0e}",
        "" if same is None else f"{same:.0%}",
        str(check.get("against", "")),
    )


def configuration(spec: RunSpec) -> list[tuple[str, str]]:
    """Titles and texts of what the run was told: task, placement, DeepSpeed, and the words of its command line."""
    import yaml

    body = spec.model_dump(mode="json")
    # DeepSpeed's configuration is shown as the JSON that it is, the rest as YAML, which reads better.
    place, origin = dict(body["placement"]), body["origin"]
    deepspeed = place.pop("deepspeed")

    def text(value: object) -> str:
        return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)).rstrip()

    words = f"galley … {' '.join([origin['recipe'], *origin['overrides']])}"
    return [
        ("Task", text(body["task"])),
        ("Placement", text(place)),
        ("DeepSpeed", json.dumps(deepspeed, indent=2, ensure_ascii=False)),
        ("Cadence", text(body["cadence"])),
        *([("Tracking", text(body["tracking"]))] if spec.tracking.names else []),
        ("Command line", words),
    ]
