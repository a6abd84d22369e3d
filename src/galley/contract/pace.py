"""How many optimizer steps a task takes, and whether they are enough to train on. Part of the contract.

Both planes ask: ``plan`` with an estimate of the samples, prepare and training with their number.
"""

from __future__ import annotations

from math import ceil

from galley.contract.spec import RunSpec, Schedule, Task

FEW_STEPS = 48
"""Fewer optimizer steps than this hardly change a model: most of them are warm-up or decay."""
MANY_EPOCHS = 10
"""More passes over the same rows than these cost time and teach them by heart: shorter samples make more steps."""


def total_samples(task: Task, samples: int) -> int:
    """Samples that a run draws over all its epochs, of ``samples`` prepared ones."""
    per_step, duration = task.samples_per_step, task.duration
    if duration.steps is not None:
        return duration.steps * per_step
    if duration.tokens is not None:
        return ceil(duration.tokens / (per_step * task.data.max_length)) * per_step
    return max(1, round((duration.epochs or 0) * samples))


def steps(task: Task, samples: int) -> int:
    """Optimizer steps of a run over ``samples`` prepared samples; the last may take fewer samples than the others."""
    return ceil(total_samples(task, samples) / task.samples_per_step)


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps in which the learning rate rises, of a run of ``steps``."""
    return round(schedule.warmup * steps)


def warnings(spec: RunSpec, samples: int, about: str = "") -> list[str]:
    """What is wrong with the length of a run over ``samples`` prepared samples, each with the setting that helps.

    ``about``: put before numbers that are estimates.
    """
    task, lines = spec.task, []
    count = steps(task, samples)
    if count < FEW_STEPS:
        unit = spec.placement.micro_batch * spec.placement.data_parallel  # a step's samples are a multiple of it
        lines.append(_few(task, samples, count, unit, about))
    rising = warmup_steps(task.schedule, count)
    if rising > 1 and 2 * rising > count:
        what = "never ends" if rising >= count else f"takes {rising} of {count} steps"
        lines.append(f"the warm-up {what}: set schedule.warmup to less than {task.schedule.warmup:g}, such as 0.03")
    return lines


def _few(task: Task, samples: int, count: int, unit: int, about: str) -> str:
    per_step = task.samples_per_step
    sample = f"packed sequences of up to {task.data.max_length:,} tokens" if task.data.packing else "one row each"
    why = f" from {about}{samples:,} samples ({sample}), {per_step} a step," if task.duration.epochs else ","
    number = f"{about}{count} optimizer step{'' if count == 1 else 's'}"
    return f"only {number}{why} which hardly changes a model: set {_remedies(task, samples, unit)}"


def _remedies(task: Task, samples: int, unit: int) -> str:
    """Settings that give at least ``FEW_STEPS`` steps, as they are typed: ``batch.samples=2 duration.epochs=6``."""
    if task.duration.steps:
        return f"duration.steps={FEW_STEPS} or more"
    if task.duration.tokens:
        return f"duration.tokens={FEW_STEPS * task.samples_per_step * task.data.max_length} or more"
    total = total_samples(task, samples)
    per_step = min(max(total // FEW_STEPS // unit * unit, unit), task.samples_per_step)
    key = f"batch.samples={per_step}" if task.batch.samples else f"batch.tokens={per_step * task.data.max_length}"
    settings = [key] if per_step < task.samples_per_step else []
    if total < FEW_STEPS * per_step:  # smaller steps alone are not enough
        epochs = ceil(FEW_STEPS * per_step / samples)
        settings.append(f"duration.epochs={epochs}")
        if task.data.packing and epochs > MANY_EPOCHS:
            settings.append("(or a data.max_length just above the longest row: more samples, fewer epochs)")
    return " ".join(settings)
