"""Who may import whom, and what the control plane must never load."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH, DATA = ROOT / "launch" / "galley_launch", ROOT / "src" / "galley"

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "bitsandbytes", "numpy", "peft", "safetensors", "tokenizers"}
LIGHT = {"fire", "pydantic", "pydantic_core", "yaml", "jinja2", "rich", "hjson"}
CONTRACT = {
    "galley",
    "galley.spec",
    "galley.task",
    "galley.pace",
    "galley.rundir",
    "galley.files",
    "galley.text",
    "galley.headers",
    "galley.errors",
    "galley.sensitive",
    "galley.formats",
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.py")), ids=lambda path: path.stem)
def test_the_control_plane_names_only_the_contract_and_light_libraries(path: Path) -> None:
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "galley":
            assert module in CONTRACT
        else:
            assert top in {"galley_launch", *LIGHT} or top in sys.stdlib_module_names, module


@pytest.mark.parametrize("path", sorted(DATA.rglob("*.py")), ids=lambda path: path.stem)
def test_the_data_plane_never_names_the_control_plane(path: Path) -> None:
    assert not [module for module in imports(path) if module.partition(".")[0] == "galley_launch"]


@pytest.mark.parametrize("path", sorted((LAUNCH / "job").glob("*.py")), ids=lambda path: path.stem)
def test_what_runs_inside_a_job_needs_the_standard_library_only(path: Path) -> None:
    """A compute node's own Python may be old and bare; the grammar is Python 3.9's."""
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    for module in imports(path):
        assert (
            module.partition(".")[0] in sys.stdlib_module_names
            or module in ("galley.rundir", "galley.files", "galley.text")
            or module.startswith("galley_launch.job")
        ), module


@pytest.mark.parametrize("name", ["spec", "task", "pace", "rundir", "files", "text", "headers", "errors", "formats"])
def test_the_contract_is_light(name: str) -> None:
    allowed = {"pydantic", "galley"} if name in ("spec", "task", "pace") else {"galley"}
    for module in imports(DATA / f"{name}.py"):
        assert module.partition(".")[0] in allowed | set(sys.stdlib_module_names), module


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
    code = "import sys, galley_launch.runner, galley_launch.commands; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "galley_launch.supervise" in done.stdout.split()
    assert not {name.partition(".")[0] for name in done.stdout.split()} & HEAVY


@pytest.mark.parametrize("folder", [LAUNCH, DATA], ids=lambda folder: folder.name)
def test_files_and_functions_stay_small(folder: Path) -> None:
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 320, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 50, f"{path}: {node.name} has {length} lines"
