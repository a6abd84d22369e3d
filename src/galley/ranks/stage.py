"""How every stage starts and ends: read the spec, do the work, leave a record of what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.files import of_the_disk, reason, shut_out_others
from galley.contract.rundir import UNVERIFIED, Attempt, RunDir, write_atomic
from galley.contract.sensitive import masked
from galley.contract.spec import RunSpec
from galley.contract.text import one_line

REFUSED = 2
"""Exit status of what is the user's to fix."""
Work = Callable[[RunSpec, RunDir, Attempt], None]
_OF_CODE = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
_OF_SHAPES = re.compile(
    r"invalid for input of size|same dtype|strides should be|size of tensor|shapes cannot be multiplied|must match"
)


class Superseded(Exception):
    """A later attempt has begun: this one ends in good order, and writes nothing that the later one reads."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(f"attempt {attempt.number} is superseded: a later one has taken over; nothing more is saved")


class Unverified(Exception):
    """An export was written, but its check failed. The message is for the user."""


def current_attempt(run: RunDir) -> Attempt:
    """The attempt that ``GALLEY_ATTEMPT`` names, else the newest, else the first: a stage can be started by hand."""
    number = os.environ.get("GALLEY_ATTEMPT")
    if number:
        attempt = run.attempt(int(number))
    else:
        attempts = run.attempts()
        attempt = attempts[-1] if attempts else run.attempt(1)
    attempt.logs.mkdir(parents=True, exist_ok=True)
    return attempt


def record_error(attempt: Attempt, who: str, status: int, message: str) -> None:
    """Leave why ``who`` (a stage, or ``rank-N``) failed where the launcher looks for it, if it can be written there."""
    path = attempt.error(who)
    body = {
        "who": who,
        "status": status,
        "message": masked(message, "(hidden)"),
        "time": time.time(),
        "host": platform.node(),
    }
    with contextlib.suppress(OSError):  # a full disk, or a file in the folder's place: the log has it too
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(body))


def run_stage(who: str, work: Work, argv: list[str]) -> int:
    """Run ``work`` on the ``run.json`` that ``argv`` names.

    Returns the exit status: 0 (for a superseded attempt too), 2 for the user's mistakes (one line on stderr), 3 for an
    export whose check failed (ditto), 1 for anything else (a traceback).
    """
    if len(argv) != 1:
        print(f"galley: usage: python -m galley.{who} RUN/run.json", file=sys.stderr)
        return REFUSED
    shut_out_others()
    path = Path(argv[0]).absolute()
    try:
        spec, run = RunSpec.read(path), RunDir(path.parent)
        attempt = current_attempt(run)
    except (OSError, ValueError) as error:
        at = getattr(error, "filename", None) or path
        print(f"galley: {one_line(f'{at}: cannot be used ({reason(error)}); start a new run')}", file=sys.stderr)
        return 2
    try:
        work(spec, run, attempt)
    except Superseded as notice:
        print(notice, flush=True)
    except UserError as error:
        return _fail(attempt, who, REFUSED, str(error))
    except Unverified as notice:
        return _fail(attempt, who, UNVERIFIED, str(notice))
    except Exception as error:
        if refusal := of_the_disk(error):
            return _fail(attempt, who, REFUSED, str(refusal))
        traceback.print_exc()
        if refusal := _of_the_model(error):
            return _fail(attempt, who, REFUSED, str(refusal))
        record_error(attempt, who, 1, one_line(f"{type(error).__name__}: {error}".splitlines()[0]))
        return 1
    return 0


def _fail(attempt: Attempt, who: str, status: int, message: str) -> int:
    """Tell the user in one line, and leave it for the launcher; returns the exit status."""
    line = one_line(message)
    print(f"galley: {line}", file=sys.stderr, flush=True)
    record_error(attempt, who, status, line)
    return status


def _of_the_model(error: Exception) -> UserError | None:
    """The refusal that an error of transformers' own modelling code is, which trying again would not change.

    Some architectures want samples of certain lengths or arguments that no trainer gives (Reformer, X-MOD), compute in
    mixed dtypes, or have a configuration that does not fit together. A RuntimeError counts only where it is about
    shapes and dtypes: memory, devices and networks are RuntimeErrors too.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    if not frames or not re.search(r"/transformers/(models|integrations)/", frames[-1].filename):
        return None
    if not isinstance(error, _OF_CODE) and not (type(error) is RuntimeError and _OF_SHAPES.search(str(error))):
        return None
    file, lines = Path(frames[-1].filename).name, str(error).strip().splitlines()
    what = f"the model refuses its input ({file}: {lines[0][:250] if lines else ''})"
    return UserError("model.path", what, "use another model or data.max_length")
