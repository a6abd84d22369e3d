"""The model card that an export carries."""

from __future__ import annotations

import json

from jinja2 import Environment, PackageLoader, StrictUndefined

from galley.data import Manifest
from galley.rundir import Checkpoint, read_json
from galley.spec import RunSpec


def render(spec: RunSpec, manifest: Manifest, checkpoint: Checkpoint) -> str:
    """Markdown with the hub's metadata block: what was trained, on what, how, and how it measured."""
    environment = Environment(
        loader=PackageLoader("galley", "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    facts = read_json(checkpoint.manifest) or {}
    return environment.get_template("card.md.j2").render(
        spec=spec, task=spec.task, data=manifest, step=checkpoint.step, held_out_loss=facts.get("held_out_loss"),
        rows=max(manifest.model.added_token_ids, default=-1) + 1,
        task_json=json.dumps(spec.task.model_dump(mode="json"), indent=2),
    )  # fmt: skip
