"""Generation settings travel with a model, also those that transformers loads but will not write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from galley.contract.rundir import read_json, write_atomic

FILE = "generation_config.json"


def save_model(model: Any, folder: Path, **how: Any) -> None:
    """``model.save_pretrained(folder, **how)``, whatever its generation settings are.

    transformers refuses to save settings that contradict one another, such as a temperature without sampling, which
    many models on the hub have, and which it loads and uses. They are left out then: :func:`carry_over` brings them.
    """
    settings = getattr(model, "generation_config", None)
    if settings is not None and not _saves(settings):
        model.generation_config = GenerationConfig()
    model.save_pretrained(str(folder), **how)
    if settings is not None:
        model.generation_config = settings


def _saves(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def carry_over(source: Path, target: Path, eos_ids: Sequence[int] = ()) -> None:
    """Write the generation settings of the model in ``source`` to ``target``, ending at ``eos_ids`` where given."""
    settings = read_json(source / FILE) or {}
    if eos_ids:
        settings["eos_token_id"] = list(eos_ids)
    try:
        GenerationConfig.from_dict(settings).save_pretrained(str(target))
    except (ValueError, TypeError, AttributeError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip().startswith("-")), str(error))
        what = "is carried over as it is, though transformers would not write it"
        print(f"warning: {FILE} {what}: {why.lstrip('- ')[:200]}", flush=True)
        write_atomic(target / FILE, json.dumps(settings, indent=2) + "\n")
