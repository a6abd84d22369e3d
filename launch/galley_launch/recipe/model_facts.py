"""What is known of a model without loading it: from ``config.json``, a GGUF header, or a small bundled table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley.contract.files import parse_json, read_text
from galley.contract.headers import read_gguf


@dataclass(frozen=True)
class Facts:
    """Sizes of a model; None where a size is not known."""

    hidden_size: int | None = None
    layers: int | None = None
    vocab: int | None = None
    parameters: int | None = None


_LARGEST = 1 << 40
"""A larger number is not taken for a size."""
# Names of a size in config.json, the usual one first; the others are those of GPT-2, T5 and their descendants.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "vocab": ("vocab_size",),
}


def of_config(config: dict[str, Any]) -> Facts:
    """Facts from a parsed ``config.json``; of a vision-language model, those of its language model."""
    text = config.get("text_config")
    return Facts(**{fact: _size(text if isinstance(text, dict) else config, names) for fact, names in _NAMES.items()})


def _size(config: dict[str, Any], names: Iterable[str]) -> int | None:
    """The first of ``names`` that ``config`` gives a size for."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 < value < _LARGEST), None)


def of_gguf(path: Path) -> Facts:
    """Facts from the header of a GGUF file. Raises ``UserError`` where it is not one."""
    try:
        metadata = read_gguf(path, _is_complete)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            "model.path", f"{path} cannot be read ({reason})", "give a .gguf file, or download it again"
        ) from None
    return _from_metadata(metadata)


def _is_complete(metadata: dict[str, Any]) -> bool:
    """Whether all facts are known. Then reading stops, before the tokenizer's merges, which take long to read."""
    facts = _from_metadata(metadata)
    return None not in (facts.hidden_size, facts.layers, facts.vocab)


def _from_metadata(metadata: dict[str, Any]) -> Facts:
    arch = metadata.get("general.architecture")  # its name is part of the other keys: "llama.embedding_length"
    names = {"hidden_size": "embedding_length", "layers": "block_count", "vocab": "vocab_size"}
    facts = {fact: _size(metadata, [f"{arch}.{name}"]) for fact, name in names.items()}
    # read_gguf gives the length of an array, so the list of tokens stands for the size of the vocabulary.
    return Facts(**facts | {"vocab": facts["vocab"] or _size(metadata, ["tokenizer.ggml.tokens"])})


def table() -> dict[str, dict[str, Any]]:
    """The bundled table: hub id to facts, and to the shapes from which the number of parameters follows."""
    path = Path(__file__).with_name("models.json")
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return known


def of_table(hub_id: str) -> Facts:
    """Facts of a model in the bundled table; all None where it is not there."""
    known = table().get(hub_id, {})
    return Facts(**{fact.name: known.get(fact.name) for fact in fields(Facts)})


def _cached_config(hub_id: str) -> Path | None:
    """``config.json`` of a hub model that has been downloaded: the newest snapshot in huggingface_hub's cache."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    snapshots = (hub / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json")
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def of_model(path: str) -> Facts:
    """Facts of the model at ``path``: a folder, a ``.gguf`` file, or a hub id (all None where nothing is known)."""
    local = Path(path)
    if local.suffix == ".gguf" and local.is_file():
        return of_gguf(local)
    config = local / "config.json" if local.is_dir() else _cached_config(path)
    known = of_table(path)
    if config is None:
        return known
    try:
        body = parse_json(read_text(config))
    except (OSError, ValueError):
        raise UserError("model.path", f"{config} is not readable as JSON", "download the model again") from None
    if not isinstance(body, dict):
        raise UserError("model.path", f"{config} is not a JSON object", "download the model again")
    facts = of_config(body)  # a config.json does not have the number of parameters; the table may
    return Facts(facts.hidden_size, facts.layers, facts.vocab, known.parameters)
