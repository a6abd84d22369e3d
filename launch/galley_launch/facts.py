"""What is known of a model without loading it: from ``config.json``, a GGUF header, or a small bundled table."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from galley.errors import UserError


@dataclass(frozen=True)
class Facts:
    """Sizes of a model; None where nothing says so."""

    hidden_size: int | None = None
    layers: int | None = None
    vocab: int | None = None
    parameters: int | None = None


# Where configurations say the same thing under other names (GPT-2, T5 and their descendants).
_CONFIG_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "vocab": ("vocab_size",),
}
# GGUF value types of a fixed size (specification of GGUF v3, "metadata_value_type").
_GGUF_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def of_config(config: dict[str, Any]) -> Facts:
    """Facts that a parsed ``config.json`` gives; a vision-language model's text part counts."""
    text = config.get("text_config", config)
    return Facts(**{fact: _first_int(text, names) for fact, names in _CONFIG_NAMES.items()})


def _first_int(config: dict[str, Any], names: Iterable[str]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _read(file: BinaryIO, form: str) -> Any:
    data = file.read(struct.calcsize(f"<{form}"))
    return struct.unpack(f"<{form}", data)[0]


def _read_string(file: BinaryIO) -> str:
    return file.read(_read(file, "Q")).decode("utf-8", "replace")


def _read_value(file: BinaryIO, kind: int) -> Any:
    """One metadata value. An array is read as its length: the token list is all that matters here."""
    if kind == _GGUF_STRING:
        return _read_string(file)
    if kind != _GGUF_ARRAY:
        return _read(file, _GGUF_SIZES[kind])
    item, count = _read(file, "I"), _read(file, "Q")
    if item in _GGUF_SIZES:
        file.seek(count * struct.calcsize(f"<{_GGUF_SIZES[item]}"), os.SEEK_CUR)
    else:
        for _ in range(count):
            _read_value(file, item)
    return count


def of_gguf(path: Path) -> Facts:
    """Facts that the header of a GGUF file gives. Raises ``UserError`` where it is not one."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError("model.path", f"{path} is not a GGUF file", "give a .gguf file, a folder or a hub id")
            _read(file, "I")
            _read(file, "Q")
            return _from_metadata(file, _read(file, "Q"))
    except (OSError, struct.error, KeyError) as error:
        raise UserError("model.path", f"{path} cannot be read ({error})", "download it again") from None


def _from_metadata(file: BinaryIO, count: int) -> Facts:
    seen: dict[str, Any] = {}
    for _ in range(count):
        key = _read_string(file)
        seen[key] = _read_value(file, _read(file, "I"))
        arch = seen.get("general.architecture")
        vocab = seen.get(f"{arch}.vocab_size", seen.get("tokenizer.ggml.tokens"))
        hidden, layers = seen.get(f"{arch}.embedding_length"), seen.get(f"{arch}.block_count")
        if None not in (hidden, layers, vocab):  # The merges that follow take long to read and say nothing more.
            break
    return Facts(hidden, layers, vocab)


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
    """``config.json`` of a hub model that was downloaded before, wherever the hub's own library keeps it."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    found = (hub / f"models--{hub_id.replace('/', '--')}" / "snapshots").glob("*/config.json")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def of_model(path: str) -> Facts:
    """Facts of the model at ``path``: a folder, a ``.gguf`` file, or a hub id (all None where nothing is known)."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        return of_gguf(place)
    config = place / "config.json" if place.is_dir() else _cached_config(path)
    known = of_table(path)
    if config is None:
        return known
    try:
        facts = of_config(json.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UserError("model.path", f"{config} is not readable as JSON", "download the model again") from None
    return Facts(facts.hidden_size, facts.layers, facts.vocab, known.parameters)
