"""A save that is under way, and how far each rank is with it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from galley.checkpoint.checkpoint import State
from galley.checkpoint.flats import Layout
from galley.contract.rundir import Checkpoint


@dataclass
class Pending:
    """A save that is under way. The events are set by the thread that writes, but for ``all_written``."""

    state: State
    checkpoint: Checkpoint
    staging: Path
    probes: dict[str, torch.Tensor]
    began: float
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    layout: Layout = field(default_factory=list)
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's file is on the disk, or could not be written."""
    all_written: threading.Event = field(default_factory=threading.Event)
    """Every rank's file is on the disk, as the ranks have agreed: rank 0's thread may publish."""
    published: threading.Event = field(default_factory=threading.Event)
    """On rank 0: the checkpoint stands, or could not be published."""
    problem: str | None = None
    seconds: float = 0.0
    """From its beginning to its end."""
    stall: float = 0.0
    """Seconds that training stood still for it."""


class SaveProgress(NamedTuple):
    """How far this rank is with the save that is under way, as numbers that ranks add up; all 0 where none is."""

    written: float
    """1: its file is on the disk, or could not be written."""
    failed: float
    """1: it could not be written."""
    published: float
    """1, on rank 0 only: the checkpoint stands, or could not be published."""
