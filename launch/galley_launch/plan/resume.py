"""Whether a run directory may be trained in again: for the same task, as long or longer. Reads files, writes none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from galley.contract.errors import UserError
from galley.contract.records import read_exit
from galley.contract.rundir import RunDir
from galley.contract.spec import Duration, RunSpec

_UNITS = ("epochs", "steps", "tokens")

What = Literal["train", "export", "nothing"]


@dataclass(frozen=True)
class NextAction:
    """What starting this run would do."""

    what: What
    """``train``: prepare, train and export. ``export``: only the export is missing. ``nothing``: it is finished."""
    attempt: int
    """The attempt that this belongs to; a new one where it trains."""


def has_begun(run: RunDir) -> bool:
    """Whether a training step was taken. From then on the task is fixed."""
    rows = run.metrics.is_file() and run.metrics.stat().st_size > 0
    return rows or any((run.root / "checkpoints").glob("step-*/manifest.json"))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}{key}.") if isinstance(part, dict) else {prefix + key: part}
    return flat


def differences(old: RunSpec, new: RunSpec) -> list[str]:
    """Lines ``optimizer.lr: 0.0002 → 0.0001`` for every part of the task that differs, except the duration."""
    # As run.json has the values, for the message prints them. A key that one of the two lacks compares as None.
    before = _flat(old.task.model_dump(mode="json", exclude={"duration"}))
    after = _flat(new.task.model_dump(mode="json", exclude={"duration"}))
    paths = dict.fromkeys([*before, *after])
    changed = [path for path in paths if before.get(path) != after.get(path)]
    return [f"{path}: {before.get(path)} → {after.get(path)}" for path in changed]


def _unit(duration: Duration) -> str:
    """Which of epochs, steps and tokens is set; the contract allows exactly one."""
    return next(unit for unit in _UNITS if getattr(duration, unit) is not None)


def _check_duration(run: RunDir, old: Duration, new: Duration) -> None:
    """Raise ``UserError`` where the duration is in another unit than before, or shorter: it may only grow."""
    unit, new_unit = _unit(old), _unit(new)
    if new_unit != unit:
        todo = f"give duration.{unit}, or name=NEW for another run"
        raise UserError(str(run.root), f"its duration is in {unit}, not {new_unit}", todo)
    before, after = getattr(old, unit), getattr(new, unit)
    if after < before:
        todo = f"give duration.{unit}={before} or more, or name=NEW for another run"
        raise UserError(str(run.root), f"duration.{unit} would shrink: {before} → {after}", todo)


def check(run: RunDir, old: RunSpec, new: RunSpec) -> None:
    """Raise ``UserError`` where training has begun and ``new`` is another task or a shorter one."""
    if not has_begun(run):
        return
    changed = differences(old, new)
    if changed:
        todo = f"give name=NEW for another run, or remove this one: rm -r {run.root}"
        raise UserError(str(run.root), f"trains another task ({', '.join(changed)})", todo)
    _check_duration(run, old.task.duration, new.task.duration)


def is_done(run: RunDir, old: RunSpec, new: RunSpec) -> bool:
    """Whether training is finished at the duration that ``new`` asks for."""
    attempts = run.attempts()
    last = read_exit(attempts[-1].exit) if attempts else None
    return last is not None and last.verdict == "done" and old.task.duration == new.task.duration


def is_exported(run: RunDir) -> bool:
    """Whether the last attempt was exported. A folder ``export/`` does not tell: it may be of an earlier attempt."""
    attempts = run.attempts()
    last = read_exit(attempts[-1].exit) if attempts else None
    return last is not None and bool(last.exported)


def next_action(run: RunDir, old: RunSpec | None, new: RunSpec) -> NextAction:
    """What ``galley run`` would do for ``new`` in ``run``, whose ``run.json`` is ``old``. Raises as ``check`` does."""
    # The export of a finished run belongs to the attempt that trained; only training takes a new number.
    attempts = run.attempts()
    last = attempts[-1].number if attempts else 0
    if old is not None:
        check(run, old, new)
        if is_done(run, old, new):
            return NextAction("nothing" if is_exported(run) else "export", last)
    return NextAction("train", last + 1)
