"""The pretrained model: the folder that ranks load, its tokenizer, and the facts about it that the manifest keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galley.contract.rundir import read_json
from galley.contract.spec import Model, RunSpec
from galley.data.prepared import ModelFacts
from galley.prepare.convert import grow_embedding
from galley.prepare.fetch import Fetched, fetch_model
from galley.prepare.isolation import attends_by_document, packing_refused
from galley.prepare.tokens import Tokens, load_tokens
from galley.storage.weights import count_parameters


@dataclass(frozen=True)
class Pretrained:
    """All that prepare knows of the model."""

    facts: ModelFacts
    tokens: Tokens
    packing_refused: str | None
    """Why its samples must each be one document, if they must."""


def find_pretrained(spec: RunSpec, cache: Path) -> Pretrained:
    """Fetch the model, with its tokenizer and a row of its embedding for every token, and try whether it can be packed.

    Raises :class:`UserError` for whatever is wrong with it.
    """
    fetched = fetch_model(spec, cache)
    tokens = load_tokens(spec, fetched.folder)
    model = spec.task.model
    facts = _describe(model, fetched, tokens, cache)
    refused = packing_refused(fetched.folder, model, cache)
    by_document = refused is None and attends_by_document(fetched.folder, model, cache)
    return Pretrained(facts.model_copy(update={"attends_by_document": by_document}), tokens, refused)


def _describe(model: Model, fetched: Fetched, tokens: Tokens, cache: Path) -> ModelFacts:
    path = with_rows(fetched, tokens.added, tokens.added_ids, cache, model.trust_remote_code)
    config = _config(path, model.trust_remote_code)
    return ModelFacts(
        path=str(path),
        source=model.path,
        revision=fetched.revision,
        fingerprint=fetched.fingerprint,
        parameters=count_parameters(path),
        vocab=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        added_tokens=tokens.added,
        added_token_ids=tokens.added_ids,
        eos_ids=eos_ids(tokens, fetched.folder),
        quantised_share=fetched.quantised_share,
    )


def with_rows(fetched: Fetched, added: list[str], ids: list[int], cache: Path, trust: bool) -> Path:
    """The folder as fetched where its embedding has a row for each of the added ``ids``; else one that has them."""
    rows = max(ids, default=-1) + 1
    if rows <= int(_config(fetched.folder, trust).vocab_size):
        return fetched.folder
    return grow_embedding(fetched.folder, fetched.fingerprint, added, rows, cache, trust)


def _config(folder: Path, trust: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config()


def eos_ids(tokens: Tokens, folder: Path) -> list[int]:
    """Tokens that end an answer: the template's end of turn, the tokenizer's, and what the model's files name."""
    tokenizer = tokens.tokenizer
    named = [tokens.template.end_of_turn, tokenizer.eos_token]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in named if token]
    for name in ("generation_config.json", "config.json"):
        value = (read_json(folder / name) or {}).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    return list(dict.fromkeys(int(token) for token in ids if token is not None))
