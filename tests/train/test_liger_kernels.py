"""Liger's kernels compute what the layers compute. Without a GPU Triton's interpreter runs them, slowly but truly.

Not collected where liger-kernel is not installed: with Triton it takes a gigabyte.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import toy


@pytest.mark.slow
def test_loss_and_gradients(tmp_path: Path) -> None:
    model = toy.make_model(tmp_path / "model")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).with_name("liger_compare.py")), str(model)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5
