"""Each part of an export is checked twice before it is called verified: its weights, and what it computes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from galley.export.logitcheck import MOST, Agreement
from galley.export.weightcheck import Weights


@dataclass(frozen=True)
class Check:
    """One part of an export, compared with what was trained; as ``export.json`` has it."""

    what: str
    """``adapter``, ``model`` or ``model (merged)``."""
    against: str
    """What its logits were compared with."""
    verified: bool
    difference: float
    """Of the logits (relative); see :class:`galley.export.logitcheck.Agreement` for the next seven."""
    tolerance: float
    rounding: float
    direct: float
    divergence: float
    same_top: float
    agree: int
    probes: int
    tensors: int
    """Tensors whose values were compared."""
    largest: float
    """The largest difference of a tensor; see :class:`galley.export.weightcheck.Weights`."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it was trained."""


def conclude(what: str, against: str, weights: Weights, logits: Agreement) -> Check:
    """The verdict over one part, which is also printed."""
    wrong = list(weights.wrong)
    if not logits.right:
        wrong.append(_disagreement(against, logits))
    check = Check(
        what=what,
        against=against,
        verified=not wrong,
        tensors=weights.tensors,
        largest=weights.largest,
        wrong=wrong[:20],
        **asdict(logits),
    )
    _tell(check, weights, logits)
    return check


def _disagreement(against: str, logits: Agreement) -> str:
    if logits.rounding > MOST or math.isnan(logits.rounding):
        return f"its own logits are not those of its weights: they differ from fp32 by {logits.rounding:.1e}"
    return (
        f"its logits are not those of {against}, which differ from fp32 by {logits.difference:.2e} where rounding "
        f"explains {logits.tolerance:.0e}: {logits.agree} of {logits.probes} probes agree"
    )


def _tell(check: Check, weights: Weights, logits: Agreement) -> None:
    print(f"{check.what}: {weights.describe()}", flush=True)
    print(
        f"{check.what}: logits of {check.against} differ from fp32 by {logits.difference:.2e} (relative), the export's "
        f"by {logits.rounding:.2e} (at most {logits.tolerance:.0e} is rounding), likeliest token the same in "
        f"{logits.same_top:.0%} of {logits.probes} probes",
        flush=True,
    )
    if logits.right and logits.agree < logits.probes:
        odd = logits.probes - logits.agree
        print(
            f"warning: {check.what}: {odd} of {logits.probes} probes differ by more than rounding explains, as where a "
            "mixture sends a token to another expert; the weights are compared one by one",
            flush=True,
        )


def problem(checks: list[Check], failures: dict[str, str]) -> str | None:
    """Why the export is not verified, in a sentence; None where it is. ``failures``: parts that could not be made."""
    sentences = [
        f"{check.what} is not verified: {'; '.join(check.wrong[:2])}" for check in checks if not check.verified
    ]
    sentences += [f"the {part} could not be made or checked: {why}" for part, why in failures.items()]
    return "; ".join(sentences)[:400] or None


Facts = dict[str, Any]
"""What ``export.json`` holds."""
