"""Whether training still works: numbers that are not finite, or gradients of exactly 0, end the run in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from galley.contract.errors import UserError
from galley.contract.spec import RunSpec
from galley.data.prepared import SourceShare, row_names
from galley.engine.engine import LEAST_SCALE

_STILL = 5
"""After so many steps in a row with a gradient norm of exactly 0 the run ends: the next would change nothing either."""
_GUESSING = 0.95
"""A model whose loss is at least this share of ln(vocabulary), the loss of a blind guess, counts as broken."""
_MEMORIZED = 1e-3
"""A loss below this has gradients of 0 because every token is predicted: that is no fault."""


@dataclass
class Health:
    """Judges the numbers of each step, which are the same on every rank: so every rank raises at once."""

    spec: RunSpec
    shares: Sequence[SourceShare] = ()
    """Of the sources that are trained on, where there are several: their rows have names."""
    still: int = 0
    """Steps in a row whose gradient norm was exactly 0."""
    loss: float = 0.0
    """The loss of the last step that was taken."""

    @property
    def advice(self) -> str:
        """What helps against training that diverges; names the rate, the commonest reason."""
        rate = self.spec.task.optimizer.lr
        return f"optimizer.lr is {rate:g}: try a lower one, or a longer schedule.warmup, in a new run (name=…)"

    def loss_is_not_finite(self, step: int, samples: list[int], rows: list[int]) -> UserError:
        """The error of a step whose loss is not finite in micro-batches of ``samples``, from data ``rows`` (from 0)."""
        names = row_names(self.shares, rows[:8])
        where = f"in micro-batches of samples {samples[:8]}, data rows [{', '.join(names)}]"
        what = f"the loss of step {step} is not finite {where}"
        return UserError("train", what, f"look at those rows; {self.advice}")

    def overflow(self, step: int, scale: dict[str, float] | None) -> str:
        """What to print of a step that fp16 gradients overflowed in, so that DeepSpeed left it out.

        Raises ``UserError`` where the loss is scaled by the least that there is: lower scales have been tried by then.
        """
        factor = scale["cur_scale"] if scale else 0.0
        if factor <= LEAST_SCALE:
            what = f"the gradients of step {step} are not finite in fp16, whatever the loss is scaled by"
            raise UserError("train", what, self.advice)
        return f"step {step} changes nothing: its gradients overflow fp16; losses are scaled by {factor:g} now"

    def step(self, step: int, loss: float, norm: float) -> None:
        """Raise ``UserError`` where a step's gradient norm is not finite, or has been exactly 0 for several steps.

        ``loss`` is finite: where it is not, the loop names the rows.
        """
        if not math.isfinite(norm):
            what = f"the gradient norm of step {step} is {norm}, though its loss is {loss:.4f}"
            raise UserError("train", what, self.advice)
        self.loss = loss
        self.still = self.still + 1 if norm == 0 and loss > _MEMORIZED else 0
        if self.still >= _STILL:
            what = f"the gradient norm was exactly 0 for {_STILL} steps up to step {step}, at a loss of {loss:.4f}"
            raise UserError("train", f"{what}: nothing is trained any more", self.advice)

    def end(self, vocab: int) -> list[str]:
        """Warnings once training is done. A loss of ln(``vocab``) is that of guessing tokens blindly."""
        if self.loss < _GUESSING * math.log(vocab):
            return []
        what = f"the last loss, {self.loss:.4f}, is no better than guessing among {vocab:,} tokens"
        return [f"{what}: the model is broken; {self.advice}"]

    def held_out(self, step: int, loss: float) -> None:
        """Raise ``UserError`` where a held-out loss is not finite: no checkpoint could be called the best."""
        if not math.isfinite(loss):
            raise UserError("train", f"the held-out loss after step {step} is {loss}", self.advice)

    def probes(self, step: int, logits: torch.Tensor) -> None:
        """Raise ``UserError`` where the weights about to be saved compute logits [probes, vocabulary] that are not
        finite: the last step's update has no next step to be noticed in.
        """
        if not bool(torch.isfinite(logits).all()):
            raise UserError("train", f"after step {step} the model's logits are not finite; not saved", self.advice)
