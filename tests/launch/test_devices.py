"""Which GPUs are visible, with an ``nvidia-smi`` of the test's own on PATH."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley_launch.base import devices

ROWS = """0, GPU-aaaa-1, NVIDIA H200, 143771, 3
1, GPU-bbbb-2, NVIDIA H200, 143771, 90000
2, GPU-cccc-3, NVIDIA H200, 143771, 3"""

Smi = Callable[[str], None]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Put an ``nvidia-smi`` with these rows on PATH, and nothing in the environment."""

    def put(rows: str, status: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'E'\n{rows}\nE\nexit {status}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_") or name == "CUDA_VISIBLE_DEVICES"]:
        monkeypatch.delenv(name)
    put(ROWS)
    return put


def names() -> list[str]:
    return [gpu.index for gpu in devices.visible()]


def test_all_gpus_are_visible(smi: Smi) -> None:
    assert names() == ["0", "1", "2"]
    assert devices.visible()[1] == devices.Gpu("1", "GPU-bbbb-2", "NVIDIA H200", 143771, 90000)


@pytest.mark.parametrize(
    ("mask", "found"),
    [("2,0", ["2", "0"]), ("GPU-bbbb", ["1"]), ("", []), ("0,7,1", ["0"]), ("MIG-x", ["MIG-x"]), ("-1", [])],
)
def test_cuda_visible_devices_is_honoured(
    mask: str, found: list[str], smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert names() == found


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, []),
        ({"SLURM_JOB_GPUS": "1,2"}, ["1", "2"]),
        ({"SLURM_JOB_GPUS": "1,2", "SLURM_STEP_GPUS": "2"}, ["2"]),
        ({"SLURM_JOB_GPUS": "1,2", "CUDA_VISIBLE_DEVICES": "0"}, ["0"]),
    ],
)
def test_an_allocation_is_never_exceeded(
    environment: dict[str, str], found: list[str], smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert names() == found


def test_a_box_without_a_driver_has_no_gpu(smi: Smi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert names() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert names() == []
    with pytest.raises(UserError, match="use device=cpu ranks=2 to train on the CPU"):
        devices.on_gpus(2, [])


def test_a_run_takes_all_or_those_it_is_given(smi: Smi) -> None:
    assert devices.on_gpus(None, []).gpus == ("0", "1", "2")
    assert devices.on_gpus(None, ["2", "0"]) == devices.Devices("cuda", 2, ("2", "0"))
    assert devices.on_gpus(2, []).gpus == ("0", "1")
    assert devices.on_gpus(None, ["GPU-cccc"]).gpus == ("2",)


def test_a_gpu_in_use_is_mentioned(smi: Smi) -> None:
    assert devices.on_gpus(None, ["0", "1"]).notes == ("GPU 1 (NVIDIA H200) is in use: 90000 of 143771 MiB are taken",)


def test_a_plan_without_a_gpu_imagines_some(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.imagined(None, []).gpus == ("0",)
    assert devices.imagined(4, []).gpus == ("0", "1", "2", "3")
    assert devices.imagined(None, ["2", "3"]).gpus == ("2", "3")
    assert "no GPU is visible here" in devices.imagined(None, []).notes[0]
    with pytest.raises(UserError, match="too few devices"):
        devices.imagined(2, ["0"])
