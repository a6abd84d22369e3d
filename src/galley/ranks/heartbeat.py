"""Signs of life: where each rank is, for whoever watches its node, and its stacks when somebody asks.

Where ``GALLEY_HEARTBEATS`` names a directory (on the node's own disk), each rank keeps a file ``rank-N.json`` there.
Imported before anything heavy: the standard library only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from pathlib import Path
from typing import Literal

Phase = Literal["start", "join", "load", "step", "evaluate", "save", "end"]


def begin() -> None:
    """Say that this rank's process is up, and print all its Python stacks on SIGUSR2, and on a crash.

    They go to the standard error as it then is: the rank's log, once that is redirected. Calling this again is fine.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
    beat("start")


def beat(phase: Phase, step: int = 0) -> None:
    """Write ``{"rank", "pid", "host", "phase", "step", "time"}``; ``step`` counts the optimizer steps taken.

    A reader sees the old file or the new one. Not fsynced: nobody reads it after a power cut. What cannot be written
    is left out, for a full disk on the node is no reason to end a run.
    """
    folder = os.environ.get("GALLEY_HEARTBEATS")
    if not folder:
        return
    rank = os.environ.get("RANK", "0")
    body = {"rank": int(rank), "pid": os.getpid(), "host": os.uname().nodename, "phase": phase, "step": step}
    path = Path(folder, f"rank-{rank}.json")
    beside = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        beside.write_text(json.dumps(body | {"time": time.time()}), encoding="utf-8")
        beside.replace(path)
