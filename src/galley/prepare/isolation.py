"""Whether an architecture keeps packed documents apart: tried on a tiny stand-in with random weights, not believed.

Packed documents are told apart by their position ids only, which restart at 0. transformers' attention masks honour
that; a recurrence or a convolution over the sequence may not (state of one document flows into the next), and then
packing would train on contexts that do not exist.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley.contract.rundir import read_json, write_atomic
from galley.contract.spec import Model
from galley.storage.cache import digest, mark_used

VERSION = 3
TOLERANCE = 1e-4
LENGTHS = (23, 31)
VOCABULARY = 256
LARGEST = 400_000_000
# Weights larger than usual, so that a layer's leak is not lost beside the residual stream.
SPREAD = 0.05
SMALL = {
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCABULARY,
}


def packing_refused(folder: Path, model: Model, cache: Path) -> str | None:
    """Why the model in ``folder`` must not be packed; None where packed and separate logits agree to 1e-4.

    The answer is remembered in ``cache`` for each configuration, attention and version of torch and transformers.
    Raises :class:`UserError` where the architecture has no such attention at all.
    """
    from transformers import AutoConfig

    attention = "eager" if model.attention == "eager" else "sdpa"  # others need a GPU
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    reason: str | None = _remembered(config, attention, attention, model.trust_remote_code, cache)["reason"]
    return reason


def attends_by_document(folder: Path, model: Model, cache: Path) -> bool:
    """Whether :mod:`galley.model.attention` may compute the model's attention: its small copy's packed logits agree."""
    from transformers import AutoConfig

    from galley.model.attention import BY_DOCUMENT

    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    if model.attention not in ("sdpa", "varlen") or getattr(config.get_text_config(), "attention_dropout", None):
        return False
    return _remembered(config, "sdpa", BY_DOCUMENT, model.trust_remote_code, cache)["reason"] is None


def _remembered(config: Any, attention: str, packed: str, trust: bool, cache: Path) -> dict[str, Any]:
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    asked: list[Any] = [VERSION, versions, attention, repr(config)]
    if packed != attention:
        asked.append(packed)
    note = cache / "isolation" / f"{digest(asked)}.json"
    known = read_json(note)
    mark_used(note)
    if known is None:
        known = {"architecture": config.model_type, "attention": packed}
        known |= _verdict(config, attention, packed, trust)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps(known, indent=2) + "\n")
    return known


def _verdict(config: Any, attention: str, packed: str, trust: bool) -> dict[str, Any]:
    """``{error, reason}`` of a narrow stand-in, or of a wide one where an architecture cannot be made narrow."""
    from galley.model.towers import sees

    if sees(config.model_type) and getattr(config.get_text_config(decoder=True), "is_encoder_decoder", False):
        what = f"a {config.model_type} model has an encoder for its text: it is not a causal language model"
        raise UserError("model.path", what, "give a model that writes text")
    reason = ""
    for narrow in (True, False):
        try:
            error = measure(shrink(config, narrow), attention, trust, packed)
        except Exception as failure:  # third-party modelling code may raise anything; the answer is: do not pack
            if isinstance(failure, LooksAhead):
                what = (
                    f"a {config.model_type} model is bidirectional: each token sees those that it would have to predict"
                )
                raise UserError(
                    "model.path", what, "give a causal language model (is_decoder in config.json?)"
                ) from None
            if "does not support an attention implementation" in str(failure):
                what = f"a {config.model_type} model has no {attention} attention"
                raise UserError("model.attention", what, "use model.attention=eager") from None
            reason = f"its architecture could not be checked ({_line(failure)})"
            if sees(config.model_type) and not isinstance(failure, TooLarge):
                shown = f"as a tiny copy of it shows ({_line(failure)})"
                what = f"a {config.model_type} model does not run on text alone, {shown}"
                raise UserError("model.path", what, "give a model that writes text") from None
            continue
        reason = f"packed and separate documents differ by {error:.0e} in a {config.model_type} model"
        return {"error": error, "reason": reason if error > TOLERANCE else None}
    return {"error": None, "reason": reason}


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def shrink(config: Any, narrow: bool = True) -> Any:
    """A copy of a transformers configuration with few layers, yet every kind of layer; ``narrow``: few heads too."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    own = _take_overrides(text)
    layers, keep = int(text.num_hidden_layers), layers_needed(text, own)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and _names_layers(name, value):
            setattr(text, name, [index for index in value if index < keep])
        elif isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:keep])
    if narrow and getattr(text, "num_attention_heads", None):
        _shrink_width(text, keep, own)
    for name, value in SMALL.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(value, getattr(text, name)))
    text.num_hidden_layers = keep
    if own:
        text.per_layer_config = {layer: values for layer, values in own.items() if layer < keep}
    _shrink_towers(small)
    for part in {id(part): part for part in (small, text)}.values():  # one, where the text model is all
        part.vocab_size = VOCABULARY
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _unset(part, name)
        if small is not text:
            part.pad_token_id = 0  # what it puts in the place of an image's tokens
        part.initializer_range = SPREAD
    return small


def _unset(part: Any, name: str) -> None:
    """No such token; token 0 where the configuration insists on a number."""
    try:
        setattr(part, name, None)
    except Exception:  # its own validator, of whatever kind
        setattr(part, name, 0)


def _take_overrides(text: Any) -> dict[int, dict[str, Any]]:
    """Settings of single layers that differ from the model's (Gemma 4's heads), which are taken away from ``text``."""
    own = {int(layer): dict(values) for layer, values in (text.to_dict().get("per_layer_config") or {}).items()}
    if own:
        text.per_layer_config = None
    return own


def _shrink_towers(config: Any) -> None:
    """Few layers for what text does not pass through."""
    for name in getattr(config, "sub_configs", {}):
        tower = getattr(config, name, None)
        if tower is None or tower is config.get_text_config():
            continue
        for key in ("num_hidden_layers", "depth", "num_layers", "encoder_layers"):
            if isinstance(vars(tower).get(key), int):
                setattr(tower, key, 1)


def layers_needed(text: Any, own: dict[int, dict[str, Any]] | None = None) -> int:
    """How many of the first layers show every kind that the configuration lists; at least 2."""
    layers = int(text.num_hidden_layers)
    lists = {name: getattr(text, name, None) for name in {*vars(text), "layer_types", "layers_block_type"}}
    per_layer = [
        list(map(repr, values))
        for name, values in lists.items()
        if isinstance(values, list) and len(values) == layers and not _names_layers(name, values)
    ]
    if own:
        per_layer.append([repr(own.get(layer)) for layer in range(layers)])
    kinds = list(zip(*per_layer, strict=True))  # of each layer, its entry in every list
    if not kinds:
        return min(layers, 4)
    whole = set(kinds)
    needed = next(count for count in range(1, layers + 1) if set(kinds[:count]) == whole)
    return min(layers, max(2, needed))


def _names_layers(name: str, value: list[Any]) -> bool:
    """Whether a list holds layer numbers (``full_attn_idxs``), not one entry a layer."""
    numbers = all(type(item) is int for item in value) and len(set(value)) == len(value)
    return numbers and ("idx" in name or "layer" in name)


def _shrink_width(text: Any, layers: int, own: dict[int, dict[str, Any]]) -> None:
    """Fewer heads of the same size: rotary sections and the like depend on a head's size, not on their number."""
    heads, width = int(text.num_attention_heads), int(text.hidden_size)
    groups = getattr(text, "num_key_value_heads", None) or heads
    few = min(groups, 2)
    text.num_attention_heads = few * max(1, heads // groups)
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = few
    for values in own.values():  # the model's own numbers of heads, which divide its width
        for name in ("num_attention_heads", "num_key_value_heads"):
            values.pop(name, None)
    text.hidden_size = text.num_attention_heads * (width // heads)
    text.intermediate_size = [128] * layers if isinstance(getattr(text, "intermediate_size", 0), list) else 128
    keys, queries = (getattr(text, f"linear_num_{kind}_heads", None) for kind in ("key", "value"))
    if keys and queries:
        text.linear_num_key_heads, text.linear_num_value_heads = 2, 2 * (queries // keys)


def measure(config: Any, attention: str, trust: bool, together: str | None = None) -> float:
    """Largest relative difference of a token's logits between two documents in one row and each in its own.

    ``together``: the attention of those in one row, where it is another.
    """
    import torch

    from galley.model.towers import auto_class

    def build() -> Any:
        return auto_class(config).from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32, trust_remote_code=trust
        )

    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build().parameters())
    if size > LARGEST:
        raise TooLarge(f"its tiny copy still has {size:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        _check_causal(model)
        documents = [torch.randint(VOCABULARY, (1, length)) for length in LENGTHS]
        positions = [torch.arange(length)[None] for length in LENGTHS]
        apart = [_logits(model, *pair) for pair in zip(documents, positions, strict=True)]
        # Two rows, with the boundary in two places, as a micro-batch of packed samples has it.
        both = [_both_orders(pair) for pair in (documents, positions)]
        packed = _logits(model, *both) if together in (None, attention) else _by_document(model, together, *both)
    alone = _both_orders(apart)  # [2, 54, vocabulary], as `packed`
    difference = (packed - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-12)
    return float(difference.max())


class TooLarge(ValueError):
    """An architecture cannot be made small."""


class LooksAhead(Exception):
    """The model's tokens see those after them."""


def _check_causal(model: Any) -> None:
    """Raise :class:`LooksAhead` where the last token changes what the model says after those before it."""
    import torch

    tokens = torch.randint(VOCABULARY, (1, LENGTHS[0]))
    others = tokens.clone()
    others[0, -1] = (tokens[0, -1] + 1) % VOCABULARY
    positions = torch.arange(LENGTHS[0])[None]
    one, other = (_logits(model, ids, positions)[0, :-1] for ids in (tokens, others))
    if float((one - other).norm() / one.norm().clamp_min(1e-12)) > TOLERANCE:
        raise LooksAhead


def _by_document(model: Any, attention: str, tokens: Any, positions: Any) -> Any:
    from galley.data.batches import segments_of
    from galley.model.attention import documents

    model.set_attn_implementation(attention)
    with documents(segments_of(positions.numpy())):
        _logits(model.train(), tokens, positions)  # where attention drops out, it raises only now
        return _logits(model.eval(), tokens, positions)


def _both_orders(pieces: list[Any]) -> Any:
    import torch

    # Of pieces [1, 23, …] and [1, 31, …]: [2, 54, …], first and second in the one row, second and first in the other.
    return torch.cat([torch.cat(pieces, 1), torch.cat(pieces[::-1], 1)])


def _logits(model: Any, tokens: Any, positions: Any) -> Any:
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits
