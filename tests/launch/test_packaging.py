"""The wheel, built from the sdist, in an environment with nothing else: what a login node gets."""

import os
import re
import subprocess
import sys
import tarfile
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
    for name in (
        "galley/contract/spec.py",
        "galley/py.typed",
        "galley_launch/cli.py",
        "galley_launch/recipe/models.json",
    ):
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
        "install the rest, in a checkout of Galley: pip install -c constraints.txt '.[train]'\n"
    )


# The README's own lines


def install_lines() -> list[str]:
    """The scripts under "Install", as they stand: of a login node, and of what trains."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Install\n")[2].partition("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


def followed(script: str, wheel: Path, home: Path) -> "subprocess.CompletedProcess[str]":
    """A stranger who follows ``script`` in the root of a checkout: what the sdist beside the wheel holds."""
    (sdist,) = wheel.parent.glob("galley_tune-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(home, filter="data")
    (root,) = home.glob("galley_tune-*")
    environment = CLEAN | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1500, env=environment)


def test_the_readme_installs_from_a_checkout_for_both() -> None:
    login, trains = install_lines()
    assert "constraints.txt .\n" in login
    assert "'.[train]'" in trains
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "slurm.md"))
    assert "pip install galley-tune" not in text  # Nothing of that name is on an index.
    assert "pip install 'galley-tune" not in text


@pytest.mark.slow
def test_the_readmes_lines_for_a_login_node(wheel: Path, tmp_path: Path) -> None:
    done = followed(install_lines()[0], wheel, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run      smollm2-135m-lora in" in done.stderr
    galley = tmp_path / "galley" / "bin" / "galley"
    assert run(galley, "run", "smollm2-135m-lora", "device=cpu").returncode == 2  # there is no torch


@pytest.mark.long
def test_the_readmes_lines_for_what_trains(wheel: Path, tmp_path: Path) -> None:
    done = followed(install_lines()[1], wheel, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on       CPU, 2 ranks, ZeRO-2" in done.stderr
    python = tmp_path / "galley" / "bin" / "python"
    probe = "import galley.prepare.prepare, galley.train, galley.export, torch; print(torch.__version__)"
    checked = subprocess.run([python, "-c", probe], cwd=tmp_path, capture_output=True, text=True, env=CLEAN)
    assert checked.returncode == 0, checked.stderr
