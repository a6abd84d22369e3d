"""A wrong export is told from rounding: faults planted in exports are caught, and healthy ones pass with room."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.planted import NORM, SMALL, Case, sweep

pytestmark = pytest.mark.slow

LLAMA, QWEN_MOE = "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-30B-A3B-Instruct-2507"
CASES = [
    Case(LLAMA, "lora", "bfloat16", SMALL, {"dora": True}),
    Case("qwen2 (biases)", "full", "float16", NORM),
    Case(QWEN_MOE, "lora", "float32", NORM, {"targets": "all-linear+experts"}, added=(7, 9)),
]


def check_sweep(root: Path, case: Case) -> None:
    healthy, faults = sweep(root, case)
    for check in healthy.values():
        assert check.verified, check
        assert check.largest == 0, "healthy weights are those of the checkpoint, to the bit or to one rounding"
        assert check.difference <= check.tolerance / 2, check
        assert check.agree == check.probes
    missed = [planted for planted in faults if not planted.caught]
    assert not missed
    assert len({(planted.part, planted.fault) for planted in faults}) >= 10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_wrong_export_is_told_from_rounding(tmp_path: Path, case: Case) -> None:
    check_sweep(tmp_path, case)
