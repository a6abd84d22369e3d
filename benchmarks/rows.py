"""Docstring-like rows, the same for every contestant: the standard library's own documentation as conversations.

    python benchmarks/rows.py ROWS.jsonl

Short and long rows are mixed as in real data: with SmolLM2's tokens a mean of about 100, a few of 400. The bytes
depend on the Python that makes them (the results record their hash), so one file is made and given to all.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

COUNT = 1600
SHORTEST, LONGEST = 60, 1400
"""Characters of a docstring that is taken."""


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of every documented function in a source file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if SHORTEST <= len(text) <= LONGEST:
                yield f"{node.name}({ast.unparse(node.args)})", text


def make(count: int = COUNT, seed: int = 7) -> list[dict[str, list[dict[str, str]]]]:
    """``count`` rows, in an order that the seed gives."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    files = sorted(path for path in library.rglob("*.py") if not skip & set(path.relative_to(library).parts))
    found = sorted({pair for path in files for pair in documented(path)})
    random.Random(seed).shuffle(found)
    return [
        {"messages": [{"role": "user", "content": f"Document {name}"}, {"role": "assistant", "content": text}]}
        for name, text in found[:count]
    ]


def write(path: Path, count: int = COUNT) -> Path:
    """Write the rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make(count)), encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
