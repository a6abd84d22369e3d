"""The function-calling tasks of the package ``bfcl-eval`` as conversations: question, functions, a right answer.

2,501 tasks have functions and possible answers. The package is read, never imported: it asks for fifty others. ``make``
puts it, alone, into a folder of the environment.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

KINDS = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
# The package has Python's, Java's and JavaScript's names for types where JSON schemas have their own.
TYPES = {"dict": "object", "float": "number", "double": "number", "tuple": "array", "list": "array", "any": "string"}


def folder() -> Path | None:
    """Where the package's data are; None where it is not installed."""
    beside = Path(sys.prefix) / "share" / "bfcl" / "bfcl_eval"
    spec = importlib.util.find_spec("bfcl_eval")
    roots = [beside, *map(Path, (spec.submodule_search_locations or []) if spec else [])]
    return next((root / "data" for root in roots if (root / "data").is_dir()), None)


def tasks(data: Path) -> list[dict[str, Any]]:
    """A record of ``messages`` and ``tools`` for each task, with its ``id``."""
    return [task for kind in KINDS for task in _tasks(data, kind)]


def _tasks(data: Path, kind: str) -> list[dict[str, Any]]:
    name = f"BFCL_v4_{kind}.json"
    answers = {row["id"]: row["ground_truth"] for row in _lines(data / "possible_answer" / name)}
    return [_record(row, answers[row["id"]]) for row in _lines(data / name)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _record(task: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Question, call, results and a last answer."""
    pairs = [(name, _first(values)) for answer in answers for name, values in answer.items()]
    calls = [
        {"id": f"callnum{n:02d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(pairs)
    ]
    results = [
        {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": f"result{n}"}
        for n, call in enumerate(calls)
    ]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    last = {"role": "assistant", "content": "answer1"}
    tools = [{"type": "function", "function": _schema(function)} for function in task["function"]]
    return {"id": task["id"], "messages": [*task["question"][0], called, *results, last], "tools": tools}


def _first(possible: dict[str, list[Any]]) -> dict[str, Any]:
    """The first of each argument's possible values; of an optional one, which may be the empty string, none."""
    return {name: _value(values[0]) for name, values in possible.items() if values and values[0] != ""}


def _value(value: Any) -> Any:
    """Within an object every value is again a list of those that are possible."""
    if isinstance(value, dict):
        return {name: _value(item[0] if isinstance(item, list) and item else item) for name, item in value.items()}
    return [_value(item) for item in value] if isinstance(value, list) else value


def _schema(value: Any) -> Any:
    """A function's description with the types that JSON schemas know."""
    if isinstance(value, dict):
        named = {"type": TYPES.get(value["type"].lower(), value["type"])} if isinstance(value.get("type"), str) else {}
        return {name: _schema(item) for name, item in value.items()} | named
    return [_schema(item) for item in value] if isinstance(value, list) else value
