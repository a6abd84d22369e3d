"""Refuse keys that DeepSpeed does not know. DeepSpeed itself lets ``gradient_cliping`` pass in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from galley.errors import UserError
from galley_launch.arguments import nearest


def known() -> dict[str, Any]:
    """The keys of DeepSpeed's configuration: nested objects, None for a value, ``"*"`` for anything."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("deepspeed_keys.json").read_text(encoding="utf-8"))
    keys: dict[str, Any] = data["keys"]
    return keys


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
