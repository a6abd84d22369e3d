"""What a run will do, in a few lines for people."""

from __future__ import annotations

from galley.contract.spec import RunSpec
from galley_launch.base.numbers import count
from galley_launch.recipe.model_facts import Facts


def _duration_of(spec: RunSpec) -> str:
    duration = spec.task.duration
    for unit in ("epochs", "steps", "tokens"):
        value = getattr(duration, unit)
        if value is not None:
            return f"{value:g} {unit.removesuffix('s') if value == 1 else unit}"
    return ""


def _method_of(spec: RunSpec) -> str:
    method = spec.task.method
    return "full" if method.kind == "full" else f"{method.kind} rank {method.rank} alpha {method.alpha:g}"


def summary(spec: RunSpec, facts: Facts) -> list[tuple[str, str]]:
    """What a run will do, as keys and texts. The batch is shown as the product that it comes from."""
    task, place = spec.task, spec.placement
    size = f", {count(facts.parameters)} parameters" if facts.parameters else ""
    product = f"micro_batch {place.micro_batch} x accumulation {place.accumulation} x ranks {place.data_parallel}"
    samples = task.samples_per_step  # of all ranks together: micro_batch x accumulation x ranks
    ranks = f"{place.ranks_per_node} rank{'s' if place.ranks_per_node > 1 else ''}"
    where = "CPU" if place.device == "cpu" else f"GPU {','.join(place.gpus)}" if place.gpus else "GPU"
    nodes = f"{place.nodes} nodes of " if place.nodes > 1 else ""
    held = f", {task.data.held_out:.3g} of it held out" if task.data.held_out else ""
    rows = {
        "run": f"{spec.name} in {place.paths.run}",
        "model": f"{task.model.path}{size}, {task.model.dtype}",
        "data": f"{', '.join(source.path for source in task.data.listed())}{held}",
        "method": f"{_method_of(spec)}, {task.optimizer.name} lr {task.optimizer.lr:g}, {task.schedule.kind}",
        "batch": f"{samples} samples a step = {product}; up to {count(samples * task.data.max_length)} tokens",
        "for": _duration_of(spec),
        "on": f"{where}, {nodes}{ranks}, ZeRO-{place.zero_stage}",
    }
    return list(rows.items())
