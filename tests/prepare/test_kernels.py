"""Kernels that a run asks for are missed before anything is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy import make_spec

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.model import kernels


def test_liger_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    spec = make_spec(RunDir(tmp_path / "run"), tmp_path)
    kernels.check_installed(spec)
    asked = spec.model_copy(update={"placement": spec.placement.model_copy(update={"liger": True})})
    with pytest.raises(UserError, match="package liger-kernel is not installed here; pip install liger-kernel"):
        kernels.check_installed(asked)
