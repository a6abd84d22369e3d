"""What gets an adapter, what is trained in full beside it, and what of a full fine-tuning stays frozen."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model

from galley.contract.errors import UserError
from galley.contract.spec import Method
from galley.data.prepared import Manifest
from galley.model.linear import all_linear
from galley.model.towers import unused_by_text

EXPERTS = "all-linear+experts"
"""``method.targets``: also the experts of a mixture whose matrices are one parameter of three dimensions."""


def attach_adapter(base: Any, method: Method, manifest: Manifest) -> Any:
    """``base`` with a fresh adapter as peft makes it; tokens that the template added are trained beside it.

    Raises ``UserError`` for names that the model lacks, for what cannot be trained in full, and for what peft cannot
    do to the weights of experts.
    """
    modules, experts = _targets(base, method)
    towers = unused_by_text(base)
    _check_full(base, method)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        use_dora=method.dora,
        target_modules=modules,
        exclude_modules="|".join(rf"{re.escape(tower)}(\..*)?" for tower in towers) or None,
        target_parameters=experts or None,
        modules_to_save=list(method.full_modules) or None,
        trainable_token_indices=_added_rows(base, method, manifest.model.added_token_ids),
    )
    try:
        wrapped = get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        if "ParamWrapper" not in str(error):
            raise
        what = "experts' weights are adapted too, for which peft has neither DoRA nor dropout"
        raise UserError("method", what, "use method.dora=false method.dropout=0") from error
    # For whoever loads the adapter, the model as the user named it; set beforehand, peft warns of another.
    config.base_model_name_or_path = manifest.model.source
    return wrapped


def _added_rows(base: Any, method: Method, ids: list[int]) -> dict[str, list[int]] | None:
    """Rows of the embedding, and of the output head where that is another matrix: peft would train the first only,
    and added tokens would keep one logit between them. What is trained in full needs no rows.
    """
    names, tied = _ends(base)
    matrices = names[:1] if tied else names
    names = [name for name in matrices if not _any_ending(name, method.full_modules)]
    return {name.rpartition(".")[2]: ids for name in names} if ids and names else None


def _ends(base: Any) -> tuple[list[str], bool]:
    """Names of the embedding and the output head, and whether they are one matrix."""
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    names = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    return names, ends[0].weight is ends[1].weight


def fused_experts(base: Any) -> list[str]:
    """Names of parameters that hold one matrix for each expert of a mixture: no linear layer, so easily left out."""
    experts: list[str] = []
    towers = tuple(f"{name}." for name in unused_by_text(base))
    for path, module in base.named_modules():
        if not f"{path}.".startswith(towers) and not isinstance(
            module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
        ):
            named = module.named_parameters(prefix=path, recurse=False)
            # [experts, out, in]; under ZeRO-3 a parameter's own shape is [0], and ds_shape has the real one
            experts += [name for name, weight in named if len(getattr(weight, "ds_shape", weight.shape)) == 3]
    return experts


def _targets(base: Any, method: Method) -> tuple[str | list[str], list[str]]:
    """Modules and fused parameters that get an adapter, as peft takes them."""
    fused = fused_experts(base)
    if method.targets == "all-linear":
        return _linear(base), []
    if method.targets == EXPERTS:
        return _linear(base), sorted({_ending(name) for name in fused})
    experts = [ending for ending in method.targets if any(_ends_in(name, ending) for name in fused)]
    modules = [ending for ending in method.targets if ending not in experts]
    if not fused:  # of a mixture, peft knows older names too
        _check_known("method.targets", modules, (name for name, _ in base.named_modules()))
    return modules, experts


def _linear(base: Any) -> str | list[str]:
    """``all-linear``, which peft understands, or the names of layers where some that it stands for are left out."""
    wanted, without = all_linear(base)
    if not wanted:
        what = f"a {base.config.model_type} model has no linear layer that peft can adapt"
        raise UserError("method.targets", what, "use method.kind=full")
    return wanted if without else "all-linear"


def left_out(base: Any, method: Method) -> list[str]:
    """What ``all-linear`` leaves out, a line for each reason; asked before the adapter is there."""
    if isinstance(method.targets, list):
        return []
    without = all_linear(base)[1]
    reasons = dict.fromkeys(without.values())
    return [_without([name for name, why in without.items() if why == reason], reason) for reason in reasons]


def missed(base: Any, method: Method) -> list[str]:
    """What ``all-linear`` means and peft has not adapted, a line; ``base`` has its adapter by now.

    peft knows some families' older names, in which a shared expert's layers are called as the experts'.
    """
    if isinstance(method.targets, list):
        return []
    adapted = {name.removesuffix(".base_layer") for name, module in base.named_modules() if hasattr(module, "lora_A")}
    inside = tuple(f"{name}." for name in adapted)
    names = [name for name in all_linear(base)[0] if name not in adapted and not name.startswith(inside)]
    return [_without(names, "peft takes their names for those of the experts")] if names else []


def _without(names: list[str], reason: str) -> str:
    kinds: dict[str, int] = {}
    for name in names:
        kinds[_ending(name)] = kinds.get(_ending(name), 0) + 1
    shown = ", ".join(f"{count} x {ending}" for ending, count in list(kinds.items())[:4])
    more = f", … ({len(names)} in all)" if len(kinds) > 4 else ""
    return f"no adapter on {shown}{more}: {reason}"


def experts_without(wrapped: Any) -> list[str]:
    """Endings of experts' weights that got no adapter. (For the families that it knows, peft's all-linear has them.)"""
    adapted = {module.parameter_name for module in wrapped.modules() if hasattr(module, "parameter_name")}
    names = {_ending(name).replace("base_layer.", "") for name in fused_experts(wrapped)}
    return sorted(name for name in names if name.rpartition(".")[2] not in adapted)


def _ending(name: str) -> str:
    """``mlp.experts.down_proj`` of ``model.layers.0.mlp.experts.down_proj``: what is the same in each layer."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _any_ending(name: str, endings: Iterable[str]) -> bool:
    return any(_ends_in(name, ending) for ending in endings)


def _check_known(where: str, endings: Iterable[str], names: Iterable[str]) -> None:
    known = [name for name in names if name]
    for ending in endings:
        if not any(_ends_in(name, ending) for name in known):
            raise UserError(where, f"the model has no {ending!r}", _nearest(ending, {_ending(name) for name in known}))


def _nearest(word: str, known: Iterable[str]) -> str:
    leaves = {name.rpartition(".")[2] for name in known} if "." not in word else set(known)
    nearest = difflib.get_close_matches(word, sorted(leaves), n=1, cutoff=0.0)
    return f"did you mean {nearest[0]!r}?" if nearest else "leave it out"


def _check_full(base: Any, method: Method) -> None:
    modules = dict(base.named_modules())
    _check_known("method.full_modules", method.full_modules, modules)
    names, tied = _ends(base)
    for ending in method.full_modules:
        if tied and any(_any_ending(name, [ending]) for name in names):
            what = f"{ending!r} is tied: embedding and output head are one matrix, of which peft would train two copies"
            raise UserError("method.full_modules", what, "leave it out, or use method.kind=full with method.freeze")
        for name in (name for name in modules if _ends_in(name, ending)):
            weights = modules[name].parameters()
            if any(hasattr(weight, "quant_state") or weight.dtype == torch.int8 for weight in weights):
                what = f"{ending!r} has quantised weights, which cannot be trained"
                raise UserError("method.full_modules", what, "leave it out, or use method.kind=lora")


def freeze(model: Any, patterns: list[str]) -> None:
    """Keep the weights that match any glob pattern over parameter names (a tied weight's second name too) as they are.

    Raises ``UserError`` for a pattern that matches nothing, and where nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [weight for name, weight in named if fnmatchcase(name, pattern)]
        if not matched:
            todo = _nearest(pattern, [name for name, _ in named]).replace("did you mean", "the nearest weight is")
            raise UserError("method.freeze", f"{pattern!r} matches no weight", todo.rstrip("?"))
        for parameter in matched:
            parameter.requires_grad_(False)
    if patterns and not any(weight.requires_grad for _, weight in named):
        raise UserError("method.freeze", f"{patterns} leaves nothing to train", "freeze less")
