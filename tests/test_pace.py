"""Runs that are too short: how many steps, and which settings make them long enough."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import make_spec

from galley.contract import pace
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec


def spec(tmp_path: Path, **changes: Any) -> RunSpec:
    made = make_spec(RunDir(tmp_path), tmp_path, samples=changes.pop("samples", 16), world=2, micro=2)
    schedule = changes.pop("schedule", {})
    task = made.task.model_dump(mode="json") | {"duration": changes or {"epochs": 3}, "schedule": schedule}
    return RunSpec.model_validate(made.model_dump(mode="json", by_alias=True) | {"task": task})


def test_two_hundred_rows_in_seventeen_samples_are_told_to_take_smaller_steps(tmp_path: Path) -> None:
    (warning,) = pace.warnings(spec(tmp_path), 17)
    assert warning.startswith("only 4 optimizer steps from 17 samples")
    assert "set batch.samples=4 duration.epochs=12" in warning


def test_many_epochs_of_packed_rows_are_not_the_only_advice(tmp_path: Path) -> None:
    short = spec(tmp_path)
    data = short.task.data.model_copy(update={"packing": True})
    short = short.model_copy(update={"task": short.task.model_copy(update={"data": data})})
    (warning,) = pace.warnings(short, 17)
    assert warning.endswith("(or a data.max_length just above the longest row: more samples, fewer epochs)")
    (warning,) = pace.warnings(short, 30)
    assert warning.endswith("set batch.samples=4 duration.epochs=7")


def test_a_run_of_enough_steps_is_no_cause_for_a_word(tmp_path: Path) -> None:
    assert pace.warnings(spec(tmp_path), 400) == []


@pytest.mark.parametrize(("warmup", "told"), [(0.03, False), (0.4, False), (0.6, True), (0.999, True)])
def test_a_warm_up_that_takes_most_of_the_run_is_told(tmp_path: Path, warmup: float, told: bool) -> None:
    found = pace.warnings(spec(tmp_path, schedule={"warmup": warmup}, epochs=3), 400)
    assert [each for each in found if "schedule.warmup" in each] == found
    assert bool(found) is told


@pytest.mark.parametrize("duration", [{"steps": 10}, {"tokens": 16 * 64 * 10}])
def test_few_steps_that_were_asked_for_are_told_too(tmp_path: Path, duration: dict[str, int]) -> None:
    (warning,) = pace.warnings(spec(tmp_path, **duration), 17)
    assert warning.startswith("only 10 optimizer steps")
    assert f"duration.{next(iter(duration))}=" in warning


@given(samples=st.integers(1, 5000), per_step=st.sampled_from([4, 8, 16, 64]), epochs=st.integers(1, 8))
def test_the_settings_that_are_named_give_enough_steps(
    tmp_path_factory: pytest.TempPathFactory, samples: int, per_step: int, epochs: int
) -> None:
    short = spec(tmp_path_factory.mktemp("run"), samples=per_step, epochs=epochs)
    for warning in pace.warnings(short, samples):
        named = dict(re.findall(r"(batch\.samples|duration\.epochs)=(\d+)", warning))
        per_step, epochs = int(named.get("batch.samples", per_step)), int(named.get("duration.epochs", epochs))
        assert per_step % 4 == 0  # two ranks take micro-batches of two
        longer = spec(tmp_path_factory.mktemp("run"), samples=per_step, epochs=epochs)
        assert pace.warnings(longer, samples) == []
