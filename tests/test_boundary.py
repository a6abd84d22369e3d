"""The walls of the house: which room may import which, and what the control plane must never load."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH, DATA = ROOT / "launch" / "galley_launch", ROOT / "src" / "galley"

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "bitsandbytes", "numpy", "peft", "safetensors", "tokenizers"}
LIGHT = {"fire", "pydantic", "pydantic_core", "yaml", "jinja2", "rich", "hjson"}

# Which rooms each room may import besides itself. Modules that lie in no room are the front doors: they import any.
CONTROL_ROOMS = {
    "base": "",
    "recipe": "base",
    "deepspeed": "base recipe",
    "cluster": "base recipe",
    "plan": "base recipe deepspeed cluster",
    "job": "",
    "submit": "base recipe cluster plan job",
    "local": "base plan submit job",
    "runs": "base recipe submit job",
    "report": "base recipe plan submit runs job",
}
DATA_ROOMS = {
    "contract": "",
    "storage": "contract",
    "data": "contract storage",
    "model": "contract storage data",
    "engine": "contract storage model",
    "objective": "contract data model",
    "ranks": "contract storage",
    "track": "contract",
    "prepare": "contract storage data model ranks track",
    "checkpoint": "contract storage model engine ranks",
    "train": "contract storage data model engine objective ranks checkpoint track",
    "export": "contract storage data model objective ranks checkpoint prepare",
}
_BARE = ("rundir", "files", "text", "records", "metrics", "stages", "sensitive", "errors")
BARE = {f"galley.contract.{name}" for name in _BARE}
"""Of the contract, what a job may import: the standard library's, in Python 3.9's grammar."""
PYDANTIC = {"part", "task_data", "spec", "task", "pace"}
"""Of the contract, what may import pydantic."""


LINES_OF_A_FUNCTION, LINES_OF_A_FILE, LEVELS = 40, 320, 3
"""As CONTRIBUTING.md has them."""
BRANCHES = (ast.If, ast.For, ast.While, ast.Match)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names, wherever in the file; ``from package import name`` as ``package.name``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def through_walls(package: Path, rooms: dict[str, str]) -> list[str]:
    """Imports from one room into another that it may not know."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room, _, inside = path.relative_to(package).as_posix().partition("/")
        if not inside:  # a front door
            continue
        allowed = {"", room, *rooms[room].split()}  # "": the package itself, for its folder
        for module in imports(path):
            top, _, rest = module.partition(".")
            if top == package.name and (there := rest.partition(".")[0]) not in allowed:
                found.append(f"{path.relative_to(package)} imports {there}")
    return found


def outside(folder: Path, allowed: set[str], version: tuple[int, int] = (3, 11)) -> list[str]:
    """Imports below ``folder`` that are neither of the standard library nor begin with a name that is ``allowed``."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=version)
        for module in imports(path):
            known = any(f"{module}.".startswith(f"{name}.") for name in allowed | set(sys.stdlib_module_names))
            found += [] if known else [f"{path.relative_to(folder)} imports {module}"]
    return found


def job_faults(package: Path) -> list[str]:
    """What a compute node's own Python, which may be old and bare, could not import."""
    return outside(package / "job", {"galley_launch.job", *BARE}, (3, 9))


def test_each_room_imports_only_those_below_it() -> None:
    assert through_walls(LAUNCH, CONTROL_ROOMS) == []
    assert through_walls(DATA, DATA_ROOMS) == []


def test_every_room_has_its_walls_and_its_caption() -> None:
    for package, rooms in ((LAUNCH, CONTROL_ROOMS), (DATA, DATA_ROOMS)):
        folders = {path.name: path for path in package.iterdir() if (path / "__init__.py").is_file()}
        assert set(folders) == set(rooms)
        for folder in folders.values():
            caption = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert caption, folder
            assert "Imports " in caption, folder
            assert len(caption.splitlines()) <= 4, folder


def test_the_control_plane_names_only_the_contract_and_light_libraries() -> None:
    found = outside(LAUNCH, {"galley_launch", "galley.contract", *LIGHT})
    assert [line for line in found if not line.endswith("imports galley")] == []  # its folder goes to jobs


def test_the_data_plane_never_names_the_control_plane() -> None:
    for path in DATA.rglob("*.py"):
        assert not [module for module in imports(path) if module.partition(".")[0] == "galley_launch"], path


def test_what_runs_inside_a_job_needs_the_standard_library_only() -> None:
    assert job_faults(LAUNCH) == []
    for name in BARE:
        path = DATA / f"{name.removeprefix('galley.').replace('.', '/')}.py"
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        assert all(module.partition(".")[0] in {"galley", *sys.stdlib_module_names} for module in imports(path)), path


@pytest.mark.parametrize("folder", ["job", "job/node", "job/diagnose"])
def test_a_planted_import_is_found_wherever_it_lies_in_a_job(tmp_path: Path, folder: str) -> None:
    package = tmp_path / "galley_launch"
    shutil.copytree(LAUNCH, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / folder / "planted.py").write_text("def f():\n    import numpy.linalg\n")
    assert [line.partition("planted")[2] for line in job_faults(package)] == [".py imports numpy.linalg"]
    (package / folder / "planted.py").write_text("from galley.contract import spec\n")
    assert [line.partition("planted")[2] for line in job_faults(package)] == [".py imports galley.contract.spec"]
    (package / folder / "planted.py").write_text("match 1:\n    case 1: pass\n")
    with pytest.raises(SyntaxError, match=r"3\.10"):
        job_faults(package)


def test_a_planted_import_through_a_wall_is_found(tmp_path: Path) -> None:
    package = tmp_path / "galley"
    shutil.copytree(DATA, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "prepare" / "formats" / "planted.py").write_text("from galley.train import loop\n")
    assert through_walls(package, DATA_ROOMS) == ["prepare/formats/planted.py imports train"]


def test_the_contract_is_light() -> None:
    for path in (DATA / "contract").glob("*.py"):
        allowed = {"galley", *({"pydantic"} if path.stem in PYDANTIC else ()), *sys.stdlib_module_names}
        assert all(module.partition(".")[0] in allowed for module in imports(path)), path


def loaded(argv: list[str], cwd: Path) -> set[str]:
    """Top-level modules in a clean process after ``galley ARGV``, which must succeed."""
    code = (
        "import sys; from galley_launch.cli import main; status = main(sys.argv[1:]);"
        "print('\\n==', *{name.partition('.')[0] for name in sys.modules}); sys.exit(status)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("\n==")[2].split())


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["run", "--help"],
        ["recipes"],
        ["show", "smollm2-135m-lora"],
        ["schema"],
        ["plan", "smollm2-135m-lora", "device=cpu", "ranks=2", "deepspeed=zero3"],
        ["status"],
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_a_command_loads_nothing_heavy(argv: list[str], tmp_path: Path) -> None:
    modules = loaded(argv, tmp_path)
    assert "galley_launch" in modules
    assert not modules & HEAVY


def test_running_loads_nothing_heavy_either() -> None:
    code = "import sys, galley_launch.local.runner, galley_launch.commands; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "galley_launch.local.supervise" in done.stdout.split()
    assert not {name.partition(".")[0] for name in done.stdout.split()} & HEAVY


@pytest.mark.parametrize("folder", [LAUNCH, DATA], ids=lambda folder: folder.name)
def test_files_and_functions_stay_small(folder: Path) -> None:
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= LINES_OF_A_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= LINES_OF_A_FUNCTION, f"{path}: {node.name} has {length} lines"
                assert nesting(node) <= LEVELS, f"{path}: {node.name} has {nesting(node)} levels of branches and loops"


def nesting(node: ast.AST) -> int:
    """Levels of branches and loops in ``node``; an ``elif`` is no deeper than its ``if``."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child) - is_elif)
    return deepest + isinstance(node, BRANCHES)


def test_nesting_is_counted() -> None:
    deep = "for a in b:\n  if a:\n    pass\n  elif b:\n    while c:\n      with d:\n        pass"
    assert nesting(ast.parse(deep)) == 3
    assert nesting(ast.parse("x = [a for a in b if a]")) == 0
