"""What transformers would make of a folder's weights, told by their headers: only names and shapes are read.

The model and every tensor are on torch's meta device, and transformers loads the ones into the other with its own
renamings and conversions. What its report calls missing would be random numbers, trained in silence.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from galley.contract.errors import UserError
from galley.model.towers import auto_class
from galley.storage.weights import Header, read_headers

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Of safetensors' types those that a weight or a buffer may be stored in without being quantised."""
SHOWN = 3
_CONVERSION = re.compile(r"^(\S+) +\| +CONVERSION", re.MULTILINE)
_OTHER_TASK = re.compile(r"(Classification|QuestionAnswering|MultipleChoice|Reward\w*|Regression)$")
_OTHER_HEADS = ("score.", "classifier.", "classification_head.", "qa_outputs.", "v_head.", "reward_head.")
_ADAPTERS = (".lora_A.", ".lora_B.", ".base_layer.")


@dataclass(frozen=True)
class Report:
    """What loading would do."""

    model: Any
    """The model, on the meta device."""
    missing: list[str] = field(default_factory=list)
    """Parameters and buffers of the model that no tensor of the files fills."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors of the files that fill nothing."""
    mismatched: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """Name to the shape in the files and the shape in the model."""
    unconverted: list[str] = field(default_factory=list)
    """Parameters that transformers joins or splits from several tensors, which do not fit together."""


def check_loading(folder: Path, trust: bool) -> Report | None:
    """Raise :class:`UserError` unless the files of ``folder`` hold every weight of its model, in its shapes.

    Tensors that the model does not use are counted. None where transformers' own code for the architecture cannot be
    run on the meta device; ranks look at their loading reports too.
    """
    headers = read_headers(folder)
    _check_types(folder, headers)
    config, kind = _read_config(folder, trust)
    try:
        report = load_dry(config, kind or _class(config, trust), headers)
    except Exception as error:  # modelling code may raise anything
        print(f"warning: model.path: whether its files hold every weight is seen only when it loads ({_line(error)})")
        return None
    _check_task(folder, report)
    _check_missing(folder, report)
    _check_shapes(folder, report)
    _check_ties(folder, headers, report)
    if report.unexpected:
        names, kind = shorten(report.unexpected), type(report.model).__name__
        print(f"warning: model.path: {len(report.unexpected)} tensors of its files are not used by {kind}: {names}")
    return report


def _line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"


def _class(config: Any, trust: bool) -> Any:
    """The class of the model of ``config``, of which one is built on the meta device."""
    with torch.device("meta"), no_init_weights(), _quiet():
        return type(auto_class(config).from_config(copy.deepcopy(config), trust_remote_code=trust))


def _read_config(folder: Path, trust: bool) -> tuple[Any, Any]:
    """The configuration, which has the shapes that are asked for later, and its model's class.

    The class is None for a repository's own code, which need not know the meta device.
    """
    config: Any = None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        text = config.get_text_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            int(getattr(text, name))
        return config, None if trust else _class(config, trust)
    except Exception as error:  # its own validators, or modelling code, may raise anything
        kind = getattr(config, "model_type", "model")
        what = f"transformers makes no {kind} of '{folder}/config.json' ({_line(error)})"
        raise UserError("model.path", what, "give a text model whose config.json is complete") from None


def load_dry(config: Any, kind: Any, headers: dict[str, Header]) -> Report:
    """transformers' report of loading tensors with ``headers``, without the tensors, into a model of class ``kind``."""
    with torch.device("meta"), no_init_weights(), _quiet() as lines:
        tensors = {name: torch.empty(head["shape"], dtype=TYPES[head["dtype"]]) for name, head in headers.items()}
        how: dict[str, Any] = {"device_map": {"": "meta"}, "dtype": "auto", "ignore_mismatched_sizes": True}
        try:
            model, info = kind.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True, **how)
        except RuntimeError:
            unconverted = [name for line in lines for name in _CONVERSION.findall(line)]
            if not unconverted:
                raise
            return Report(kind(config), unconverted=unconverted)
    shapes = {name: (list(stored), list(wanted)) for name, stored, wanted in info["mismatched_keys"]}
    return Report(model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), shapes)


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep what transformers logs, and its bars, from the log; yields what it would have logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    before, level, passed_on = logger.handlers[:], logger.level, logger.propagate
    bars = transformers_logging.is_progress_bar_enabled()
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield lines
    finally:
        logger.handlers, logger.propagate = before, passed_on
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def shorten(names: list[str], shown: int = SHOWN) -> str:
    """The first few of ``names``; numbers of layers and experts become ``*``, so that names are of different kinds."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)) if len(names) > shown else names
    return ", ".join(kinds[:shown]) + (", …" if len(kinds) > shown else "")


def _check_types(folder: Path, headers: dict[str, Header]) -> None:
    for name, header in headers.items():
        packed = header["dtype"] in ("I8", "U8") and name.endswith("weight") and len(header["shape"]) > 1
        if packed or header["dtype"] not in TYPES:
            what = f"'{folder}' is already quantised: {name} is stored as {header['dtype']}"
            todo = "take the unquantised model (method.kind=qlora quantises it itself)"
            raise UserError("model.path", what, todo)


def _check_task(folder: Path, report: Report) -> None:
    """Refuse a model that was made for another task, and one that still has its adapter beside its weights."""
    listed = getattr(report.model.config, "architectures", None)
    named = listed if isinstance(listed, list) and listed else [""]
    head = next((name for name in report.unexpected if name.startswith(_OTHER_HEADS)), None)
    if head or _OTHER_TASK.search(str(named[0])):
        holds = f"its files hold {head}" if head else f"its config.json says {named[0]}"
        raise UserError(
            "model.path", f"'{folder}' is not a language model: {holds}", "give the model that it was made from"
        )
    if any(part in name for name in report.unexpected for part in _ADAPTERS):
        what = f"'{folder}' holds an adapter that is not merged ({shorten(report.unexpected, 1)})"
        raise UserError("model.path", what, "merge it first (peft: merge_and_unload), or give its base model")


def _check_missing(folder: Path, report: Report) -> None:
    if report.unconverted:
        what = (
            f"'{folder}': the tensors of {shorten(report.unconverted)} do not fit together, or one of them is missing"
        )
        raise UserError("model.path", what, "download the model again")
    if not report.missing:
        return
    wanted, lacking = report.model.state_dict(), len(report.missing)
    what = f"'{folder}' lacks {lacking} of the {len(wanted)} tensors of a {type(report.model).__name__}: "
    what += shorten(report.missing)
    if prefix := _prefix(report):
        raise UserError("model.path", f"{what}; its names begin with {prefix!r}", "save the model without that prefix")
    if report.unexpected:
        what += f" (and holds {len(report.unexpected)} that the model does not know: {shorten(report.unexpected)})"
    alone = lacking == 1 and report.missing[0].endswith("lm_head.weight")
    hint = "give the complete model, or set tie_word_embeddings to true where its head is its embedding"
    raise UserError("model.path", what, hint if alone else "give the complete model: what is missing would be random")


def _prefix(report: Report) -> str | None:
    """What every name in the files begins with, where the names are the model's beside that."""
    for name in report.missing:
        longer = next((stored for stored in report.unexpected if stored.endswith(f".{name}")), None)
        if longer:
            prefix = longer.removesuffix(name)
            return prefix if all(f"{prefix}{other}" in report.unexpected for other in report.missing) else None
    return None


def _check_shapes(folder: Path, report: Report) -> None:
    if not report.mismatched:
        return
    ends = [report.model.get_input_embeddings(), report.model.get_output_embeddings()]
    of_tokens = {
        f"{name}.weight" for name, module in report.model.named_modules() if any(module is end for end in ends)
    }
    for name, (stored, wanted) in sorted(report.mismatched.items()):
        if name in of_tokens and stored[1:] == wanted[1:]:
            what = f"{name} of '{folder}' has {stored[0]:,} rows, and its config.json a vocab_size of {wanted[0]:,}"
            raise UserError("model.path", what, f"set vocab_size to {stored[0]} there, where the tokenizer agrees")
    name, (stored, wanted) = min(report.mismatched.items())
    count = len(report.mismatched)
    what = f"{count} tensors of '{folder}' have other shapes than its config.json says, {name} {stored} for {wanted}"
    raise UserError("model.path", what, "give the config.json and the weights of one model")


def _check_ties(folder: Path, headers: dict[str, Header], report: Report) -> None:
    """Refuse two different matrices that config.json calls one: transformers trains both, or drops one under ZeRO-3."""
    stored = sources(report.model, headers)
    for one, other in report.model.all_tied_weights_keys.items():
        if {one, other} <= set(stored) and not _equal(headers, stored[one], stored[other]):
            what = f"the config.json of '{folder}' ties {one} to {other}, and its files hold two different matrices"
            todo = "set tie_word_embeddings to false there, or remove the one that is not meant from the files"
            raise UserError("model.path", what, todo)


def sources(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Parameter or buffer of ``model`` to the one of ``names`` (of its files) that fills it unconverted."""
    rules, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    filled = {}
    for name in names:
        # As transformers renames it; converted: the converter that would join it with others, or split it.
        key, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if key not in known and name in known:
            key, converted = name, None
        if key in known and converted is None:
            filled[key] = name
    return filled


def _equal(headers: dict[str, Header], one: str, other: str) -> bool:
    pair = []
    for name in (one, other):
        with safe_open(headers[name]["path"], "pt") as file:
            pair.append(file.get_tensor(name))
    coarser = min((tensor.dtype for tensor in pair), key=lambda dtype: dtype.itemsize)  # as both are once loaded
    return pair[0].shape == pair[1].shape and bool(torch.equal(pair[0].to(coarser), pair[1].to(coarser)))


def refuse_missing(folder: str, info: dict[str, Any]) -> None:
    """Raise ``UserError`` where transformers' ``output_loading_info`` names weights that were made at random."""
    if missing := sorted(info["missing_keys"]):
        what = f"'{folder}' lacks {len(missing)} tensors of the model: {shorten(missing)}"
        raise UserError("model.path", what, "give the complete model: what is missing would be random")
