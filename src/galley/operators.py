"""DeepSpeed's native operators, compiled here once, so that ranks never compile (all at once, in silence, a minute)."""

from __future__ import annotations

from galley.spec import RunSpec


def build_operators(spec: RunSpec) -> None:
    """Compile what this placement's ranks will load."""
    del spec
