"""The wheel, built from the sdist, in an environment with nothing else: what a login node gets."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Nothing of the checkout, and nothing of the environment that runs the tests.
CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from the sdist, by the ``build`` front end."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=CLEAN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("galley_tune-*.tar.gz"))) == 1
    (found,) = out.glob("galley_tune-*.whl")
    return found


@pytest.fixture(scope="module")
def galley(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``galley`` command of an environment that has the wheel and its light dependencies."""
    home = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet"]
    command = [*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=CLEAN)
    assert done.returncode == 0, done.stderr
    return home / "bin" / "galley"


def run(galley: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([galley, *words], cwd="/", capture_output=True, text=True, timeout=60, env=CLEAN)


@pytest.mark.slow
def test_the_wheel_holds_both_planes_and_the_shipped_folders(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("galley/spec.py", "galley/py.typed", "galley_launch/cli.py", "galley_launch/models.json"):
        assert name in names
    for name in ("recipes/smollm2-135m-lora.yaml", "recipes/schema.json", "ds_configs/zero3.json"):
        assert f"galley_launch/{name}" in names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"galley", "galley_launch"}


@pytest.mark.slow
def test_plan_works_from_the_root_without_torch(galley: Path) -> None:
    python = galley.with_name("python")
    probe = "import importlib.util as u; print([m for m in ('torch', 'transformers', 'numpy') if u.find_spec(m)])"
    assert subprocess.run([python, "-c", probe], capture_output=True, text=True, env=CLEAN).stdout == "[]\n"
    done = run(galley, "plan", "smollm2-135m-lora", "device=cpu", "ranks=2", "deepspeed=zero3", "files=all")
    assert done.returncode == 0, done.stderr
    assert '"name": "smollm2-135m-lora"' in done.stdout
    assert "PYTHONPATH" not in done.stdout


@pytest.mark.slow
def test_the_light_verbs_work_and_run_says_what_is_missing(galley: Path) -> None:
    assert "qwen3-4b-qlora" in run(galley, "recipes").stdout
    assert run(galley, "schema").stdout == (ROOT / "recipes" / "schema.json").read_text()
    done = run(galley, "run", "smollm2-135m-lora", "device=cpu")
    assert done.returncode == 2
    assert done.stderr == (
        "galley: environment: torch is not installed here, so nothing can be trained; "
        "install the rest with: pip install 'galley-tune[train]'\n"
    )
