"""The pretrained model's folder that ranks load, and the facts about it that the manifest keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from galley.contract.rundir import read_json
from galley.contract.spec import RunSpec
from galley.data.prepared import ModelFacts
from galley.prepare.convert import grow_embedding
from galley.prepare.fetch import Fetched
from galley.prepare.tokens import Tokens
from galley.storage.weights import count_parameters


def describe_model(spec: RunSpec, fetched: Fetched, tokens: Tokens, cache: Path) -> ModelFacts:
    """The model with a row for every token, and its facts."""
    model = spec.task.model
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
    found = [tokenizer.convert_tokens_to_ids(token) for token in named if token]
    for name in ("generation_config.json", "config.json"):
        value = (read_json(folder / name) or {}).get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    return list(dict.fromkeys(int(token) for token in found if token is not None))
