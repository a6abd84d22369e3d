"""How far the worst healthy export is from the mildest wrong one: benchmarks/results/export-margin-DATE.md.

    python benchmarks/export_margin.py [isa=AVX512_CORE_BF16,AVX512_CORE,AVX2] [few]

Two-layer twins of the recipes' models (and of a few other architectures) with made-up checkpoints are exported, in
bf16, fp16 and fp32, and then with each fault that tests/train/planted.py knows. Once with all that the processor has,
and once for each of ``isa`` with oneDNN held to it (``ONEDNN_MAX_CPU_ISA``; adapters only), for rounding differs
between them. Half an hour on one core for the first, ten minutes for each other.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / each) for each in ("src", "launch", "tests")]
from train.planted import ARCHITECTURES  # noqa: E402

FEW = ("llama", "qwen3_moe")
DTYPES = ("bfloat16", "float16", "float32")
Row = dict[str, Any]


def cases(dtype: str, name: str) -> Iterator[Any]:
    from train.planted import NORM, SMALL, Case

    model = ARCHITECTURES[name]
    yield Case(model, "lora", dtype, SMALL)
    if os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return
    yield Case(model, "full", dtype, NORM)
    if name in ("llama", "qwen3_moe"):
        yield Case(model, "lora", dtype, NORM, {"targets": "all-linear+experts"}, added=(7, 9))
        yield Case(model, "lora", dtype, NORM, stage=0)
    if name == "llama":
        yield Case(model, "lora", dtype, SMALL, {"dora": True})
        yield Case(model, "lora", dtype, NORM, {"rslora": True})
        if dtype == "bfloat16":
            yield Case(model, "qlora", dtype, NORM)


def measure(names: Iterable[str]) -> list[Row]:
    """One row for each architecture and dtype, over its cases."""
    from train.planted import sweep

    rows = []
    for name in names:
        for dtype in DTYPES:
            healthy, planted = [], []
            for case in cases(dtype, name):
                quiet = io.StringIO()
                with (
                    tempfile.TemporaryDirectory() as root,
                    contextlib.redirect_stdout(quiet),
                    contextlib.redirect_stderr(quiet),
                ):
                    checks, faults = sweep(Path(root), case)
                healthy += checks.values()
                planted += faults
            rows.append(_row(name, dtype, healthy, planted))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(name: str, dtype: str, healthy: list[Any], planted: list[Any]) -> Row:
    finite = [each for each in planted if math.isfinite(each.tensors)]
    mildest = min(finite, key=lambda each: each.tensors)
    by_logits = [each for each in planted if math.isfinite(each.logits)]
    return {
        "architecture": name,
        "dtype": dtype,
        "healthy": len(healthy),
        "passed": sum(each.verified for each in healthy),
        "worst_tensors": max(each.largest for each in healthy),
        "worst_logits": max(each.difference / each.tolerance for each in healthy),
        "rounding": max(each.rounding for each in healthy),
        "planted": len(planted),
        "caught": sum(each.caught for each in planted),
        "mildest_tensors": mildest.tensors,
        "mildest": f"{mildest.part}: {mildest.fault}",
        "by_logits": sum(each.logits > 1 for each in planted),
        "mildest_logits": min(each.logits for each in by_logits),
    }


def child(isa: str, names: Iterable[str]) -> list[Row]:
    """Measure in a process of its own, with oneDNN held to ``isa`` where that is not empty."""
    env = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    words = [sys.executable, __file__, "--measure", *names]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rows = []
        for line in process.stdout:
            if not line.startswith("{"):  # libraries print there, too
                continue
            rows.append(json.loads(line))
            print(isa or "all", line, end="", flush=True)
    if process.returncode:
        raise SystemExit(process.returncode)
    return rows


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| architecture | dtype | healthy | their worst tensor | their worst logits | planted | caught | "
        "mildest tensor | which | by logits alone | mildest logits |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --- | --: | --: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['architecture']} | {row['dtype']} | {row['passed']} of {row['healthy']} | "
            f"{row['worst_tensors']:.0e} | {row['worst_logits']:.2f} | {row['planted']} | {row['caught']} | "
            f"{row['mildest_tensors']:.1e} | {row['mildest']} | {row['by_logits']} | {row['mildest_logits']:.2f} |"
        )
    return lines


def document(measured: dict[str, list[Row]]) -> str:
    """The result, in Markdown."""
    import peft
    import torch
    import transformers

    from galley.export import logitcheck, lowrank

    every = [row for rows in measured.values() for row in rows]

    def total(key: str) -> int:
        return sum(row[key] for row in every)

    mildest = min(every, key=lambda row: row["mildest_tensors"])
    processor = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "?")
    amx = "with AMX" if any("amx_bf16" in line for line in _cpuinfo()) else "without AMX"
    head = f"""# Exports: the worst healthy and the mildest wrong one

{time.strftime("%Y-%m-%d")}, by `benchmarks/export_margin.py`: {processor} ({amx}), {platform.system()}, torch
{torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}.

Two-layer twins with made-up checkpoints, exported as adapters, as merged and as full models, then damaged in each way
that `tests/train/planted.py` knows and that applies, one at a time, and checked. **Tensors**: the largest difference
of a tensor from what it must be; of a merged one as a share of the adapter's change to it, of others as a share of
itself. 0: equal to the bit, or to one rounding. A merged tensor may differ by {lowrank.TOLERANCE:.0e}, others by
nothing. (Faults that show in names, ties, dtypes, scales or settings, or that do not load, have no such figure and are
caught by those.) **Logits**: the trained model's difference from fp32 over the largest that is taken for rounding,
which is {logitcheck.TIMES:.0f} times the exported model's own; up to 1 passes. "By logits alone" counts the planted
faults that logits without the tensors would have shown. The trained model's logits are computed with other kernels
(eager attention, one thread), as an engine's are.

Healthy exports passed: {total("passed")} of {total("healthy")}. Planted faults caught: {total("caught")} of
{total("planted")}; by logits alone: {total("by_logits")}. Worst healthy tensor:
{max(row["worst_tensors"] for row in every):.0e}; mildest wrong one: {mildest["mildest_tensors"]:.1e}
({mildest["architecture"]}, {mildest["dtype"]}, {mildest["mildest"]}), of a tensor that must be equal to the bit.
Worst healthy logits:
{max(row["worst_logits"] for row in every):.2f} of what is allowed.
"""
    parts = [head]
    for isa, rows in measured.items():
        what = f"oneDNN held to {isa}" if isa else f"All that the processor has ({amx})"
        rounding = {d: max(row["rounding"] for row in rows if row["dtype"] == d) for d in DTYPES}
        told = ", ".join(f"{dtype} {value:.1e}" for dtype, value in rounding.items())
        parts.append(f"\n## {what}\n\nLargest rounding of logits: {told} (relative).\n")
        parts.append("\n".join(table(rows)) + "\n")
    return "\n".join(parts)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main(words: list[str]) -> int:
    warnings.simplefilter("ignore")
    if words[:1] == ["--measure"]:
        measure(words[1:])
        return 0
    given = dict(word.split("=", 1) for word in words if "=" in word)
    names = FEW if "few" in words else tuple(ARCHITECTURES)
    kinds = ["", *filter(None, given.get("isa", "AVX512_CORE_BF16,AVX2").split(","))]
    measured = {isa: child(isa, names) for isa in kinds}
    path = ROOT / "benchmarks" / "results" / f"export-margin-{time.strftime('%Y-%m-%d')}.md"
    if "few" in words:
        print(document(measured))
    else:
        path.write_text(document(measured), encoding="utf-8")
        print(path)
    good = all(
        row["passed"] == row["healthy"] and row["caught"] == row["planted"]
        for rows in measured.values()
        for row in rows
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
