"""Experiment trackers beside TensorBoard: Weights & Biases and MLflow, through their own libraries.

Each tracker has a process of its own, ``python -m galley.track.trackers RUN/run.json NAME START``, that follows
``metrics.jsonl`` from the byte ``START``. So no rank imports a tracker's library, waits for a network or fails with it:
a tracker that is away is reported in one line, tried again from the same row, and left behind when training has ended.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from galley.contract.errors import UserError
from galley.contract.metrics import MetricsRow, parse_row
from galley.contract.rundir import Attempt, RunDir, read_json, write_atomic
from galley.contract.spec import RunSpec

LIMIT = 30
"""Seconds that a tracker has to send the rest, once training has ended."""
TICK, AGAIN = 2.0, 60.0
"""Seconds between looks at the metrics, and before a tracker that failed is tried again."""
DONE = "done"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}

# What the user sets wins. The libraries' own patience with a server is minutes, and both report home by default.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_ERROR_REPORTING": "false",
}  # fmt: skip
_NOT_A_RANK = ("RANK", "LOCAL_RANK")  # the watch on a cluster's node tells ranks by these


def check_installed(spec: RunSpec) -> None:
    """Raise :class:`UserError` where the library of a tracker that ``spec`` asks for is not installed here."""
    for name in spec.tracking.names:
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:  # a folder of that name, such as W&B itself makes, is no library
            what = f"the Python package {name} is not installed here"
            raise UserError(f"tracking.{name}", what, f"pip install {PACKAGES[name]}, or remove tracking.{name}")


def identity(run: RunDir) -> str:
    """What trackers know ``run`` by: chosen once, and the same in every attempt."""
    known = (read_json(run.tracker) or {}).get("id")
    if isinstance(known, str):
        return known
    chosen = secrets.token_hex(8)
    write_atomic(run.tracker, json.dumps({"id": chosen}) + "\n")
    return chosen


@dataclass(frozen=True)
class Trackers:
    """The trackers' processes, as the first rank sees them."""

    children: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def end(self) -> None:
        """Tell them that training ended well and no row follows. Where it does not end well nobody calls this, and all
        that they notice is the end of their standard input.
        """
        for child in self.children.values():
            try:
                assert child.stdin is not None
                child.stdin.write(DONE)
                child.stdin.close()
            except OSError:
                continue  # it has died

    def wait(self) -> None:
        """Wait until all is sent, :data:`LIMIT` seconds and a few at most."""
        deadline = time.monotonic() + LIMIT + 5
        for name, child in self.children.items():
            try:
                status = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                status = None
            if status != 0:
                print(f"tracker {name} did not take the last rows; metrics.jsonl has them", flush=True)


def start(spec: RunSpec, run: RunDir, attempt: Attempt, at: int) -> Trackers:
    """Start the trackers that ``spec`` asks for, on the rows of ``metrics.jsonl`` from byte ``at``. Never fails."""
    trackers = Trackers()
    for name in spec.tracking.names:
        try:
            identity(run)
            trackers.children[name] = _spawn(run, attempt, name, at)
        except OSError as error:
            _print_failure(name, error)
    return trackers


def _spawn(run: RunDir, attempt: Attempt, name: str, at: int) -> subprocess.Popen[str]:
    attempt.trackers.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "galley.track.trackers", str(run.spec), name, str(at)]
    given = {key: value for key, value in os.environ.items() if key not in _NOT_A_RANK}
    with (attempt.trackers / f"{name}.log").open("a", encoding="utf-8") as log:
        # A session of its own: it gets no signal that is sent to the ranks' process group. It ends when its standard
        # input does.
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=log, text=True, env=_DEFAULTS | given, start_new_session=True
        )


def _print_failure(name: str, error: BaseException) -> None:
    reason = re.sub(r"//[^/@\s]*@", "//", f"{type(error).__name__}: {error}".splitlines()[0])[:200]
    print(f"tracker {name} failed ({reason}); training goes on, and it is tried again", flush=True)


@dataclass(frozen=True)
class Sink:
    """A tracker that is connected."""

    log: Callable[[list[MetricsRow]], None]
    """Send rows of ``metrics.jsonl``, oldest first."""
    finish: Callable[[bool], None]
    """End, well or not, with everything sent."""
    from_the_start: bool = False
    """Whether it is to get the rows of earlier attempts again."""


def numbers(row: MetricsRow) -> dict[str, float]:
    """What trackers, TensorBoard among them, are sent of a row: its numbers, but for those that only count."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    counters = ("step", "steps", "saved_step")
    return {name: value for name, value in values.items() if name not in counters and value is not None}


def facts(spec: RunSpec) -> dict[str, Any]:
    """The configuration that trackers are sent."""
    return spec.model_dump(mode="json", include={"task", "placement", "origin"})


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}{key}.") if isinstance(part, dict) else {f"{prefix}{key}": str(part)}
    return flat


def wandb_sink(spec: RunSpec, run: RunDir) -> Sink:
    """Weights & Biases: one run, to which each attempt adds.

    ``step`` is its axis, not W&B's own counter, which never goes back: rows that are done again would be dropped.
    Offline nothing can be resumed, and the files of the last attempt replace those before them at ``wandb sync``; so
    there each attempt writes every row.
    """
    import wandb

    assert spec.tracking.wandb is not None
    # What ranks print is in their own logs; a git remote's address may hold a token.
    quiet = wandb.Settings(
        silent=True, console="off", disable_git=True, disable_code=True, init_timeout=60, x_stats_pid=os.getppid()
    )
    tracked = wandb.init(
        **spec.tracking.wandb.model_dump(), id=identity(run), resume="allow", name=spec.name, config=facts(spec),
        dir=str(run.root), settings=quiet,
    )  # fmt: skip
    tracked.define_metric("step")
    tracked.define_metric("*", step_metric="step")
    print(f"wandb: {f'offline, in {tracked.dir}' if tracked.offline else tracked.url}", flush=True)

    def log(rows: list[MetricsRow]) -> None:
        for row in rows:
            tracked.log({"step": row.step, **numbers(row)})

    return Sink(log, lambda well: tracked.finish(exit_code=0 if well else 1), tracked.offline)


def mlflow_sink(spec: RunSpec, run: RunDir) -> Sink:
    """MLflow: one run, found again by its tag ``galley.id``. Its parameters are those of the first attempt."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    asked = spec.tracking.mlflow
    assert asked is not None
    client = MlflowClient(tracking_uri=asked.uri)
    experiment = client.get_experiment_by_name(asked.experiment)
    at, own = experiment.experiment_id if experiment else client.create_experiment(asked.experiment), identity(run)
    earlier = client.search_runs([at], f"tags.`galley.id` = '{own}'", max_results=1)
    tracked = earlier[0] if earlier else client.create_run(at, run_name=spec.name, tags={"galley.id": own})
    run_id = tracked.info.run_id
    client.update_run(run_id, status="RUNNING")
    params = [] if tracked.data.params else [Param(*pair) for pair in _flat(facts(spec)).items()]
    for first in range(0, len(params), 100):  # MLflow's limits of one request: 100 parameters, 1000 metrics
        client.log_batch(run_id, params=params[first : first + 100])

    def log(rows: list[MetricsRow]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, row.step) for row in rows for name, value in numbers(row).items()]
        for first in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[first : first + 1000])

    return Sink(log, lambda well: client.set_terminated(run_id, "FINISHED" if well else "FAILED"))


CONNECT: dict[str, Callable[[RunSpec, RunDir], Sink]] = {"wandb": wandb_sink, "mlflow": mlflow_sink}


@dataclass
class Ending:
    """The end of the ranks, which this process notices by the end of its standard input."""

    come: threading.Event = field(default_factory=threading.Event)
    well: bool = False

    def listen(self) -> None:
        """Wait for the end; from then on the process has :data:`LIMIT` seconds to live, whatever it waits for."""
        self.well = sys.stdin.read() == DONE
        signal.alarm(LIMIT)
        self.come.set()


def read_rows(file: BinaryIO, at: int) -> tuple[list[MetricsRow], int]:
    """The whole rows from byte ``at`` on, and where the next will begin."""
    file.seek(at)
    data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    rows = [row for line in whole.splitlines() if (row := parse_row(line)) and row.step is not None]
    return rows, at + len(whole)


def follow(connect: Callable[[], Sink], name: str, file: BinaryIO, at: int, ending: Ending) -> bool:
    """Send rows as they come, until the ranks have ended. What fails is reported once, and tried again.

    Returns whether everything was sent.
    """
    sink, reported = None, False
    while True:
        last = ending.come.is_set()  # before reading: then nothing comes after what is read
        try:
            if sink is None:
                sink = connect()
                at = 0 if sink.from_the_start else at
            rows, after = read_rows(file, at)
            sink.log(rows)
            at = after
            if last:
                sink.finish(ending.well)
                return True
            pause = TICK
        except Exception as error:  # whatever a library raises, training goes on
            traceback.print_exc()
            if not reported:
                _print_failure(name, error)
            reported, pause = True, AGAIN
        if last:
            return False
        ending.come.wait(pause)


def main(argv: list[str]) -> int:
    """Follow a run: ``argv`` is its ``run.json``, the tracker's name, and the byte of ``metrics.jsonl`` to begin at."""
    path, name, at = Path(argv[0]), argv[1], int(argv[2])
    spec, run, ending = RunSpec.read(path), RunDir(path.parent), Ending()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    threading.Thread(target=ending.listen, daemon=True).start()
    # Opened once: a later attempt puts another file in its place.
    with run.metrics.open("rb") as file:
        return 0 if follow(lambda: CONNECT[name](spec, run), name, file, at, ending) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
