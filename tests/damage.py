"""Ways in which files are damaged: by disks, by copies that were cut short, by hands."""

from __future__ import annotations

import json
import random
from pathlib import Path

KINDS = ("flip", "zero", "cut", "grow", "swap", "delete")


def do_damage(path: Path, others: list[Path], kind: str, chance: random.Random) -> str:
    """Damage a file so that it differs; returns what was done. ``others``: files that it may be swapped with."""
    content = bytearray(path.read_bytes())
    others = [other for other in others if other.read_bytes() != bytes(content)]
    at = chance.randrange(len(content))
    if kind == "delete":
        path.unlink()
    elif kind == "swap" and others:
        other = chance.choice(others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[:at])
    elif kind == "grow":
        path.write_bytes(content + chance.randbytes(8))
    elif kind == "zero" and any(content[at : at + 512]):
        content[at : at + 512] = bytes(len(content[at : at + 512]))
        path.write_bytes(content)
    else:
        before = bytes(content)
        while _same(before, bytes(content)):
            at = chance.randrange(len(content))
            content[at] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return f"{kind} at {at} of {path.name}"


def _same(one: bytes, other: bytes) -> bool:
    """Whether two contents mean the same: a blank of JSON may be another blank."""
    try:
        return one == other or bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def edit_json(path: Path, chance: random.Random) -> str:
    """Damage a JSON object so that it still is one: a key gone, a number or a word changed."""
    value = json.loads(path.read_text())
    inner = chance.choice([value, *(item for item in value.values() if isinstance(item, dict) and item)])
    key = chance.choice(list(inner))
    number = isinstance(inner[key], int | float)
    how = chance.choice(["remove", "change"])
    if how == "remove":
        del inner[key]
    else:
        inner[key] = inner[key] + 1 if number else "other"
    path.write_text(json.dumps(value, indent=1))
    return f"{how} {key} of {path.name}"
