"""No secret is written into files: settings, profiles and inherited variables are checked before they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from galley.contract.errors import UserError
from galley.contract.sensitive import assigned_in, is_secret_name, secret_in
from galley.contract.spec import RunSpec

if TYPE_CHECKING:
    from galley_launch.cluster.profile import Cluster

_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_ENVIRONMENT = "remove it; give secrets in the environment (HF_TOKEN, WANDB_API_KEY, MLFLOW_TRACKING_TOKEN …)"
_PROFILE = "remove it; list a variable under secrets in the cluster's profile, and set it where you submit"


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree, keys included, with its dotted path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(part, f"{path}.{key}" if path else str(key))
            if secret_in(str(key)):
                yield path, str(key)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _texts(part, f"{path}.{number}")


def check_spec(spec: RunSpec) -> None:
    """Raise ``UserError`` where ``run.json`` would hold a secret. The message does not repeat it."""
    dump = spec.model_dump(mode="json")
    for path, text in _texts(dump):
        # As the user knows it: a setting by its key in the recipe, one of the command line by that alone.
        key = path.removeprefix("task.").removeprefix("placement.")
        where = "command line" if path.startswith("origin.overrides") else key
        kind = secret_in(text)
        # 40 hexadecimal digits are a commit elsewhere (a model's revision), but under tracking.wandb a key of W&B.
        if path.startswith("tracking.wandb") and _WANDB_KEY.fullmatch(text):
            kind = "a key of W&B"
        if path.startswith("placement.deepspeed.") and text and is_secret_name(path.rpartition(".")[2]):
            kind = "a secret, by its name"
        if kind:
            raise UserError(where, f"holds {kind}, which would be written into the run", _ENVIRONMENT)


def check_profile(cluster: Cluster, where: str) -> None:
    """Raise ``UserError`` where a profile holds a secret: it goes into job scripts and ``cluster.json``."""
    # Under secrets there are names of variables only, and those look like secrets on purpose.
    dump = cluster.model_dump(mode="json", exclude={"secrets"})
    for path, text in _texts(dump):
        kind, name = secret_in(text), assigned_in(text)
        if kind or name:
            what = f"holds {kind or f'what looks like a secret ({name})'}, which would be written into job scripts"
            raise UserError(f"{where}: {path}", what, _PROFILE)


def check_variable(name: str, value: str) -> None:
    """Raise ``UserError`` where a variable of the environment that job scripts take over holds a secret."""
    if kind := secret_in(value):
        what = f"holds {kind}, which would be written into job scripts"
        raise UserError(f"environment: {name}", what, f"list {name} under secrets in the cluster's profile")
