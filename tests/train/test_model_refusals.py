"""What transformers' own modelling code refuses is the user's to change: one line, and exit status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import make_spec

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.data.batches import Batch
from galley.data.columns import IGNORED
from galley.objective import sft
from galley.ranks.stage import run_stage


def raising(file: str, error: str) -> Callable[..., None]:
    """A stage's work that ends in ``error``, raised in ``file``."""
    space: dict[str, Callable[..., None]] = {}
    exec(compile(f"def work(spec, run, attempt):\n    raise {error}\n", file, "exec"), space)
    return space["work"]


MODEL = "/env/site-packages/transformers/models/reformer/modeling_reformer.py"
SHAPES = "model.path: the model refuses its input (modeling_reformer.py: expected m1 and m2 to have the same dtype); use another model or data.max_length"  # noqa: E501
TOLD = "model.path: the model refuses its input (modeling_reformer.py: has to be a multiple of 64); use another model or data.max_length"  # noqa: E501


@pytest.mark.parametrize(
    ("file", "error", "status", "message"),
    [
        (MODEL, "ValueError('has to be a multiple of 64\\nConsider padding')", 2, TOLD),
        (MODEL, "TypeError('has to be a multiple of 64')", 2, TOLD),
        (MODEL, "RuntimeError('expected m1 and m2 to have the same dtype')", 2, SHAPES),
        (MODEL, "OSError('disk')", 1, "OSError: disk"),
        (MODEL, "RuntimeError('CUDA out of memory')", 1, "RuntimeError: CUDA out of memory"),
        ("/src/galley/train/loop.py", "ValueError('ours')", 1, "ValueError: ours"),
    ],
)
def test_only_an_error_of_modelling_code_that_would_come_again_is_a_refusal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, error: str, status: int, message: str
) -> None:
    run = RunDir(tmp_path / "run")
    make_spec(run, tmp_path / "model")
    assert run_stage("rank-0", raising(file, error), [str(run.spec)]) == status
    assert json.loads(run.attempt(1).error("rank-0").read_text())["message"] == message
    assert "Traceback" in capfd.readouterr().err, "where it happened stays in the log"


def test_logits_of_another_shape_are_refused() -> None:
    tokens = torch.tensor([[5, 6, 7]])
    batch = Batch([0], tokens, torch.arange(3)[None], torch.tensor([[6, 7, IGNORED]]), token_count=3)
    with pytest.raises(UserError, match=r"logits have the shape \[2, 9\], not \[1, 2 tokens, vocabulary\]"):
        sft.loss(Flat(), batch)


class Flat(torch.nn.Module):
    """A model without a dimension of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(4, 9)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(torch.zeros(1, 3, 4))[0])
