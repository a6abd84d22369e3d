"""A plan is a value: the files that a run writes and the commands that it starts. Nothing is done with it here."""

from __future__ import annotations

import json
import os
import shlex
import site
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from galley.contract import stages
from galley.contract.rundir import RunDir
from galley.contract.spec import Placement, RunSpec
from galley_launch.plan.resume import What

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Stage:
    """One process to start and wait for."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    """Variables that are set on top of the environment."""

    def shell(self) -> str:
        """The command as a shell would take it."""
        settings = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        return " ".join([*settings, *map(shlex.quote, self.argv)])


@dataclass(frozen=True)
class Plan:
    """Files to write, by path in the run directory, then stages to run in order."""

    files: dict[str, str]
    stages: tuple[Stage, ...]


def common_environment(place: Placement) -> dict[str, str]:
    """What every stage has in its environment, on one box and in a job."""
    env = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # from one library about another: users cannot fix them
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return env | ({"DS_ACCELERATOR": "cpu"} if place.device == "cpu" else {})


def without_user_packages() -> dict[str, str]:
    """``PYTHONNOUSERSITE``, so that packages in ``~/.local`` do not shadow those of a conda or container environment.

    Empty where the user has set the variable (even to nothing), and where Galley itself is installed in ``~/.local``.
    Source: the documentation of Python's ``site`` module.
    """
    installed_there = Path(__file__).is_relative_to(site.getusersitepackages())
    return {} if "PYTHONNOUSERSITE" in os.environ or installed_there else {"PYTHONNOUSERSITE": "1"}


def _env(spec: RunSpec, attempt: int, python_path: str | None, processes: int) -> dict[str, str]:
    place = spec.placement
    # A stage of one process gets the threads of all ranks together: tokenising uses every core that training would.
    threads = place.threads * place.ranks_per_node // processes
    env = (
        {
            # python -m puts the working directory first on the path: a datasets.py there would shadow the library.
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": str(threads),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts; CUDA's default is the fastest first
            "CUDA_VISIBLE_DEVICES": ",".join(place.gpus or []),
            "GALLEY_ATTEMPT": str(attempt),
        }
        | common_environment(place)
        | without_user_packages()
    )
    if python_path is not None:
        env["PYTHONPATH"] = python_path
    return env


def make_stage(
    stage: stages.Stage, spec: RunSpec, run: RunDir, attempt: int, python_path: str | None, step: str = "last"
) -> Stage:
    """``stage`` as a process on this box. ``step``: the checkpoint that an export takes."""
    file, ranks = str(run.spec.absolute()), spec.placement.ranks_per_node
    env = _env(spec, attempt, python_path, ranks if stage.on_ranks else 1) | (_OFFLINE if stage.offline else {})
    if stage == stages.EXPORT:
        env["GALLEY_EXPORT_STEP"] = step
    if not stage.on_ranks:
        return Stage(stage.name, (sys.executable, "-m", stage.module, file), env)
    # Even one rank goes through torchrun, so that every run has the same shape.
    torchrun = ("galley.launch_ranks", "--rdzv-backend", "file", "--nnodes", "1", "--nproc-per-node", str(ranks))
    env["TOKENIZERS_PARALLELISM"] = "false"  # ranks never tokenise
    return Stage(stage.name, (sys.executable, "-m", *torchrun, "-m", stage.module, file), env)


def make(spec: RunSpec, run: RunDir, attempt: int, python_path: str | None) -> Plan:
    """The plan of one attempt at ``spec``: every stage."""
    place = spec.placement
    placement = json.dumps(place.model_dump(mode="json"), indent=2) + "\n"
    relative = run.attempt(attempt).placement.relative_to(run.root)
    return Plan(
        {str(relative): placement, str(run.spec.relative_to(run.root)): spec.to_json()},
        tuple(make_stage(stage, spec, run, attempt, python_path) for stage in stages.STAGES),
    )


def export_stage(spec: RunSpec, run: RunDir, attempt: int, step: str, python_path: str | None) -> Stage:
    """The stage that writes ``export/`` from the checkpoint ``step``: ``last``, ``best`` or a number."""
    return make_stage(stages.EXPORT, spec, run, attempt, python_path, step)


def left(whole: Plan, what: What) -> Plan:
    """The part of ``whole`` that is left to do.

    Where only the export is left, ``run.json`` is written again, but not ``placement.json``: that is the record of what
    the attempt was trained with.
    """
    if what == "train":
        return whole
    if what == "nothing":
        return Plan({}, ())
    files = {name: text for name, text in whole.files.items() if name == "run.json"}
    return Plan(files, tuple(stage for stage in whole.stages if stage.name in stages.after_training()))


def preparing(whole: Plan, examples: int) -> Plan:
    """The part of ``whole`` that ``galley prepare`` does, with the number of rows that it is to show."""
    files = {name: text for name, text in whole.files.items() if name == "run.json"}
    stages_ = [replace(stage, env=stage.env | {"GALLEY_EXAMPLES": str(examples)}) for stage in whole.stages]
    return Plan(files, tuple(stage for stage in stages_ if stage.name == stages.PREPARE.name))


def python_path(package: Path, inherited: str, cwd: Path) -> str | None:
    """``PYTHONPATH`` for stages: the folder of ``package`` if that is in a checkout, then the inherited entries.

    Entries that are empty, relative or the working directory are left out: files of the user's (``datasets.py``) would
    shadow libraries. None: nothing needs to be set.
    """
    kept = [entry for entry in inherited.split(":") if entry.startswith("/") and Path(entry) != cwd]
    installed = package.parent.name in ("site-packages", "dist-packages")
    entries = kept if installed else [str(package.parent), *kept]
    return ":".join(dict.fromkeys(entries)) if entries or inherited else None
