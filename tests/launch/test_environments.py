"""The Python that jobs will use is looked into before anything is queued."""

import json
import sys
from pathlib import Path

import pytest
from launch.submitting import galley, here, profile, refused, submitted
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

__all__ = ["fakes", "here"]


def python(folder: Path, version: str = "3.11", galley: str = "", **found: bool) -> Path:
    """A stand-in for an environment's interpreter."""
    there = {"torch": True, "deepspeed": True, "transformers": True} | found
    look = json.dumps({"python": [3, 11], "installed": there, "galley": galley})
    path = folder / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/bash\ncase $2 in *find_spec*) echo '{look}' ;; *) echo {version} ;; esac\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["torch", "deepspeed"])
def test_an_environment_that_cannot_train(
    name: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    found = python(here / "env", **{name: False})
    profile("x", f"venv: {here}/env\n")
    said = refused(here, capsys, "submit", "my.yaml", "cluster=x")
    assert said.startswith(
        f"environment: {name} is not installed in {found}, so nothing can be trained; {found} -m pip"
    )
    profile("x", f"venv: {here}/env\nmodules: [pytorch]\n")  # which may bring it
    status, _, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert status == 0
    assert f"note: {name} is not installed in {found}, unless cluster.modules or cluster.setup bring it: " in err


@pytest.mark.parametrize("conda", ["{here}/env", "env"])
def test_a_conda_environment(
    conda: str, here: Path, fakes: Scenario, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python(here / "envs" / "env", torch=False)
    python(here / "env", torch=False)
    monkeypatch.setenv("CONDA_EXE", f"{here}/bin/conda")
    profile("x", f"conda: {conda.format(here=here)}\n")
    assert refused(here, capsys, "submit", "my.yaml", "cluster=x").startswith("environment: torch is not installed in ")
    profile("x", "conda: another\n")  # nowhere to be seen from here
    assert galley(capsys, "submit", "my.yaml", "cluster=x")[0] == 0


def test_another_versions_packages(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    found = python(here / "env", galley="0.0.1")
    profile("x", f"venv: {here}/env\n")
    status, _, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert status == 0
    assert f"note: {found} has the packages of Galley 0.0.1, but jobs run the code of this " in err


def test_an_environment_that_cannot_be_looked_into(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    python(here / "env").write_text("#!/bin/bash\nexit 1\n")
    profile("x", f"venv: {here}/env\n")
    status, _, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert (status, "could not be looked into" in err) == (0, True)


def script(here: Path, name: str) -> str:
    text = (here / "runs/my/jobs" / f"{name}.sbatch").read_text()
    return text.partition("host_python=")[2].partition("\n")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("venv: {here}/env\n", "{here}/env/bin/python"),
        ("conda: env\n", "python"),
        ("about: no environment\n", sys.executable),
        ("container: {{runtime: apptainer, image: docker://x}}\n", "python3"),
        (
            "container: {{runtime: apptainer, image: docker://x}}\nhost_python: {here}/env/bin/python\n",
            "{here}/env/bin/python",
        ),
        ("venv: {here}/env\nhost_python: python3\n", "python3"),
    ],
)
def test_jobs_decide_with_the_environments_own_python(
    text: str, expected: str, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    python(here / "env")
    profile("x", text.format(here=here))
    assert galley(capsys, "submit", "my.yaml", "cluster=x")[0] == 0
    assert {script(here, name) for name in ("prepare", "train", "export")} == {expected.format(here=here)}


IMAGE = "container: {runtime: apptainer, image: docker://x}\n"


def test_a_python_of_the_nodes_that_is_too_old(here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    python(here / "old", version="3.6").rename(fakes.bin / "python3")
    profile("x", IMAGE)
    said = "cluster.host_python: python3 is Python 3.6 here, older than the 3.9 that jobs need; name a newer"
    assert refused(here, capsys, "submit", "my.yaml", "cluster=x").startswith(said)
    profile("x", f"{IMAGE}modules: [python/3.11]\n")
    status, _, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert (status, "older than the 3.9" in err) == (0, True)
    assert len(submitted(fakes)) == 2


def test_a_python_of_the_nodes_that_is_not_here(
    here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    profile("x", f"{IMAGE}host_python: /opt/of/the/nodes/python3.11\n")
    status, _, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert (status, "there is no /opt/of/the/nodes/python3.11 here" in err) == (0, True)
