"""The figure and the page of Markdown that ``cost.py`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STYLES = {"lora": ("#0072B2", "o", "LoRA"), "full": ("#D55E00", "s", "full")}
"""Colours that the colour-blind tell apart (Okabe and Ito, 2008), marks, words."""
QUIET = "#555555"
MEASURES = {"tokens_per_s": "tokens a second, all ranks", "memory_gb": "memory of a rank, GB"}
COLUMNS = ("method", "layers", "weights, M", "tokens of a sample", "ranks", "tokens/s", "memory of a rank, GB",
           "step, s (shortest, longest)")  # fmt: skip

Line = tuple[str, str, list[tuple[float, float]]]
"""Method, label, and points."""


def measured(result: dict[str, Any]) -> str:
    """A result's two figures in words."""
    return f"{result['tokens_per_s']:,.0f} tokens/s, {result['memory_gb']:.2f} GB"


def write(record: dict[str, Any], place: Path) -> None:
    """Write ``place.svg`` and ``place.md``."""
    draw(record, place.with_suffix(".svg"))
    place.with_suffix(".md").write_text(page(record, place.name), encoding="utf-8")


def draw(record: dict[str, Any], path: Path) -> None:
    """Small multiples: speed and memory (rows) with length, size and ranks (columns). The suffix says the format."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"font.size": 9, "svg.hashsalt": "galley", "axes.spines.top": False,
                            "axes.spines.right": False, "axes.edgecolor": QUIET}  # fmt: skip
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(10.5, 6.2), sharey="row", sharex="col", layout="constrained")
    for row, measure in enumerate(MEASURES):
        columns = _columns(record, measure)
        for axis, (_, _, lines) in zip(axes[row], columns, strict=True):
            _panel(axis, lines)
        axes[row][0].set_ylim(*_limits([y for _, _, lines in columns for *_, found in lines for _, y in found]))
        axes[row][0].set_ylabel(MEASURES[measure])
    for axis, below, label, (title, same, _) in zip(axes[0], axes[1], _x_labels(record), columns, strict=True):
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=18)
        axis.text(0, 1.02, same, transform=axis.transAxes, fontsize=8.5, color=QUIET)
        below.set_xlabel(label)
    figure.draw_without_rendering()  # so that places are known
    for row, measure in enumerate(MEASURES):
        for axis, (_, _, lines) in zip(axes[row], _columns(record, measure), strict=True):
            _label(axis, lines)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _limits(values: list[float]) -> tuple[float, float]:
    """Around the values, and never so narrow that noise looks like an effect: at least a factor of five."""
    low, high = min(values), max(values)
    room = max(1.25, (5 * low / high) ** 0.5)
    return low / room, high * room


def _good(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in record["results"] if "failed" not in each]


def _x_labels(record: dict[str, Any]) -> tuple[str, str, str]:
    cores = record["hardware"]["cores"]
    return "tokens of a sample", "weights, millions", f"ranks, on {cores} cores"


def _columns(record: dict[str, Any], measure: str) -> list[tuple[str, str, list[Line]]]:
    """Title, what stays the same, and lines of each column."""
    design, good = record["design"], _good(record)
    length, layers, most = design["length"], design["layers"], max(design["sizes"])
    one = [each for each in good if each["ranks"] == 1]
    sizes = [each for each in one if each["length"] == length]
    weights = {each["layers"]: f"{each['weights'] / 1e6:,.3g}M" for each in good}
    few, many = (weights.get(each, f"{each} layers") for each in (layers, most))
    by_length = _lines([each for each in one if each["layers"] == layers], "length", measure)
    deep = [each for each in one if each["layers"] == most != layers and each["method"] == "lora"]
    by_length += [("lora", f"LoRA, {many}", each[2]) for each in _lines(deep, "length", measure) if len(each[2]) > 1]
    by_ranks = [each for each in good if each["layers"] == layers and each["length"] == length]
    return [
        ("Longer samples", f"{few} weights ({layers} layers), one rank", by_length),
        ("Larger models", f"{length} tokens, one rank", _lines(sizes, "weights", measure)),
        ("More ranks", f"{few} weights, {length} tokens a rank", _lines(by_ranks, "ranks", measure)),
    ]


def _lines(results: list[dict[str, Any]], across: str, measure: str) -> list[Line]:
    found = []
    for method, (_, _, word) in STYLES.items():
        mine = [each for each in results if each["method"] == method]
        if mine:
            scale = 1e-6 if across == "weights" else 1
            found.append((method, word, sorted((each[across] * scale, each[measure]) for each in mine)))
    return found


def _panel(axis: Any, lines: list[Line]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    for method, word, found in lines:
        colour, mark, usual = STYLES[method]
        dashed = (0, (4, 2)) if word != usual else "-"
        axis.plot(*zip(*found, strict=True), color=colour, marker=mark, markersize=4.5, linewidth=1.6, linestyle=dashed)
    ticks = sorted({x for _, _, found in lines for x, _ in found})
    axis.set_xticks(ticks, [f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    few, many = min(ticks), max(ticks)
    span = max(many / few, 2)
    longest = max(len(word) for _, word, _ in lines)
    axis.set_xlim(few / span**0.08, many * span ** (0.16 + 0.035 * longest))  # room for the lines' names


def _label(axis: Any, lines: list[Line]) -> None:
    """Name each line to the right of its last point; names that would touch are moved apart."""
    below = -1e9
    for method, word, found in sorted(lines, key=lambda each: each[2][-1][1]):
        place = axis.transData.transform(found[-1])[1] * 72 / axis.figure.dpi
        moved = max(place, below + 11)
        axis.annotate(
            word, found[-1], (7, moved - place), textcoords="offset points", va="center",
            color=STYLES[method][0], fontweight="bold", fontsize=8.5,
        )  # fmt: skip
        below = moved


def page(record: dict[str, Any], name: str) -> str:
    """The picture and the table."""
    box, shape, good = record["hardware"], record["design"]["shape"], _good(record)
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    order = sorted(good, key=lambda each: (each["method"], each["layers"], each["length"], each["ranks"]))
    failed = [each for each in record["results"] if "failed" in each]
    return (
        f"# How cost grows, {record['date']}\n\n![Speed and memory with length, size and ranks]({name}.svg)\n\n"
        f"Llamas of random weights, layers of {shape['hidden_size']}, vocabulary {shape['vocab_size']}; bf16, ZeRO-2, "
        f"activations kept; one sample a rank and step, filled by two documents; LoRA r16 on every linear layer, or "
        f"all weights with AdamW. Steps after the first {record['warmup']}. Memory: the most that was resident, "
        f"libraries included (about half a GB).\n"
        f"{box['cpu']}, {box['cores']} cores, {box['memory_gb']} GB, {box['system']}; load before: "
        f"{box['load_before']}; {versions}.\n\n"
        f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}\n"
        + "".join(f"{_row(each)}\n" for each in order)
        + "".join(f"\nNot measured: {what(each)}: {each['failed']}\n" for each in failed)
    )


def what(result: dict[str, Any]) -> str:
    """A result's point in words."""
    return f"{result['method']}, {result['layers']} layers, {result['length']} tokens, ranks {result['ranks']}"


def _row(result: dict[str, Any]) -> str:
    times = result["step_s"]
    middle = sum(times) / len(times)
    cells = (STYLES[result["method"]][2], result["layers"], f"{result['weights'] / 1e6:,.3g}", result["length"],
             result["ranks"], f"{result['tokens_per_s']:,.0f}", f"{result['memory_gb']:.2f}",
             f"{middle:.2f} ({min(times):.2f}, {max(times):.2f})")  # fmt: skip
    return f"| {' | '.join(str(cell) for cell in cells)} |"
