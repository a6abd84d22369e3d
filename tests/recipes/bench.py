"""Run shipped recipes on twins of their models: composed, planned and written by the launcher, its stages forked."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prepare.conftest import write_jsonl
from prepare.families import assistant, user
from ranks import Ranks
from safetensors import safe_open

from galley.contract.rundir import RunDir, read_json
from galley_launch.base.options import read
from galley_launch.local import runner
from galley_launch.plan import compose, plan, request, resume
from galley_launch.plan.plan import Stage
from galley_launch.recipe.schema import Recipe
from launch import sizes
from recipes import twins

OVERRIDES = {
    "device": ("cpu", "so that any machine can do this"),
    "threads": (1, "the ranks of the tests have a core each"),
    "data.path": ("talks.jsonl", "the recipe's data are on the hub"),
    "data.max_length": (256, "three of these conversations"),
    "batch.samples": (8, "a step takes a second; accumulation stays"),
    "duration.steps": (4, "two before the checkpoint, two after it"),
    "cadence.eval_every": (2, "once at the checkpoint"),
    "cadence.save_every": (2, "the checkpoint to go on from, and the last one"),
    "cadence.keep": (2, "the first is not pruned when the second stands"),
}
"""What is not as the recipe says, and why. Beside these, ``ranks``: 2 where the recipe asks for several GPUs."""
OWN_DATA = ("demo",)
"""Recipes whose data ship beside them."""
ROWS = ("loss", "grad_norm", "lr", "supervised_tokens", "tokens", "held_out_loss", "held_out_tokens")
Row = dict[str, Any]


def talk(number: int) -> Row:
    """A conversation of one or two questions, the same for the same number."""
    messages = []
    for turn in range(1 + number % 2):
        messages.append(user(f"What is the capital of country {number}.{turn}?"))
        messages.append(assistant("The cook says: " + "Rome. Paris. " * (1 + (number + turn) % 4)))
    return {"messages": messages}


@dataclass(frozen=True)
class Bench:
    """A hub's cache of twins, data, and a server that forks ranks."""

    root: Path
    ranks: Ranks

    @property
    def hub(self) -> Path:
        """What ``HF_HUB_CACHE`` names."""
        return self.root / "hub"

    def fork(self, call: str, argv: list[str], world: int = 1, env: dict[str, str] | None = None) -> None:
        """Run a function in forked processes; every one must return 0."""
        log = self.root / f"{call.split(':')[0]}.log"
        log.unlink(missing_ok=True)
        statuses = self.ranks.run(call, argv, world, log, env)
        assert statuses == [0] * world, f"{call} {argv}: {statuses}\n{log.read_text()[-4000:]}"

    def twin(self, model: str) -> Row:
        """``config.json`` of the twin of ``model``, which is made where it is not there yet."""
        folder = twins.snapshot(self.hub, model)
        if not folder.exists():
            self.fork("recipes.twins:main", [str(self.hub), model])
        config = read_json(folder / "config.json")
        assert config
        return config

    def start(self, name: str, ranks: int, *stages: str) -> RunDir:
        """``galley run NAME`` with the overrides, as far as ``stages``."""
        talks = self.root / "talks.jsonl"
        if not talks.exists():
            write_jsonl(talks, [talk(number) for number in range(120)])
        given = {key: value for key, (value, _) in OVERRIDES.items() if key != "data.path" or name not in OWN_DATA}
        words = [f"{key}={value}" for key, value in given.items()]
        made = compose.compose(name, read([*words, f"ranks={ranks}"]), imagine=False)
        action = resume.next_action(made.run, request.earlier(made.run), made.spec)
        attempt = made.run.attempt(action.attempt)
        todo = plan.left(plan.make(made.spec, made.run, attempt.number, None), action.what)
        runner.write(todo, made.run, attempt)
        assert [each.name for each in todo.stages] == ["prepare", "train", "export"]
        for stage in todo.stages:
            if stage.name in stages:
                self._stage(stage, made.run)
        return made.run

    def _stage(self, stage: Stage, run: RunDir) -> None:
        """One stage of the plan in its own environment; processes are forked that torchrun would start."""
        *_, module, file = stage.argv
        world = int(stage.argv[stage.argv.index("--nproc-per-node") + 1]) if stage.name == "train" else 1
        call = f"{module}.{stage.name}:main" if stage.name != "prepare" else "recipes.bench:prepare"
        try:
            self.fork(call, [file], world, stage.env)
        except AssertionError as error:
            logs = sorted(run.root.glob("attempts/*/logs/rank-*.log"))
            raise AssertionError("\n".join([str(error), *(each.read_text()[-3000:] for each in logs)])) from None


def prepare(argv: list[str]) -> int:
    """What ``python -m galley.prepare`` does."""
    from galley.prepare.prepare import work
    from galley.ranks.stage import run_stage

    return run_stage("prepare", work, argv)


def story(run: RunDir) -> list[Row]:
    """What was measured at each step, without clocks."""
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    measured = [{"step": row["step"], **{key: row[key] for key in ROWS if key in row}} for row in rows]
    return [row for row in measured if len(row) > 1]


def digests(run: RunDir, step: int) -> dict[str, str]:
    """SHA-256 of every rank's tensors and of the probes of a checkpoint."""
    files = sorted(run.checkpoint(step).root.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def lose_all_after(run: RunDir, step: int) -> None:
    """Leave the run as if its first attempt had been killed right after the checkpoint of ``step``."""
    for checkpoint in run.checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.root)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    run.attempt(1).exit.unlink()


def check_export(run: RunDir, recipe: Recipe, twin: Row) -> str:
    """The export is there, says that it was compared with what was trained, and is of the recipe's kind."""
    facts, kind = read_json(run.export / "export.json") or {}, recipe.method.kind
    assert (facts["step"], facts["method"]) == (4, kind)
    checks = {each["what"]: each for each in facts["checks"]}
    assert list(checks) == (["model"] if kind == "full" else ["adapter", "model (merged)"])
    assert all(0 <= each["difference"] <= each["tolerance"] for each in checks.values())
    assert all(each["verified"] and each["largest"] == 0 for each in checks.values())
    model = read_json(run.export / "model" / "config.json") or {}
    assert (model["model_type"], model["num_hidden_layers"]) == (twin["model_type"], twins.LAYERS)
    assert list((run.export / "model").glob("*.safetensors"))
    assert (run.export / "model" / "tokenizer.json").is_file()
    if kind != "full":
        adapter = read_json(run.export / "adapter" / "adapter_config.json") or {}
        assert (adapter["r"], adapter["lora_alpha"]) == (recipe.method.rank, recipe.method.alpha)
    return ", ".join(f"{what} {each['difference']:.0e}" for what, each in checks.items())


def weights_in(folder: Path, part: str = "") -> int:
    """Number of weights in a folder's files, of those with ``part`` in their names."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if part in name]  # noqa: SIM118 - it is no mapping
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return total


def check_sizes(run: RunDir, recipe: Recipe, twin: Row, vocabulary: int) -> None:
    """The model and its adapter have as many weights as the arithmetic of the recipes' headers says."""
    shapes = twins.shapes(twin, vocabulary)
    assert weights_in(run.export / "model") == sizes.parameters(shapes)
    assert weights_in(run.export / "adapter", "lora_") == sizes.adapter(shapes, recipe)
