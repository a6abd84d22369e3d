"""A profile on request: a trace that opens, and a table whose parts add up to the step."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir
from galley.train.profiling import PHASES, kind, table

SAMPLES = [[document] for document in make_documents(16)]


@pytest.mark.parametrize(
    ("operation", "is_a"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("gloo:all_reduce", "communication"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_log_softmax", "softmax and loss"),
        ("aten::copy_", "copies and casts"),
        ("aten::mul", "activations and norms"),
        ("bitsandbytes::dequantize_4bit", "quantised weights"),
        ("aten::arange", "other"),
    ],
)
def test_kinds(operation: str, is_a: str) -> None:
    assert kind(operation) == is_a


def test_the_table_adds_up() -> None:
    seconds = {"data": 0.1, "forward": 0.8, "backward": 1.6, "optimizer": 0.3, "all": 3.0}
    text = table([("aten::mm", 2.0, 40), ("aten::mul", 0.5, 100)], seconds, {"forward": 1.25}, steps=2)
    assert "1.500 s, the mean of 2 steps" in text
    assert "| forward | 0.400 | 26.7% | 1.25 |" in text
    assert "| sums, log, saving | 0.100 | 6.7% |  |" in text
    assert "| matrix products | 1.000 | 80.0% |" in text
    assert "| `aten::mm` | 1.000 | 20 |" in text


@pytest.mark.slow
def test_a_run_is_profiled(tmp_path: Path, llama: Path, train: Train) -> None:
    run, plain = RunDir(tmp_path / "run"), RunDir(tmp_path / "plain")
    for each, steps in ((run, 2), (plain, 0)):
        spec = make_spec(each, llama, world=2, steps=8, profile=steps)
        write_data(each, llama, SAMPLES, None, packed=False)
        train(each, spec)
    assert metrics(run) == metrics(plain), "it changes nothing"
    assert not plain.attempt(1).profile.exists()
    text = (run.attempt(1).profile / "table.md").read_text()
    rows = re.findall(r"^\| ([\w, ]+) \| [\d.]+ \| ([\d.]+)% \|", text.partition("| kind of")[0], re.MULTILINE)
    shares = {name: float(share) for name, share in rows}
    assert set(shares) == {*PHASES, "sums, log, saving"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert "| matrix products |" in text
    assert shares["backward"] > shares["data"]
    with gzip.open(run.attempt(1).profile / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"galley: forward", "galley: backward", "aten::mm"} <= names
