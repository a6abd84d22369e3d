"""The learning rate of a step: the loop's, not DeepSpeed's."""

from __future__ import annotations

from math import cos, pi

from galley.contract.pace import warmup_steps
from galley.contract.records import read_exit
from galley.contract.rundir import RunDir
from galley.contract.spec import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Rate of step ``step`` (from 1) of ``steps``: linear warm-up to ``peak``, then the schedule's curve.

    ``wsd`` is warm-up, stable, decay (Hu et al., MiniCPM, 2024), with a linear decay.
    """
    warmup = warmup_steps(schedule, steps)
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    falling = min(max(round(schedule.decay * steps), 1), steps - warmup) if schedule.kind == "wsd" else steps - warmup
    start = steps - falling
    progress = max(step - start, 0) / max(falling, 1)
    curve = (1 + cos(pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * curve)


def note_longer(run: RunDir, schedule: Schedule, peak: float, step: int, steps: int) -> str | None:
    """What a longer duration does to the rate of a run that goes on after ``step``; None unless it rises again."""
    records = [read_exit(attempt.exit) for attempt in run.attempts()]
    known = [record.steps for record in records if record and record.steps is not None]
    if not known or known[-1] >= steps or not 0 < step <= known[-1]:
        return None
    before, after = learning_rate(schedule, peak, step, known[-1]), learning_rate(schedule, peak, step + 1, steps)
    if after <= 1.01 * before:
        return None
    return (
        f"note: the duration grew from {known[-1]} to {steps} steps, and schedule.kind={schedule.kind} is laid over "
        f"all of them: the rate, {before:.2e} at step {step}, rises to {after:.2e}"
    )
