"""A run whose stages are small scripts: the launcher cannot tell, and a test need not wait for torch."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from galley.contract.rundir import Attempt, RunDir
from galley.contract.spec import Batch, Data, Duration, Model, Optimizer, Origin, Paths, Placement, RunSpec, Task
from galley_launch.plan.plan import Plan, Stage

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = f"{ROOT / 'launch'}:{ROOT / 'src'}:{ROOT / 'tests'}"

# What every fake stage begins with: the attempt that it belongs to, and the words that train leaves.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1]).parent
attempt = run / "attempts" / f"{int(os.environ['GALLEY_ATTEMPT']):04d}"
def leave(verdict, step=3, reason=None):
    (attempt / "exit.json").write_text(json.dumps({"verdict": verdict, "step": step, "reason": reason}))
def fail(who, status, message):
    body = {"who": who, "status": status, "message": message, "time": time.time()}
    (attempt / "errors" / f"{who}.json").write_text(json.dumps(body))
    sys.exit(status)
def step(n):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": n, "steps": 9, "loss": 1.5, "tokens_per_s": 100.0, "left_s": 5.0}) + "\\n")
def wait(test, seconds=20):
    end = time.time() + seconds
    while not test():
        if time.time() > end:
            sys.exit("the fake stage waited in vain")
        time.sleep(0.02)
"""
GOOD_TRAIN = "step(9); leave('done', 9)"
GOOD_EXPORT = (
    "(run / 'export' / 'model').mkdir(parents=True, exist_ok=True); (run / 'export' / 'export.json').write_text('{}')"
)


def spec(root: Path, lr: float = 2e-4, **duration: float) -> RunSpec:
    """A complete run of one sample a step on one CPU rank."""
    paths = Paths(run=str(root), model="org/model", data="org/data", cache=str(root / "cache"))
    return RunSpec(
        schema=1,
        name=root.name,
        task=Task(
            model=Model(path="org/model"),
            data=Data(path="org/data"),
            optimizer=Optimizer(lr=lr),
            batch=Batch(samples=1),
            duration=Duration.model_validate(duration or {"steps": 9}),
        ),
        placement=Placement(device="cpu", deepspeed={"train_batch_size": 1}, paths=paths),
        origin=Origin(recipe="fake", version="0"),
    )


def plan(made: RunSpec, run: RunDir, attempt: int, **scripts: str) -> Plan:
    """The real files, and a script for each stage: ``prepare``, ``train`` and ``export``."""
    stages = {"prepare": "", "train": GOOD_TRAIN, "export": GOOD_EXPORT} | scripts
    env = {"GALLEY_ATTEMPT": str(attempt)}
    placement = str(run.attempt(attempt).placement.relative_to(run.root))
    return Plan(
        {placement: made.placement.model_dump_json(), "run.json": made.to_json()},
        tuple(
            Stage(name, (sys.executable, "-c", PRELUDE + textwrap.dedent(body), str(run.spec.absolute())), env)
            for name, body in stages.items()
        ),
    )


def make(made: RunSpec, run: RunDir, **scripts: str) -> Callable[[int], Plan]:
    """What :func:`galley_launch.local.runner.start` asks for."""
    return lambda attempt: plan(made, run, attempt, **scripts)


LAUNCHER = """
import json, sys
from pathlib import Path
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.local import runner, supervise
from launch import fakes
supervise.GRACE_S = 0.5
run = RunDir(Path(sys.argv[1]))
made = fakes.spec(run.root)
try:
    sys.exit(runner.start(made, run, fakes.make(made, run, **json.loads(sys.argv[2]))))
except UserError as error:
    print(f"galley: {error}", file=sys.stderr)
    sys.exit(2)
"""


def launch(root: Path, **scripts: str) -> "subprocess.Popen[str]":
    """A launcher in a process of its own, on a run of fake stages."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(root), json.dumps(scripts)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(test: Callable[[], object], seconds: float = 20) -> None:
    """Wait until ``test`` holds; fail where it does not within ``seconds``."""
    end = time.monotonic() + seconds
    while not test():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def verdict(attempt: Attempt) -> dict[str, object]:
    """The attempt's ``exit.json``."""
    body: dict[str, object] = json.loads(attempt.exit.read_text())
    return body
