"""One value of a DeepSpeed JSON against its type and bounds in ``deepspeed_keys.json``, as DeepSpeed itself reads it.

Its pydantic models convert values: ``"500"`` is a whole number, ``"5e8"`` is not. Keys that it reads by hand are not
converted (``strict``). So the matches validators of pydantic-core are used here, strict or not as the key is.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic_core import CoreSchema, SchemaValidator, ValidationError, core_schema

from galley_launch.base.problems import Problem, closest, shown

Spec = list[Any]
"""``[type, limits]``; see ``tests/launch/deepspeed_keys.py``."""

_LARGEST = 2**63 - 1
_BOUNDS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
}


def check(path: str, value: Any, spec: Spec) -> tuple[Any, Problem | None]:
    """``value`` as DeepSpeed reads it, and what is wrong with it, if anything."""
    kind, limits = spec
    if isinstance(value, float) and not math.isfinite(value):
        return value, Problem(f"{path} {shown(value)} is not a number that JSON knows", "write a finite one")
    if kind == "any" or (value is None and limits.get("null")):
        return value, None
    if kind == "enum":
        return _one_of(path, value, limits)
    # Before pydantic: true is no number (its lax mode reads 1), and 2e8 is a whole number even for a strict key,
    # because JSON has no other way to write an integer with an exponent.
    if isinstance(value, bool) and kind in ("int", "float"):
        return value, _wrong(path, value, spec)
    if isinstance(value, float) and kind == "int" and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) > _LARGEST:
        return value, Problem(f"{path} {shown(value)} is more than any count", "write a smaller one")
    try:
        return SchemaValidator(_schema(kind, limits)).validate_python(value), None
    except ValidationError:
        return value, _wrong(path, value, spec)


def _schema(kind: str, limits: dict[str, Any]) -> CoreSchema:
    bounds: Any = {name: limits[name] for name in _BOUNDS if name in limits}
    strict = limits.get("strict", False)
    match kind:
        case "int":
            return core_schema.int_schema(strict=strict, **bounds)
        case "float":
            return core_schema.float_schema(strict=strict, allow_inf_nan=False, **bounds)
        case "bool":
            return core_schema.bool_schema(strict=strict)
        case "str":
            return core_schema.str_schema(strict=strict)
        case "list":
            return core_schema.list_schema(strict=strict)
        case _:
            return core_schema.dict_schema(strict=strict)


def _one_of(path: str, value: Any, limits: dict[str, Any]) -> tuple[Any, Problem | None]:
    # A stage may be 2 or "2"; but True == 1 in Python, and true is no stage.
    known = limits["of"]
    matches = [name for name in known if not isinstance(value, bool) and (name == value or str(name) == value)]
    if not matches and limits.get("case") and isinstance(value, str):
        matches = [name for name in known if name.lower() == value.lower()]
    if matches:
        return matches[0], None
    names = [str(name) for name in known]
    near = closest(value.strip(), ["auto", *names]) if isinstance(value, str) else None
    todo = f"did you mean {shown(near)}?" if near else f"choose one of {', '.join(names)}"
    return value, Problem(f"{path} {shown(value)} is not one of {', '.join(names)}", todo)


def _wrong(path: str, value: Any, spec: Spec) -> Problem:
    kind, limits = spec
    bounds = [f"{word} {limits[name]:g}" for name, word in _BOUNDS.items() if name in limits]
    means = " ".join([_KINDS[kind], " and ".join(bounds)]).strip()
    return Problem(f"{path} {shown(value)} is not {means}", _todo(value, kind, limits))


def _todo(value: Any, kind: str, limits: dict[str, Any]) -> str:
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return 'write "auto"'
        if kind in ("int", "float"):
            return _number(value, kind)
        if kind == "bool" and value.strip().lower() in ("true", "false"):
            return f"write {value.strip().lower()} without quotes"
    if value == 0 and not isinstance(value, bool) and limits.get("gt") == 0:
        return "leave it out, or write a number from 1" if kind == "int" else "leave it out"
    return f"write {_KINDS[kind]}, or leave it out"


def _number(text: str, kind: str) -> str:
    try:
        number = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        return f"write {_KINDS[kind]}, or leave it out"
    if not math.isfinite(number):
        return "write a finite number, or leave it out"
    return f"write {int(number) if number.is_integer() else number} without quotes"
