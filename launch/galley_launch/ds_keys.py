"""The keys of a user's DeepSpeed JSON: unknown ones are refused, and what has two names gets one.

DeepSpeed itself lets ``gradient_cliping`` pass in silence.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from galley.errors import UserError
from galley_launch.arguments import nearest

# Blocks that the recipe settles: "auto" in the place of the whole block says no more than leaving it out.
_SETTLED = ("bf16", "fp16", "data_types", "torch_autocast", "optimizer", "scheduler")


def known() -> dict[str, Any]:
    """The keys of DeepSpeed's configuration: nested objects, None for a value, ``"*"`` for anything."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
    keys: dict[str, Any] = data["keys"]
    return keys


def read_keys(config: dict[str, Any], label: str) -> dict[str, Any]:
    """A copy of ``config`` with each thing under one name, and without keys that say nothing.

    Raises ``UserError`` for a key that DeepSpeed does not know, and where two names of one block differ.
    """
    check_keys(config, label)
    config = copy.deepcopy(config)
    if "bfloat16" in config:  # The old name, which DeepSpeed still reads.
        old = config.pop("bfloat16")
        new = config.setdefault("bf16", old)
        if new != old:
            what = f"bf16 {json.dumps(new)} and bfloat16 {json.dumps(old)} are two names of one block"
            raise UserError(f"deepspeed {label}", what, "keep bf16")
    silent = [key for key, value in config.items() if value is None or (key in _SETTLED and value == "auto")]
    return {key: value for key, value in config.items() if key not in silent}


def check_keys(config: dict[str, Any], label: str) -> None:
    """Raise ``UserError`` for the first key of ``config`` that DeepSpeed does not know, with the nearest known one."""
    _check(config, known(), f"deepspeed {label}", "")


def _check(config: dict[str, Any], allowed: dict[str, Any], where: str, prefix: str) -> None:
    for key, value in config.items():
        if key not in allowed:
            raise UserError(where, f"DeepSpeed has no key {prefix + key!r}", nearest(key, allowed))
        inner = allowed[key]
        if isinstance(inner, dict) and isinstance(value, dict):
            _check(value, inner, where, f"{prefix}{key}.")
        elif isinstance(inner, dict) and value != "auto" and value is not None:
            raise UserError(where, f"{prefix + key} {value!r} is not an object", f"its keys: {', '.join(inner)}")
