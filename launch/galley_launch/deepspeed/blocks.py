"""The ``optimizer`` and ``scheduler`` blocks of a user's DeepSpeed JSON, compared with the recipe's keys for the same.

DeepSpeed's own optimizers and schedulers are not used: the loop makes both from the recipe.
"""

from __future__ import annotations

from typing import Any

from galley_launch.base.problems import Difference, Findings, Problem, clip, closest, shown
from galley_launch.deepspeed.batch import at
from galley_launch.deepspeed.keys import is_comment, table
from galley_launch.recipe.schema import Recipe

Config = dict[str, Any]

# DeepSpeed's "Adam" is AdamW unless adam_w_mode is false (runtime/engine.py, _configure_basic_optimizer).
_OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "lion": "lion"}
_GONE = ("OneBitAdam", "ZeroOneAdam", "OneBitLamb")  # former optimizers of DeepSpeed, with compressed communication
_NUMBERS = ("lr", "eps", "weight_decay")
# Parameters of how a step is computed, which do not change its result: ignored.
_IMPLEMENTATION = (
    "torch_adam",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "set_grad_none",
    "fp32_optimizer_states",
)
# Parameters with which it would be another optimizer: the value at which it is the same one, and what it would be.
_ANOTHER = {
    "adam_w_mode": (True, "Adam, whose decay goes through the moments; here it is AdamW"),
    "bias_correction": (True, "moments without their correction in the first steps"),
    "amsgrad": (False, "AMSGrad"),
    "maximize": (False, "ascent"),
}
# The recipe's schedules by DeepSpeed's type: after the warm-up, WarmupLR stays at the peak, WarmupDecayLR falls to 0.
_CURVES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_SCHEDULED = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps", "cos_min_ratio")
_MINOR = 0.1  # A warm-up that begins below this share of the rate differs little from one that begins at 0.


def optimizer(config: Config, recipe: Recipe, findings: Findings) -> None:
    """Compare the ``optimizer`` block with the recipe's optimizer."""
    block = config.get("optimizer")
    if not isinstance(block, dict):
        return
    kind = at(block, "type")
    # A type that DeepSpeed knows but Galley has no counterpart for is a difference that no setting removes.
    same = _OPTIMIZERS.get(str(kind).lower())
    if kind is not None and not _known_optimizer(kind, same, findings):
        return
    own = recipe.optimizer
    if kind is not None and same != own.name:
        because = f"the recipe has optimizer.name {own.name}"
        words = (f"optimizer.name={same}",) if same else ()
        todo = "there is no such optimizer here: use AdamW or Lion, or add take=recipe"
        findings.differences.append(Difference("optimizer.type", kind, because, words, todo))
        if not same:
            return
    params = _params(block, "optimizer", findings)
    _another(params, kind, findings)
    for name, value in params.items():
        if (
            value not in (None, "auto")
            and name not in _IMPLEMENTATION
            and name not in _ANOTHER
            and name != "max_grad_norm"
        ):
            _parameter(name, value, config, recipe, findings)


def _known_optimizer(kind: Any, same: str | None, findings: Findings) -> bool:
    """Whether DeepSpeed has, or had, such an optimizer; if not, a problem. ``same``: the recipe's name for it."""
    names = table()["optimizers"]
    if same or kind in names or str(kind).lower() in (*names, *(name.lower() for name in _GONE)):
        return True
    near = closest(str(kind), names, cutoff=0.7)
    todo = f"did you mean { ({'adam': 'Adam', 'adamw': 'AdamW', 'lion': 'Lion'}.get(near, near))!r}?" if near else ""
    findings.problems.append(
        Problem(f"optimizer.type {shown(kind)} is not one of DeepSpeed's", todo or "use AdamW or Lion")
    )
    return False


def _params(block: Config, name: str, findings: Findings) -> Config:
    """The ``params`` of the ``optimizer`` or ``scheduler`` block, without comments; empty where they are no object."""
    params = at(block, "params")
    if isinstance(params, dict) or params is None:
        known = (*_NUMBERS, "betas", *_IMPLEMENTATION, *_ANOTHER) if name == "optimizer" else _SCHEDULED
        return {key: value for key, value in (params or {}).items() if not is_comment(key, known)}
    keys = "lr, betas, eps, weight_decay" if name == "optimizer" else "warmup_max_lr, warmup_num_steps, total_num_steps"
    findings.problems.append(Problem(f"{name}: params {shown(params)} is not an object", f"its keys: {keys}"))
    return {}


def _another(params: Config, kind: Any, findings: Findings) -> None:
    """Refuse parameters that mean another optimizer."""
    for name, (same, what) in _ANOTHER.items():
        value = params.get(name)
        if value in (None, "auto") or (value is same):  # `is`, because 1 == True
            continue
        if name == "adam_w_mode" and value is False and str(kind).lower() == "adamw":
            findings.notes.append("optimizer.params.adam_w_mode is ignored, as DeepSpeed does for AdamW")
            continue
        path = f"optimizer.params.{name}"
        if isinstance(value, bool):
            todo = f"write {shown(same)} or remove it"
            findings.problems.append(Problem(f"{path} {shown(value)} means another optimizer: {what}", todo))
        else:
            findings.problems.append(Problem(f"{path} {shown(value)} is not true or false", "remove it"))


def _parameter(name: str, value: Any, config: Config, recipe: Recipe, findings: Findings) -> None:
    path, own = f"optimizer.params.{name}", recipe.optimizer
    if name == "betas":
        pair = value if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) else None
        if pair is None or not all(0 <= beta < 1 for beta in pair):
            findings.problems.append(
                Problem(f"{path} {shown(value)} is not two numbers from 0 to 1", "write [0.9, 0.95]")
            )
        elif list(pair) != list(own.betas):
            words = (f"optimizer.betas=[{pair[0]},{pair[1]}]",)
            findings.differences.append(Difference(path, value, f"the recipe has {list(own.betas)}", words))
        return
    if name not in _NUMBERS:
        near = closest(name, [*_NUMBERS, "betas"])
        todo = f"did you mean {near!r}?" if near else "remove it"
        findings.problems.append(Problem(f"optimizer: no parameter {clip(name)!r}", todo))
        return
    positive = name != "weight_decay"
    if not _is_number(value) or value < 0 or (positive and value == 0):
        means = "a number above 0" if positive else "a number from 0"
        findings.problems.append(Problem(f"{path} {shown(value)} is not {means}", _without_quotes(value)))
    elif name == "lr" and _peak_of_scheduler(config) not in (None, value):
        findings.notes.append(f"{path} {shown(value)} gives way to scheduler.params.warmup_max_lr, as in DeepSpeed")
    elif value != getattr(own, name):
        because = f"the recipe has {getattr(own, name)}"
        findings.differences.append(Difference(path, value, because, (f"optimizer.{name}={value}",)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e18


def _without_quotes(value: Any) -> str:
    try:
        return f"write {float(value)} without quotes" if isinstance(value, str) else "write such a number"
    except ValueError:
        return 'write such a number, or "auto"'


def _peak_of_scheduler(config: Config) -> Any:
    """The ``warmup_max_lr`` that the scheduler has, which overrides the optimizer's rate; None where it has none."""
    block = config.get("scheduler")
    if not isinstance(block, dict) or at(block, "type") not in ("WarmupLR", "WarmupDecayLR"):
        return None
    peak = at(block, "params.warmup_max_lr")
    return peak if _is_number(peak) else None


def scheduler(config: Config, recipe: Recipe, findings: Findings) -> None:
    """Compare the ``scheduler`` block with the recipe's schedule: its type even where every parameter is "auto"."""
    block = config.get("scheduler")
    if not isinstance(block, dict):
        return
    kind, kinds = at(block, "type"), table()["schedulers"]
    if kind is not None and kind not in kinds:
        near = closest(str(kind), kinds)
        todo = f"did you mean {near!r}?" if near else f"DeepSpeed's are {', '.join(kinds)}; or remove the block"
        findings.problems.append(Problem(f"scheduler.type {shown(kind)} is not one of DeepSpeed's", todo))
        return
    curve = _CURVES.get(kind or "")  # None: a schedule of DeepSpeed's that Galley has no counterpart for
    if kind is not None and curve != recipe.schedule.kind:
        because = f"the recipe has schedule.kind {recipe.schedule.kind}"
        words = (f"schedule.kind={curve}",) if curve else ()
        todo = "there is no such schedule here: use WarmupCosineLR, WarmupDecayLR or WarmupLR, or add take=recipe"
        findings.differences.append(Difference("scheduler.type", kind, because, words, todo))
        if not curve:
            return
    params = {key: value for key, value in _params(block, "scheduler", findings).items() if value not in (None, "auto")}
    known = kinds[kind] if kind else sorted({name for type_ in _CURVES for name in kinds[type_]})
    # Over a copy of the names, because the loop deletes from `params`.
    for name in [name for name in params if name not in known]:
        near = closest(name, known)
        todo = f"did you mean {near!r}?" if near else f"{kind} takes {', '.join(known)}"
        findings.problems.append(
            Problem(f"scheduler: {kind or 'no scheduler'} takes no parameter {clip(name)!r}", todo)
        )
        del params[name]
    _curve_parameters(params, recipe, findings)


def _curve_parameters(params: Config, recipe: Recipe, findings: Findings) -> None:
    kind = params.pop("warmup_type", "linear")
    if kind not in ("log", "linear"):
        what = f"scheduler.params.warmup_type {shown(kind)} is not one of log, linear"
        findings.problems.append(Problem(what, "choose linear: warm-up is a line here"))
    elif kind == "log":
        findings.notes.append("scheduler.params.warmup_type log is not used: the warm-up is a line here")
    if params.pop("last_batch_iteration", -1) != -1:
        findings.notes.append("scheduler.params.last_batch_iteration is not used: a run goes on from its checkpoint")
    for name in [name for name, value in params.items() if not _is_number(value) or value < 0]:
        what = f"scheduler.params.{name} {shown(params.pop(name))} is not a number from 0"
        findings.problems.append(Problem(what, 'write such a number, or "auto"'))
    _rates(params, recipe, findings)
    _lengths(params, recipe, findings)


def _rates(params: Config, recipe: Recipe, findings: Findings) -> None:
    """Compare the peak rate, the lowest one (as a share of the peak) and the one that the warm-up begins at."""
    peak, lowest, path = recipe.optimizer.lr, recipe.schedule.min_lr_ratio, "scheduler.params"
    top = params.get("warmup_max_lr")
    if top == 0:
        findings.problems.append(Problem(f"{path}.warmup_max_lr 0 would train nothing", 'write the rate, or "auto"'))
    elif top not in (None, peak):
        difference = Difference(f"{path}.warmup_max_lr", top, f"the recipe has {peak}", (f"optimizer.lr={top}",))
        findings.differences.append(difference)
    ratio = params.get("cos_min_ratio")
    if ratio not in (None, lowest):
        because = f"the recipe has schedule.min_lr_ratio {lowest}"
        words = (f"schedule.min_lr_ratio={ratio}",) if ratio < 1 else ()
        findings.differences.append(Difference(f"{path}.cos_min_ratio", ratio, because, words))
    # WarmupLR begins at a rate (warmup_min_lr), WarmupCosineLR at a share of the peak (warmup_min_ratio).
    for name, whole in (("warmup_min_lr", top or peak), ("warmup_min_ratio", 1.0)):
        first = params.get(name) or 0
        if 0 < first <= _MINOR * whole:
            findings.notes.append(f"{path}.{name} {shown(first)} is not used: the warm-up begins at 0 here")
        elif first:
            because = "the warm-up begins at 0 here"
            todo = "set schedule.warmup=0 and remove it, or add take=recipe"
            findings.differences.append(Difference(f"{path}.{name}", first, because, (), todo))


def _lengths(params: Config, recipe: Recipe, findings: Findings) -> None:
    """Compare the numbers of warm-up steps and of all steps.

    The recipe's warm-up is a share of the run (``schedule.warmup``), DeepSpeed's is in steps: they can only be compared
    where the number of all steps is known, from the file or from ``duration.steps``.
    """
    warm_up, total, path = params.get("warmup_num_steps"), params.get("total_num_steps"), "scheduler.params"
    steps = recipe.duration.steps
    for name, value in (("warmup_num_steps", warm_up), ("total_num_steps", total)):
        if value is not None and value != int(value):
            findings.problems.append(Problem(f"{path}.{name} {shown(value)} is not a whole number", "write one"))
            return
    if total == 0:
        findings.problems.append(Problem(f"{path}.total_num_steps 0 is too few", 'write the steps, or "auto"'))
        return
    if total not in (None, steps):
        because = f"the recipe runs for {_duration(recipe)}"
        findings.differences.append(
            Difference(f"{path}.total_num_steps", total, because, (f"duration.steps={int(total)}",))
        )
    if warm_up is not None:
        _warm_up(int(warm_up), int(total or steps or 0), recipe.schedule.warmup, findings)


def _warm_up(steps: int, total: int, share: float, findings: Findings) -> None:
    """``steps`` of warm-up in the file, ``share`` in the recipe; ``total`` steps, 0 where their number is not known."""
    path = "scheduler.params.warmup_num_steps"
    if round(share * total) == steps and (total or share == 0):
        return
    if steps == 0 or steps < total:
        steps_of_recipe = f": {round(share * total)} steps" if total else ""
        because = f"the recipe has schedule.warmup {share:g}{steps_of_recipe}"
        findings.differences.append(Difference(path, steps, because, (f"schedule.warmup={_share(steps, total)}",)))
        return
    because = f"schedule.warmup {share:g} is a share of the run's {total or 'steps, whose number is not known yet'}"
    todo = "set schedule.warmup in the recipe and remove it, set duration.steps too, or add take=recipe"
    findings.differences.append(Difference(path, steps, because, (), todo, minor=not total))


def _share(steps: int, total: int) -> str:
    """The shortest decimal that, of ``total`` steps, rounds to ``steps``: ``0.03`` for 30 of 1000."""
    # 17 significant digits identify every double, so one of the texts always rounds right.
    exact = steps / total if total else 0.0
    texts = (f"{exact:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if round(float(text) * total) == steps)


def _duration(recipe: Recipe) -> str:
    duration = recipe.duration
    unit = next((name for name in ("epochs", "steps", "tokens") if getattr(duration, name) is not None), "epochs")
    return f"duration.{unit} {getattr(duration, unit)}"
