"""The benchmarks: a stop-watch on a pretended trainer, tables, a figure, and small runs with models made here."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path

import cost
import cost_figure
import gpu
import gpu_table
import pytest
import rows
import silicon
import synthetic
import throughput
import watch

TRAINER = """
import json, os, subprocess, sys, time
if "RANK" not in os.environ:
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "RANK": str(r)}) for r in range(2)]
    sys.exit(max(rank.wait() for rank in ranks))
held = bytearray(60_000_000)
for step in range(4):
    time.sleep(0.5)
    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "a") as file:
            file.write(json.dumps({"step": step + 1, "tokens": 100}) + "\\n")
            file.write(json.dumps({"step": step + 1, "held_out_loss": 1.0}) + "\\n")
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
def test_steps_and_memory_are_seen_from_outside(tmp_path):
    script, steps = tmp_path / "trainer.py", tmp_path / "steps.jsonl"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), str(steps)]
    seen = watch.watch(command, dict(os.environ), steps, tmp_path / "log", limit_s=60)
    said = watch.summary(seen, warmup=2)
    assert seen.status == 0
    assert sorted(seen.ranks) == [0, 1]
    assert said["steady_steps"] == 2
    assert said["step_tokens"] == [100] * 4
    assert 10 < said["tokens_per_s"] < 250  # 100 tokens each half second, or longer on a busy machine
    assert 0.05 < said["peak_gb_a_rank"]["anonymous"] < 0.2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_a_command_is_killed_with_all_it_started_after_enough_steps(tmp_path):
    script, steps = tmp_path / "trainer.py", tmp_path / "steps.jsonl"
    script.write_text(TRAINER.replace("range(4)", "range(400)"))
    command = [sys.executable, str(script), str(steps)]
    began = time.monotonic()
    seen = watch.watch(command, dict(os.environ), steps, tmp_path / "log", limit_s=60, enough=2)
    assert time.monotonic() - began < 30
    assert len(seen.ends) == 2
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [each for each in running if str(script).encode() in each]


@pytest.mark.slow
def test_rows_are_the_same_each_time_and_conversations():
    made = rows.make(50)
    assert made == rows.make(50)
    assert {tuple(turn["role"] for turn in row["messages"]) for row in made} == {("user", "assistant")}


def test_the_table_divides_by_the_fastest_of_the_others():
    def result(who, speed):
        peak = {"rss": 3.0, "pss": 2.0, "anonymous": 1.0}
        return {"method": "lora", "contestant": who, "tokens_per_s": speed, "first_step_s": 9.0,
                "peak_gb_a_rank": peak, "steady_steps": 22}  # fmt: skip

    results = [result("galley", 300.0), result("trl-plain", 60.0), result("trl-packed", 120.0)]
    record = {"date": "2026-01-01", "results": results, "versions": {"galley": {"torch": "2"}},
              "setting": {"model": "m", "ranks": 2, "rows_sha256": "0" * 64},
              "hardware": {"cpu": "c", "cores": 2, "memory_gb": 8, "system": "s", "load_before": 0.1}}  # fmt: skip
    page = throughput.table(record)
    assert "| lora | Galley | 300.0 | 2.50 |" in page
    assert "| lora | TRL as it comes | 60.0 | 0.50 |" in page


def test_text_rows_have_exactly_the_tokens_that_were_asked_for(tmp_path):
    path = synthetic.write_rows(tmp_path / "rows.jsonl", 5, 64)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(set(texts)) == 5
    assert [len(synthetic.tokenizer()(text)["input_ids"]) for text in texts] == [63] * 5  # and one for the end


def gpu_result(method, who, speed, mfu):
    return {"method": method, "contestant": who, "tokens_per_s": speed, "mfu": mfu, "of_measured": mfu,
            "step_s": [1.0], "first_step_s": 9.0, "peak_memory_gb": 99.0}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "speed", "mfu", "reached"),
    [
        ("full", 9000.0, 0.56, "yes"), ("full", 9000.0, 0.54, "no"), ("lora", 15_000.0, 0.4, "yes"),
        ("lora", 14_999.0, 0.4, "no"), ("qlora", 8_000.0, 0.3, "yes"), ("qlora", 7_999.0, 0.3, "no"),
    ],
)  # fmt: skip
def test_targets_are_judged(method, speed, mfu, reached):
    mine = gpu_result(method, "galley", speed, mfu)
    results = [gpu_result("lora", "galley", 10_000.0, 0.3), mine] if method == "qlora" else [mine]
    assert gpu_table.target(mine, results)[1] == reached


@pytest.mark.skipif(bool(silicon.gpus()), reason="there is a GPU here")
def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "--toy" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_benchmark_runs_on_a_toy(tmp_path):
    command = [sys.executable, gpu.__file__, "--toy", "--out", str(tmp_path)]
    root = Path(gpu.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{root / 'launch'}:{root / 'src'}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page, record = (next(tmp_path.glob(f"gpu-toy-*.{kind}")) for kind in ("md", "json"))
    results = json.loads(record.read_text())["results"]
    assert [each["method"] for each in results] == ["full", "lora", "qlora"]
    for each in results:
        assert each["step_tokens"] == [2 * 64] * 3  # samples packed to the last token
        assert each["tokens_per_s"] > 0
        assert each["mfu"] == pytest.approx(each["of_measured"])  # a CPU has no data sheet
        assert 5 < each["loss"][0] < 8  # random weights: the log of the vocabulary
    assert "0.8 of LoRA's tokens/s" in page.read_text()


def test_the_whole_range_is_measured_once():
    todo = cost.points(cost.WHOLE)
    assert len(todo) == len(set(todo))
    for method in cost.METHODS:
        mine = [each for each in todo if each.method == method]
        assert {1, 2, 4} == {each.ranks for each in mine}
        assert {2, 6, 12, 30} == {each.layers for each in mine}
        assert {256, 8192} <= {each.length for each in mine}


def cost_record(failed=()):
    def result(point):
        return {"weights": 10_000_000 * point.layers, "tokens_per_s": 1000 / point.layers,
                "memory_gb": 1.0 + point.length / 512, "step_s": [1.0, 2.0]}  # fmt: skip

    todo = cost.points(cost.WHOLE)
    results = [asdict(point) | ({"failed": "no memory"} if point in failed else result(point)) for point in todo]
    box = {"cpu": "c", "cores": 2, "memory_gb": 8, "system": "s", "load_before": 0.1}
    return {"date": "2026-01-01", "hardware": box, "versions": {"torch": "2"}, "design": asdict(cost.WHOLE),
            "warmup": 2, "results": results}  # fmt: skip


def test_the_cost_figure_has_a_panel_for_each_question_and_the_page_what_is_missing(tmp_path):
    missing = cost.Point("full", 6, 8192, 1)
    cost_figure.write(cost_record(failed=[missing]), tmp_path / "cost")
    panels = {each.get("id") for each in ET.parse(tmp_path / "cost.svg").iter() if "axes_" in (each.get("id") or "")}
    assert panels == {f"axes_{number}" for number in range(1, 7)}
    page = (tmp_path / "cost.md").read_text()
    assert "| LoRA | 30 | 300 | 8192 | 1 | 33 | 17.00 | 1.50 (1.00, 2.00) |" in page
    assert "Not measured: full, 6 layers, 8192 tokens, ranks 1: no memory" in page
    assert "(cost.svg)" in page


@pytest.mark.slow
@pytest.mark.long
def test_a_point_of_the_cost_figure_is_a_run_of_the_command_line(tmp_path, monkeypatch):
    root = Path(cost.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root / 'launch'}:{root / 'src'}")
    seen = cost.run(cost.Point("lora", 1, 64, 2), cost.QUICK, tmp_path, 300)
    assert seen["tokens_a_step"] == 2 * 64  # both ranks' samples are full
    assert len(seen["step_s"]) == cost.MEASURED
    assert seen["weights"] == 2 * 512 * 64 + 64 * (64 + 32 + 32 + 64 + 3 * 128 + 2) + 64
    assert 0.1 < seen["memory_gb"] < 3
    late = cost.run(cost.Point("lora", 1, 64, 1), cost.QUICK, tmp_path, 1.0)
    assert "no time" in late["failed"]
