"""Secrets of a submitted run: in one private file outside the run, and nowhere else."""

import json
import os
import stat
from pathlib import Path

import pytest
from launch.submitting import RUN, galley, here, profile, submission, submitted
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.sensitive import is_withheld
from galley_launch.submit import submission as submitting

__all__ = ["fakes", "here"]


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Secrets of the user's, named in a profile and not."""
    found = {name: f"value-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "OTHER_TOKEN", "AWS_SECRET", "MY_PASS")}
    found["MY_PASS"] = "it's $HOME\nand `more` \udcff"
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    profile("x", "secrets: [HF_TOKEN, MY_PASS, ABSENT]\n")
    return found


def test_secrets_are_in_one_private_file_and_nowhere_else(
    here: Path, fakes: Scenario, secretive: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0)  # The most careless of users.
    try:
        status, out, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    finally:
        os.umask(before)
    assert status == 0
    (path,) = (here / "config" / "galley" / "secrets").iterdir()
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert [line.partition(b"=")[0] for line in path.read_bytes().splitlines() if b"=" in line] == [
        b"HF_TOKEN",
        b"MY_PASS",
    ]
    values = [os.fsencode(value) for value in secretive.values()]
    everywhere = [each.read_bytes() for each in here.rglob("*") if each.is_file() and each != path]
    everywhere += [json.dumps(fakes.calls()).encode(), out.encode(), err.encode()]
    assert len(everywhere) > 50
    assert not [text for text in everywhere for value in (*values, b"value-of-", b"it's $HOME") if value in text]
    for call in fakes.calls("sbatch"):
        assert not set(secretive) & set(call["env"])
    assert json.loads(RUN.cluster.read_text())["secrets_file"] == str(path)


def test_the_file_of_secrets_goes_with_the_secrets(
    here: Path, fakes: Scenario, secretive: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = submission("my.yaml", "cluster=x")
    assert submitting.keep_secrets(made.run, ["HF_TOKEN"]) == ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    assert submitting.keep_secrets(made.run, ["HF_TOKEN"]) == []
    assert list((here / "config" / "galley" / "secrets").iterdir()) == []


def test_secrets_that_cannot_be_kept(
    here: Path,
    fakes: Scenario,
    secretive: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/config")
    status, _, err = galley(capsys, "submit", "my.yaml", "cluster=x")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("galley: /proc/config/galley/secrets/galley-my-")
    assert "value-of" not in err
    assert submitted(fakes) == []


@pytest.mark.parametrize(
    ("name", "value", "withheld"),
    [
        ("HF_TOKEN", "x", True),
        ("MONKEY", "x", True),  # any part of a name counts
        ("AUTH", "x", True),
        ("PROXY", "http://ada@host", True),
        ("PLAIN", "ghp_0123456789abcdefghij0123456789", True),
        ("PATH", "/usr/bin", False),
        ("PWD", "/home/ada", False),
        ("XDG_RUNTIME_DIR", "/run/user/1", False),
    ],
)
def test_what_is_kept_from_slurm(name: str, value: str, withheld: bool) -> None:
    assert is_withheld(name, value) == withheld
