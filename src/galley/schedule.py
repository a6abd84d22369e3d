"""The learning rate of a step: the loop's, not DeepSpeed's."""

from __future__ import annotations

from math import cos, pi

from galley.spec import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """Rate of step ``step`` (from 1) of ``steps``: linear warm-up to ``peak``, then the schedule's curve.

    ``wsd`` is warm-up, stable, decay (Hu et al., MiniCPM, 2024), with a linear decay.
    """
    warmup = round(schedule.warmup * steps)
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    falling = min(max(round(schedule.decay * steps), 1), steps - warmup) if schedule.kind == "wsd" else steps - warmup
    start = steps - falling
    progress = max(step - start, 0) / max(falling, 1)
    curve = (1 + cos(pi * progress)) / 2 if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * curve)
