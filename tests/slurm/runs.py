"""Runs that are really submitted: a small model, its data and recipes, and what is asked of a run on the way.

Everything is ``galley`` as its users type it; only signals, dead nodes and cut cables come from the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prepare.conftest import chat, train_tokenizer, write_jsonl
from prepare.families import SMOLLM2
from slurm.box import Box
from toy import make_model

from galley.contract.rundir import Checkpoint, RunDir, read_json
from galley_launch.job import chain
from galley_launch.submit import queue

ROOT = Path(__file__).resolve().parents[2]
STEPS = 48
"""Steps of the ``long`` recipe, which takes seconds; ``slow`` takes minutes."""
RECIPES = {"tiny": (16, 8, 4), "long": (16, STEPS, 8), "slow": (64, 360, 10)}
"""Samples a step, steps, and steps between checkpoints."""
RECIPE = """about: {about}
model: {{path: model, dtype: float32}}
data: {{path: chats.jsonl, max_length: 128, held_out: 0.05, packing: false}}
method: {{kind: full}}
optimizer: {{lr: 1e-3}}
batch: {{samples: {samples}}}
duration: {{steps: {steps}}}
micro_batch: 2
threads: 1
activation_checkpointing: false
cadence: {{save_every: {every}}}
"""
PROFILE = """about: the cluster of the tests
device: cpu
ranks_per_node: 1
cores_per_rank: 1
whole_nodes: false
memory_per_rank: 2G
time: "0:10:00"
side: {{cores: 1, memory: 4G, time: "0:10:00"}}
cache: {cache}
"""


@dataclass
class Submitted:
    """A run, and the cluster that it was submitted to."""

    box: Box
    run: RunDir
    told: str
    """What ``galley submit`` printed."""

    def wait(self, what: str, there: Callable[[], bool], timeout: float = 240) -> None:
        """Wait until ``there``; fails, with the run's whole story, where it is not or where no job is left."""
        end, asked = time.monotonic() + timeout, 0.0
        while not there():
            now = time.monotonic()
            if now > end:
                raise AssertionError(f"{what}: not within {timeout:.0f} s\n{self.story()}")
            if now > asked + 1:
                asked = now
                if not self.live() and not there():
                    raise AssertionError(f"{what}: and no job is left\n{self.story()}")
            time.sleep(0.1)

    def live(self) -> list[str]:
        """``job (stage) STATE`` of each job that waits or runs; a controller that is away is waited for."""
        found = queue.query([self.run])[self.run.root]
        if found.problem:
            return [found.problem]
        return [f"{job.id} ({stage}) {job.state}" for job, stage in zip(found.jobs, found.stages, strict=True)]

    def wait_step(self, step: int, timeout: float = 240) -> None:
        """Until that optimizer step has been taken."""
        self.wait(f"step {step}", lambda: self.step() >= step, timeout)

    def wait_attempt(self, number: int, timeout: float = 240) -> None:
        """Until attempt ``number`` has begun."""
        self.wait(f"attempt {number}", lambda: self.run.attempt(number).job.exists(), timeout)

    def wait_ended(self, number: int, timeout: float = 240) -> dict[str, Any]:
        """``exit.json`` of attempt ``number``, once its job has judged it."""
        exit_file = self.run.attempt(number).exit
        self.wait(f"the end of attempt {number}", lambda: "again" in (read_json(exit_file) or {}), timeout)
        return read_json(exit_file) or {}

    def wait_over(self, timeout: float = 300) -> None:
        """Until no job of the run waits or runs."""
        self.wait("the end of the run", lambda: not self.live(), timeout)

    def wait_trained(self, timeout: float = 300) -> None:
        """Until an attempt is done; the export is not waited for."""
        self.wait("an attempt that is done", lambda: self.endings()[-1:] == [("done", "finished", "")], timeout)

    def endings(self) -> list[tuple[str, str, str]]:
        """(verdict, reason, kind of failure) of each attempt, as its ``exit.json`` says; empty words where unsaid."""
        ends = [read_json(each.exit) or {} for each in self.run.attempts() if each.number > 0]
        return [(end.get("verdict", ""), end.get("reason", ""), end.get("kind", "")) for end in ends]

    def facts(self, number: int) -> dict[str, Any]:
        """``job.json`` of attempt ``number``."""
        return read_json(self.run.attempt(number).job) or {}

    def job_of(self, number: int) -> str:
        """Slurm's number of the job that makes attempt ``number``."""
        return str(self.facts(number)["job"])

    def resumed_from(self) -> list[int]:
        """Step that each attempt says it resumes after; 0: from the start, -1: no rank came so far."""
        found = []
        for attempt in (each for each in self.run.attempts() if each.number > 0):
            text = read(attempt.log("rank-0"))
            words = text.partition("resuming after step ")[2].split()
            found.append(int(words[0]) if words else 0 if "trainable parameters" in text else -1)
        return found

    def step(self) -> int:
        """The last step in the metrics."""
        return max([0, *(row["step"] for row in rows(self.run) if "loss" in row)])

    def rank(self, rank: int, number: int) -> tuple[str, int]:
        """Node and process number there of a rank of attempt ``number``, once it takes steps."""
        node = str(self.facts(number)["nodes"][rank])
        found = self.box.cluster(
            "on", node, "sh", "-c", f"cat /dev/shm/galley-*-{self.job_of(number)}.*/rank-{rank}.json"
        ).stdout
        return node, int(json.loads(found)["pid"])

    def story(self) -> str:
        """Everything that says how the run went."""
        parts = [self.told, *map(str, self.endings()), f"live: {self.live()}"]
        for attempt in self.run.attempts():
            files = [
                attempt.exit,
                attempt.job,
                *sorted(attempt.root.glob("hang*")),
                *sorted(attempt.logs.glob("*.log")),
            ]
            parts += [f"--- {path.relative_to(self.run.root)}\n{read(path)[-2500:]}" for path in files if path.exists()]
        parts += [f"--- {path.name}\n{read(path)[-1500:]}" for path in sorted((self.run.jobs / "logs").glob("*"))]
        for each in chain.submitted(self.run)[-4:]:
            parts.append(self.box.sh("scontrol", "show", "job", str(each["job"]), check=False))
        log = read(self.box.state / "log" / "slurmctld.log").splitlines()[-40:]
        return "\n".join([*parts, self.box.sh("sinfo", "-N", "-o", "%N %T %E", check=False), *log])


@dataclass
class Kitchen:
    """Where recipes are submitted from: one folder for all tests."""

    folder: Path
    box: Box
    known: dict[tuple[str, ...], list[float]] = field(default_factory=dict)
    made: list[Submitted] = field(default_factory=list)
    """What the test that runs has submitted."""

    @property
    def env(self) -> dict[str, str]:
        """The environment of ``galley``: the cluster's commands, and this checkout."""
        return {**self.box.env, "PYTHONPATH": f"{ROOT}/launch:{ROOT}/src"}

    def galley(self, *words: str, timeout: float = 60, **env: str) -> tuple[int, str, str]:
        """(status, stdout, stderr) of a ``galley`` command, typed in the folder of the recipes."""
        done = subprocess.run(
            [sys.executable, "-m", "galley_launch", *words],
            cwd=self.folder,
            env={**self.env, **env},
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode, done.stdout, done.stderr

    def submit(self, recipe: str, *words: str, **env: str) -> Submitted:
        """Submit ``recipe`` to two nodes, or as ``words`` say; names the run after the test."""
        name = os.environ.get("PYTEST_CURRENT_TEST", "run").partition("::")[2].split()[0]
        name = "".join(each if each.isalnum() else "-" for each in name)[5:60].strip("-")
        given = {"cluster": "box.yaml", "nodes": "2", "name": name, **dict(word.split("=", 1) for word in words)}
        settings = [f"{key}={value}" for key, value in given.items()]
        status, out, err = self.galley("submit", f"{recipe}.yaml", *settings, **env)
        assert status == 0, out + err
        run = RunDir(self.folder / given.get("runs", "runs") / given["name"])
        self.made.append(Submitted(self.box, run, out + err))
        return self.made[-1]

    def losses(self, recipe: str, ranks: int, *words: str) -> list[float]:
        """The losses of an undisturbed ``galley run`` on one box; trained once for all tests."""
        key = (recipe, str(ranks), *words)
        if key not in self.known:
            name = "alone-" + hashlib.sha256(repr(key).encode()).hexdigest()[:8]
            more = ("device=cpu", f"ranks={ranks}", f"name={name}", *words)
            cache = {"GALLEY_CACHE": str(self.folder / "cache"), "TORCH_EXTENSIONS_DIR": str(operators(self.folder))}
            try:
                status, out, err = self.galley("run", f"{recipe}.yaml", *more, timeout=900, **cache)
            except subprocess.TimeoutExpired:
                self.galley("stop", name)  # it would go on
                raise
            assert status == 0, out + err
            self.known[key] = losses(RunDir(self.folder / "runs" / name))
        return self.known[key]


def read(path: Path) -> str:
    """The text of a log; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def rows(run: RunDir) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, without one that is half written."""
    found = []
    for line in read(run.metrics).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def losses(run: RunDir) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in rows(run) if "loss" in row]


def assert_sound(made: Submitted, expected: list[float]) -> None:
    """A run that is trained is as if nothing had happened: every step once and in order, the very same losses.

    Each attempt went on from a checkpoint that was whole before it began, and all that is left is whole.
    """
    steps = [row["step"] for row in rows(made.run) if "loss" in row]
    assert steps == list(range(1, len(expected) + 1)), made.story()
    assert losses(made.run) == expected, made.story()
    found = sorted((made.run.root / "checkpoints").iterdir())
    assert found, made.story()
    assert all(Checkpoint(path).verifies() and path.name.startswith("step-") for path in found), (found, made.story())
    states = [(read_json(Checkpoint(path).manifest) or {})["state"]["step"] for path in found]
    assert states == [Checkpoint(path).step for path in found]
    begun_at = [int(made.facts(each.number)["checkpoint"]) for each in made.run.attempts() if each.number > 0]
    assert [then for then in made.resumed_from() if then >= 0] == [
        begun for begun, then in zip(begun_at, made.resumed_from(), strict=True) if then >= 0
    ], made.story()


def operators(folder: Path) -> Path:
    """Where the jobs of this interpreter keep DeepSpeed's operators in the cache of ``folder``."""
    return folder / "cache" / "operators" / hashlib.sha256(sys.executable.encode()).hexdigest()[:12]


def _seed_operators(folder: Path) -> None:
    """Compile the operators where every other test of this user finds them, too, and copy them from there."""
    env = {name: value for name, value in os.environ.items() if name != "TORCH_EXTENSIONS_DIR"}
    command = [sys.executable, "-m", "galley.ranks.operators"]
    env |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{ROOT}/src"}
    where = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    if any(Path(where).glob(".galley-deepspeed_shm_comm-cpu.json")):
        shutil.copytree(where, operators(folder))


def make_kitchen(folder: Path, box: Box) -> Kitchen:
    """Write the model, the data, the recipes and the cluster's profile."""
    tokenizer = train_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.chat_template = SMOLLM2
    make_model(folder / "model", layers=4, hidden=128, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder / "model")
    talks = [chat(f"How many oars has ship {n}?", f"Ship {n} has {n * 7 % 40} oars.") for n in range(400)]
    write_jsonl(folder / "chats.jsonl", talks)
    for name, (samples, steps, every) in RECIPES.items():
        text = RECIPE.format(about=name, samples=samples, steps=steps, every=every)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "box.yaml").write_text(PROFILE.format(cache=folder / "cache"), encoding="utf-8")
    _seed_operators(folder)
    return Kitchen(folder, box)
