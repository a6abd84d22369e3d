"""The loss curve as a picture: ``python demo/plot.py RUN`` draws any run's ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]

INK, FAINT, TRAIN, HELD_OUT = "#1d2733", "#8a94a0", "#2f6fb0", "#d9742b"


def read(metrics: Path) -> tuple[Points, Points]:
    """Training loss at each step, and held-out loss at each evaluation."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return (
        [(row["step"], row["loss"]) for row in rows if "loss" in row],
        [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row],
    )


def smooth(points: Points, keep: float = 0.7) -> Points:
    """Moving average of the logarithm, as the axis is logarithmic; corrected for its start (Kingma and Ba, 2014)."""
    average, smoothed = 0.0, []
    for count, (step, loss) in enumerate(points, start=1):
        average = keep * average + (1 - keep) * math.log(max(loss, 1e-9))
        smoothed.append((step, math.exp(average / (1 - keep**count))))
    return smoothed


def draw(metrics: Path, picture: Path, title: str, subtitle: str) -> None:
    """Draw ``metrics`` (a run's ``metrics.jsonl``) into ``picture`` (a ``.png``)."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot

    training, held_out = read(metrics)
    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=160)
    axes.plot(*zip(*training, strict=True), color=TRAIN, alpha=0.25, linewidth=1.2)
    _line(axes, smooth(training), "training (smoothed)", TRAIN)
    if held_out:
        _line(axes, held_out, "held out", HELD_OUT, marker="o", markersize=5)
    _style(axes, title, subtitle)
    figure.savefig(picture, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)


def _line(axes: Any, points: Points, name: str, color: str, **how: Any) -> None:
    axes.plot(*zip(*points, strict=True), color=color, linewidth=2.2, label=name, solid_capstyle="round", **how)


def _style(axes: Any, title: str, subtitle: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("optimizer step", color=FAINT)
    axes.set_ylabel("loss per answer token (log scale)", color=FAINT)
    axes.text(0, 1.11, title, transform=axes.transAxes, fontsize=15, fontweight="bold", color=INK)
    axes.text(0, 1.045, subtitle, transform=axes.transAxes, fontsize=10, color=FAINT)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9cfd6")
    axes.margins(x=0.02)
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    draw(root / "metrics.jsonl", root / "loss.png", root.name, "loss over the run")
    print(root / "loss.png")
