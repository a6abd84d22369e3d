"""Names, docstrings and messages use the field's words, not the dialect that this code once had."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIALECT = (
    "each found said made ours theirs fate fates news sight aside chances slopes voice voices echo mute twin outlook"
)
NAMES = frozenset(DIALECT.split())
"""What a name must not be. It says what the value is instead: ``for key in keys``, ``matches``, ``outcome``."""
TEXTS = re.compile(r"\b(?:learnt|mend|mends|mended|say [\w.]+=)")
"""What files must not have: write ``trained on``, ``fix``, ``use key=…``."""
TEXT_FILES = ("*.md", "docs/*.md", "recipes/*.yaml", "slurm/**/*", "launch/**/*.py", "launch/**/*.toml", "src/**/*.py")


def _given_names(node: ast.AST) -> Iterator[str]:
    """The name that ``node`` gives to a function, class, parameter, variable or attribute."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            yield name
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            yield name


def dialect(source: str) -> list[str]:
    """Every name of :data:`NAMES` that ``source`` gives, as ``line: name``."""
    nodes = ((node, name) for node in ast.walk(ast.parse(source)) for name in _given_names(node))
    return [f"{getattr(node, 'lineno', 0)}: {name}" for node, name in nodes if name.lower().strip("_") in NAMES]


def test_names_are_plain() -> None:
    folders = ("launch/galley_launch", "src/galley")
    files = {str(path.relative_to(ROOT)): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert len(files) > 100
    assert [f"{name}:{line}" for name, path in files.items() for line in dialect(path.read_text())] == []


@pytest.mark.parametrize(
    "source", ["for each in x: pass", "[each for each in x]", "def f(found): pass", "a.said = 1", "def _fate(): pass"]
)
def test_such_names_are_seen(source: str) -> None:
    assert dialect(source)


def test_texts_are_plain() -> None:
    files = {path for pattern in TEXT_FILES for path in ROOT.glob(pattern) if path.is_file()}
    assert len(files) > 150
    assert [(path.name, match[0]) for path in files for match in TEXTS.finditer(path.read_text())] == []
