"""What transformers' own modelling code refuses is the user's to change: one line, and exit status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import make_spec

from galley.contract.rundir import RunDir
from galley.ranks.stage import run_stage


def raising(file: str, error: str) -> Callable[..., None]:
    """A stage's work that ends in ``error``, raised in ``file``."""
    space: dict[str, Callable[..., None]] = {}
    exec(compile(f"def work(spec, run, attempt):\n    raise {error}\n", file, "exec"), space)
    return space["work"]


MODEL = "/env/site-packages/transformers/models/reformer/modeling_reformer.py"
TOLD = "model.path: the model refuses its input (modeling_reformer.py: has to be a multiple of 64); use another model or data.max_length"  # noqa: E501


@pytest.mark.parametrize(
    ("file", "error", "status", "message"),
    [
        (MODEL, "ValueError('has to be a multiple of 64\\nConsider padding')", 2, TOLD),
        (MODEL, "RuntimeError('CUDA out of memory')", 1, "RuntimeError: CUDA out of memory"),
        ("/src/galley/train/loop.py", "ValueError('ours')", 1, "ValueError: ours"),
    ],
)
def test_only_a_value_error_of_modelling_code_is_a_refusal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, error: str, status: int, message: str
) -> None:
    run = RunDir(tmp_path / "run")
    make_spec(run, tmp_path / "model")
    assert run_stage("rank-0", raising(file, error), [str(run.spec)]) == status
    assert json.loads(run.attempt(1).error("rank-0").read_text())["message"] == message
    assert "Traceback" in capfd.readouterr().err, "where it happened stays in the log"
