"""The batch, clipping and precision in a DeepSpeed JSON, compared with the recipe."""

from __future__ import annotations

from typing import Any

from galley.contract.errors import UserError
from galley_launch.base.problems import Difference, Findings, Problem, shown
from galley_launch.recipe.schema import Recipe

Config = dict[str, Any]

_MOST = 4096  # The largest micro-batch that is tried when a fitting one is looked for.
# DeepSpeed's names of the dtypes (runtime.config.DtypeEnum), by the recipe's.
_DTYPES = {
    "float32": ("fp32", "float32", "float", "torch.float32"),
    "bfloat16": ("bf16", "bfloat16", "torch.bfloat16"),
    "float16": ("fp16", "float16", "half", "torch.float16"),
}


def at(config: Config, path: str) -> Any:
    """The value at a dotted path; None where there is none, or where it is "auto"."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return None if value == "auto" else value


def dtype_of(name: Any) -> str | None:
    """The recipe's name of a dtype that DeepSpeed calls ``name``."""
    return next((dtype for dtype, names in _DTYPES.items() if name in names), None)


def accumulation(recipe: Recipe, ranks: int) -> int:
    """Micro-batches a step. Raises ``UserError`` with the whole product where the batch cannot be split so."""
    # samples a step = micro_batch x accumulation x ranks (DeepSpeed asserts the same), so accumulation is what divides.
    samples, step = recipe.samples_per_step, recipe.micro_batch * ranks
    if samples % step == 0:
        return samples // step
    # Suggestions: the multiples of micro_batch x ranks around the batch (-(-a // b) rounds up), in the unit that the
    # recipe uses, and the largest smaller micro-batch that fits.
    unit, factor = ("samples", 1) if recipe.batch.samples else ("tokens", recipe.data.max_length)
    below, above = samples // step * step * factor, -(-samples // step) * step * factor
    near = [f"batch.{unit}={value}" for value in (below, above) if value]
    fits = [size for size in range(1, min(recipe.micro_batch, _MOST)) if samples % (size * ranks) == 0]
    near += [f"micro_batch={fits[-1]}"] if fits else []
    what = (
        f"{samples} samples a step / (micro_batch {recipe.micro_batch} x ranks {ranks}) = {samples / step:.4g}, "
        "which is not a whole number of micro-batches"
    )
    raise UserError("batch", what, f"try {' or '.join(near)}")


def batch(config: Config, recipe: Recipe, ranks: int, findings: Findings) -> None:
    """The three keys of the batch, whose product with the ranks must be the recipe's batch."""
    samples, micro = recipe.samples_per_step, recipe.micro_batch
    whole, small, steps = (
        at(config, "train_batch_size"),
        at(config, "train_micro_batch_size_per_gpu"),
        at(config, "gradient_accumulation_steps"),
    )
    unit = f"batch.samples {samples}" if recipe.batch.samples else f"batch.tokens {recipe.batch.tokens}"
    # The micro-batch that the file has, else the largest up to the recipe's with which the file's batch can be split.
    fits = small or next(
        (size for size in range(min(micro, _MOST), 0, -1) if (whole or 0) % (size * ranks) == 0), micro
    )
    if whole not in (None, samples):
        smaller = [f"micro_batch={fits}"] if small is None and fits != micro else []
        because = f"{unit} makes it {samples}"
        findings.differences.append(
            Difference("train_batch_size", whole, because, (f"batch.samples={whole}", *smaller))
        )
    if small not in (None, micro):
        because = f"micro_batch {micro} makes it {micro}"
        findings.differences.append(
            Difference("train_micro_batch_size_per_gpu", small, because, (f"micro_batch={small}",))
        )
    if steps is not None:
        _steps(steps, whole, fits, recipe, ranks, findings)


def _steps(steps: int, whole: int | None, micro: int, recipe: Recipe, ranks: int, findings: Findings) -> None:
    """``gradient_accumulation_steps``: with a batch in the file, accumulation follows from it and a contradiction is a
    note (DeepSpeed would stop); without one, it determines the batch.
    """
    path, product, samples = "gradient_accumulation_steps", steps * micro * ranks, recipe.samples_per_step
    if whole is not None and product != whole:
        follows = f"{whole} samples a step / (micro_batch {micro} x ranks {ranks})"
        findings.notes.append(f"{path} {steps} is not used: it follows from {follows}")
    elif whole is None and samples != steps * recipe.micro_batch * ranks:
        need = f"{samples} samples a step / (micro_batch {recipe.micro_batch} x ranks {ranks})"
        because = f"{need} makes it {samples / (recipe.micro_batch * ranks):.4g}"
        findings.differences.append(Difference(path, steps, because, (f"batch.samples={product}",)))


def clipping(config: Config, recipe: Recipe, findings: Findings) -> None:
    """``gradient_clipping``, or the optimizer's ``max_grad_norm`` where the file has only that."""
    clip = recipe.optimizer.clip
    given, old = at(config, "gradient_clipping"), at(config, "optimizer.params.max_grad_norm")
    path = "gradient_clipping" if given is not None else "optimizer.params.max_grad_norm"
    given = given if given is not None else old
    if isinstance(given, bool) or not isinstance(given, int | float | None):
        findings.problems.append(Problem(f"{path} {shown(given)} is not a number", "write gradient_clipping instead"))
    elif given is not None and given != clip:
        because = f"optimizer.clip {clip} makes it {clip}"
        findings.differences.append(Difference(path, given, because, (f"optimizer.clip={given}",)))
    if old is not None:
        findings.notes.append("optimizer.params.max_grad_norm is ignored: DeepSpeed reads gradient_clipping")


def precision(config: Config, recipe: Recipe, stage: int, findings: Findings) -> None:
    """``fp16``, ``bf16``, ``torch_autocast`` and ``data_types``."""
    fp16, bf16 = at(config, "fp16.enabled"), at(config, "bf16.enabled")
    dtype = recipe.model.dtype
    if fp16 and bf16:
        findings.problems.append(Problem("fp16.enabled and bf16.enabled are both true", "keep one of them"))
        return
    autocast = _autocast(config, recipe, stage, findings)
    json_dtype = "bfloat16" if bf16 else "float16" if fp16 else _neither(fp16, bf16, dtype)
    # The block to name: the one that is on, or the one that is off although the recipe's dtype needs it.
    is_fp16 = fp16 or (json_dtype == "float32" and dtype == "float16")
    path, given = ("fp16.enabled", fp16) if is_fp16 else ("bf16.enabled", bf16)
    if json_dtype != dtype and not (autocast and json_dtype == "float32"):
        because = f"model.dtype {dtype} makes it {str(not given).lower()}"
        findings.differences.append(Difference(path, given, because, (f"model.dtype={json_dtype}",)))
    _data_types(config, recipe, json_dtype, findings)


def _neither(fp16: bool | None, bf16: bool | None, dtype: str) -> str:
    """The dtype where neither is on: fp32 if the file switches the recipe's ``dtype`` off, else that dtype."""
    given = {"float16": fp16, "bfloat16": bf16}.get(dtype)
    return "float32" if given is False else dtype


def _autocast(config: Config, recipe: Recipe, stage: int, findings: Findings) -> bool:
    """Whether the JSON computes under autocast; here that is how ZeRO-0 trains in bf16, and nothing else does."""
    on, name = at(config, "torch_autocast.enabled"), at(config, "torch_autocast.dtype")
    dtype = recipe.model.dtype
    if on and stage == 0:
        json_dtype = dtype_of(name) or "bfloat16"
        because = f"model.dtype {dtype} makes it {shown(dtype) if dtype != 'float32' else 'false'}"
        if json_dtype != dtype:
            words = (f"model.dtype={json_dtype}",) if json_dtype == "bfloat16" else ()
            todo = "" if words else "under ZeRO-0 only bfloat16 is computed so: change the file, or add take=recipe"
            findings.differences.append(Difference("torch_autocast.dtype", name or "bfloat16", because, words, todo))
        return True
    if on:
        because = f"under ZeRO-{stage} weights have the dtype that is computed in (model.dtype {dtype})"
        todo = "remove the block (take=recipe), or use stage 0: model.dtype is the precision"
        findings.differences.append(Difference("torch_autocast.enabled", True, because, (), todo))
    if on is False and stage == 0 and dtype == "bfloat16":
        findings.notes.append(
            "torch_autocast is on all the same: ZeRO-0 in bfloat16 trains fp32 weights under autocast"
        )
    return False


def _data_types(config: Config, recipe: Recipe, json_dtype: str, findings: Findings) -> None:
    name, grads = at(config, "data_types.grad_accum_dtype"), recipe.optimizer.grad_dtype
    given = dtype_of(name)
    if name is not None and given != grads:
        because = f"optimizer.grad_dtype {grads} makes it {shown({'float32': 'fp32', 'bfloat16': 'bf16'}[grads])}"
        words = (f"optimizer.grad_dtype={given}",) if given in ("float32", "bfloat16") else ()
        findings.differences.append(Difference("data_types.grad_accum_dtype", name, because, words))
    model = at(config, "data_types.param_dtype")
    if model is not None and dtype_of(model) != json_dtype:
        because = f"the weights are {json_dtype}"
        findings.differences.append(
            Difference("data_types.param_dtype", model, because, (), "remove it, or add take=recipe")
        )
    if at(config, "data_types.buffer_dtype") is not None:
        what = f"data_types.buffer_dtype {shown(at(config, 'data_types.buffer_dtype'))} would round rotary frequencies"
        findings.problems.append(Problem(what, "remove it: buffers keep their own dtype"))
