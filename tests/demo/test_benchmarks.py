"""The benchmark's stop-watch, on a pretended trainer."""

import os
import sys
from pathlib import Path

import pytest
import rows
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
