"""A duration that grows after the rate has fallen raises it again, which is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from galley.contract.rundir import RunDir
from galley.contract.spec import Schedule
from galley.train.schedule import learning_rate, note_longer


def ended(root: Path, **end: Any) -> RunDir:
    run = RunDir(root)
    run.attempt(1).root.mkdir(parents=True)
    run.attempt(1).exit.write_text(json.dumps(end))
    return run


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_a_longer_duration_after_the_end_of_a_curve_is_noted(tmp_path: Path, kind: Any) -> None:
    schedule = Schedule(kind=kind)
    run = ended(tmp_path, verdict="done", step=100, steps=100)
    note = note_longer(run, schedule, 1e-3, 100, 300)
    assert note is not None
    assert "the duration grew from 100 to 300 steps" in note
    assert f"schedule.kind={kind}" in note
    assert note.endswith(f"{learning_rate(schedule, 1e-3, 100, 100):.2e} at step 100, rises to "
                         f"{learning_rate(schedule, 1e-3, 101, 300):.2e}")  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "end", "step", "steps"),
    [
        (Schedule(kind="constant"), {"steps": 100}, 100, 300),
        (Schedule(), {"steps": 100}, 50, 100),
        (Schedule(), {"steps": 300}, 100, 200),
        (Schedule(), {}, 100, 200),
        (Schedule(), {"steps": 100}, 0, 200),
        (Schedule(), {"steps": "100"}, 100, 200),
    ],
)
def test_what_does_not_raise_the_rate_is_not_noted(
    tmp_path: Path, schedule: Schedule, end: dict[str, Any], step: int, steps: int
) -> None:
    assert note_longer(ended(tmp_path, **end), schedule, 1e-3, step, steps) is None
