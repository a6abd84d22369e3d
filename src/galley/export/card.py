"""The model card that an export carries: what it is, how to load it, how it was made, and whether it is verified."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from galley.contract.rundir import Checkpoint, read_json
from galley.contract.spec import RunSpec
from galley.contract.task_data import Data, DataSource
from galley.data.prepared import Manifest
from galley.export.bases import Base
from galley.export.checks import Check


@dataclass(frozen=True)
class Part:
    """A folder of an export."""

    kind: Literal["model", "adapter"]
    path: Path
    """Where it will be."""
    check: Check | None
    """None where it was not checked."""
    factory: str
    """transformers' class that loads the whole model."""
    chats: bool
    """Whether its tokenizer has a chat template."""


def render(spec: RunSpec, manifest: Manifest, checkpoint: Checkpoint, part: Part, base: Base) -> str:
    """Markdown with the hub's metadata block: what was trained, on what, how, how it measured, and how to load it."""
    environment = Environment(
        loader=PackageLoader("galley.export", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["repr"] = repr
    facts = read_json(checkpoint.manifest) or {}
    return environment.get_template("card.md.j2").render(
        spec=spec, task=spec.task, trained_on=_trained_on(spec.task.data), data=manifest, step=checkpoint.step,
        held_out_loss=facts.get("held_out_loss"),
        rows=max(manifest.model.added_token_ids, default=-1) + 1,
        task_json=json.dumps(spec.task.model_dump(mode="json"), indent=2), part=part, base=base,
    )  # fmt: skip


def _trained_on(data: Data) -> str:
    """The data's names, and what of them the loss was on: once where it is the same of all."""
    sources = data.listed()
    if len({_loss_on(source) for source in sources}) > 1:
        return ", ".join(f"`{source.path}` (loss on {_loss_on(source)})" for source in sources)
    return f"{', '.join(f'`{source.path}`' for source in sources)}, loss on {_loss_on(sources[0])}"


def _loss_on(source: DataSource) -> str:
    if source.format == "text" or source.learn == "all":
        return "every token"
    if isinstance(source.learn, list) and source.learn != ["assistant"]:
        return f"what messages of these roles say only: {', '.join(source.learn)}"
    return "the last answer of each conversation only" if source.learn == "last" else "assistant tokens only"
