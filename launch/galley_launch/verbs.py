"""The verbs of the command line: :data:`VERBS` is the one table that dispatch, help and completion read.

To add a verb, write its function here, whose docstring is its help, and give it a row. The function is pure: it returns
a :class:`Todo`, whose work lies in a module that is imported only when it is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from galley_launch.base.grammar import Verb
from galley_launch.base.options import read


@dataclass(frozen=True)
class Todo:
    """What the command line asks for. It is carried out after Fire has used every word."""

    _do: Callable[[], int]


def recipes(*words: str) -> Todo:
    """List the recipes, or those that mention every WORD.

    A word is part of a name, a model, a method, a ZeRO config, GPUs, memory or a description.
    GPUs: 2x8x40GB are two nodes of eight GPUs of 40 GB. memory: what the recipe takes of each GPU.

    galley recipes
    galley recipes qwen qlora
    galley recipes 24GB
    galley recipes moe
    """
    return Todo(lambda: _catalogue().listing(words))


def show(recipe: str, *settings: str) -> Todo:
    """Print a recipe's manual, and the recipe with every default filled in.

    RECIPE is a name (galley recipes), or a path to a .yaml file. Your own ./recipes win over the shipped ones.

    galley show smollm2-135m-lora
    galley show smollm2-135m-lora lr=1e-4
    """
    return Todo(lambda: _commands().show(recipe, read(settings)))


def copy(recipe: str, to: str = "", cluster_to: str = "") -> Todo:
    """Copy a recipe to ./recipes, so that you can change it; or, as `copy cluster NAME`, a cluster's profile.

    TO is a name, or a path to a .yaml file. A profile goes to ~/.config/galley/clusters.
    For a small change, extend it instead: write a recipe with `extends: qwen3-4b-qlora` and what differs.

    galley copy qwen3-4b-qlora
    galley copy qwen3-4b-qlora mine
    galley copy cluster venv hpc
    """
    # "cluster" is a word of the command here and no recipe's name: Fire fills the parameters from left to right.
    if recipe == "cluster":
        return Todo(lambda: _profile_files().copy(to, cluster_to))
    return Todo(lambda: _catalogue().copy(recipe, to))


def plan(recipe: str, *settings: str) -> Todo:
    """Print what `galley run` with the same words would write and start, without doing it.

    It ends with a summary: the run, the global batch, and what these words change in the recipe.
    files=all prints every file before that, byte for byte. Works without torch and without a GPU.

    galley plan smollm2-135m-lora
    galley plan smollm2-135m-lora deepspeed=zero3 ranks=2 batch.samples=32
    galley plan my.yaml deepspeed=my-deepspeed.json files=all > plan.txt
    """
    return Todo(lambda: _commands().show_plan(recipe, read(settings)))


def run(recipe: str, *settings: str) -> Todo:
    """Train on this box: prepare the data, train, export. The same command again resumes.

    Any key of the recipe can be set: a dotted path, or its last word where that is unique (galley show RECIPE).
      gpus=0,1             these GPUs; all visible ones otherwise
      device=cpu ranks=2   on the CPU; never chosen by itself
      deepspeed=zero3      a DeepSpeed JSON, or a preset: zero0 zero1 zero2 zero3 zero3_hpz zero3_offload_cpu
                           zero3_offload_nvme
      take=deepspeed       where your JSON and the recipe differ, use the JSON's values; take=recipe: the recipe's
      name=x runs=d        the run's name (the recipe's by default) and the directory of runs (./runs)
      init_from=RUN        start from the exported model of a finished run
    Ctrl-C once saves and stops, twice stops at once. A dropped ssh connection does not stop it.
    RECIPE may be a run directory: that run is resumed, with its own task, on this machine's devices.

    galley run smollm2-135m-lora
    galley run smollm2-135m-lora device=cpu ranks=2 steps=20
    galley run runs/smollm2-135m-lora epochs=3
    """
    return Todo(lambda: _commands().run(recipe, read(settings, submits=False)))


def prepare(recipe: str, *settings: str) -> Todo:
    """Prepare a run's model and data, and stop: what `galley run` with the same words does first.

    It fetches the model, reads and tokenises the data, and says what it would train on: rows used and left out and why,
    tokens trained on, and examples of rows as the model will see them, with + before the lines that are trained on.
    No GPU is needed: do it where the network is. `galley run` with the same words goes on from there.
      examples=5           so many rows are shown; 2 otherwise

    galley prepare smollm2-135m-lora
    galley prepare my.yaml data.path=chats.jsonl examples=5
    """
    return Todo(lambda: _commands().prepare(recipe, read(settings, submits=False)))


def submit(recipe: str, *settings: str) -> Todo:
    """Train on a Slurm cluster: the same recipe and words, as jobs that continue by themselves until it is done.

    cluster=NAME nodes=4   a profile (galley clusters) and the number of nodes; by default, the default profile
    cluster.time=4:00:00   any key of the profile, for this submission
    ranks=4                ranks on each node; by default, one for each GPU
    Each job resumes where the one before it ended, whatever ended it, until the model is exported.
    `galley plan` with the same words and cluster=NAME prints everything that would be written and run.

    galley submit qwen3-4b-qlora cluster=venv nodes=2
    galley submit runs/qwen3-4b-qlora cluster.partition=long
    """
    return Todo(lambda: _commands().submit(recipe, read(settings, submits=True)))


def clusters(name: str = "", *settings: str) -> Todo:
    """List the cluster profiles and what Slurm reports about them, or show one NAME in full.

    Yours are ~/.config/galley/clusters/*.yaml and ./clusters/*.yaml; they win over the shipped ones.

    galley clusters
    galley clusters venv cluster.partition=gpu
    """
    name, words = _optional(name, settings)
    return Todo(lambda: _commands().clusters(name, read(words, submits=True)))


def status(run: str = "", *settings: str) -> Todo:
    """Print a table of the runs in ./runs (or runs=DIRECTORY), or the state of one RUN.

    galley status
    galley status smollm2-135m-lora
    """
    name, words = _optional(run, settings)
    return Todo(lambda: _commands().status(name, read(words)))


def logs(run: str, *settings: str) -> Todo:
    """Print the logs of a run's newest attempt, and follow them while it is live.

    galley logs smollm2-135m-lora
    galley logs smollm2-135m-lora rank=1 attempt=2
    galley logs smollm2-135m-lora attempt=0        a submitted run's prepare job
    """
    return Todo(lambda: _commands().logs(run, read(settings)))


def stop(run: str, *settings: str) -> Todo:
    """Ask a live run to save and stop. Running or submitting it again resumes it.

    galley stop smollm2-135m-lora
    """
    return Todo(lambda: _commands().stop(run, read(settings)))


def cancel(run: str, *settings: str) -> Todo:
    """End a run now, without saving: its processes on this box, or its jobs. Earlier checkpoints stay.

    galley cancel smollm2-135m-lora
    """
    return Todo(lambda: _commands().cancel(run, read(settings)))


def why(run: str, *settings: str) -> Todo:
    """Explain why a run failed: which rank was first, the lines that show it, and what to change.

    galley why smollm2-135m-lora
    """
    return Todo(lambda: _commands().why(run, read(settings)))


def report(run: str, *settings: str) -> Todo:
    """Write one page about a run, RUN/report.html, to read in a browser or to send to someone.

    Curves, attempts and where the time went, data, checkpoints, checks of the export, configuration. The page is
    self-contained. What looks like a secret is hidden; check before you send it. The same command updates it.

    galley report smollm2-135m-lora
    """
    return Todo(lambda: _commands().report(run, read(settings)))


def export(run: str, *settings: str) -> Todo:
    """Write a run's model again, from its last checkpoint, its best one, or any other that it has kept.

    step=best or step=N  which checkpoint; step=last otherwise
    cluster=NAME         in a job there, because login nodes kill long-running processes

    galley export smollm2-135m-lora
    galley export smollm2-135m-lora step=best
    """
    return Todo(lambda: _commands().export(run, read(settings)))


def forget(run: str, *runs: str) -> Todo:
    """Remove runs: checkpoints, logs, exported models. It asks first, unless yes=true.

    A run that is live, or whose jobs wait, is refused.

    galley forget smollm2-135m-lora
    galley forget old older oldest yes=true
    """
    # Fire gives all words in one tuple, names and settings mixed.
    names = [word for word in (run, *runs) if "=" not in word]
    return Todo(lambda: _commands().forget(names, read(word for word in runs if "=" in word)))


def cache(*words: str) -> Todo:
    """List what runs share on this machine, or `prune` what was not used lately.

    Prepared data, converted models, compiled operators: by kind, with their sizes.
    older=30        days without use; it asks first, unless yes=true
    What is removed is made again by a run that needs it. Prepared data that runs have stay in them.

    galley cache
    galley cache prune
    galley cache prune models older=7 yes=true
    """
    names, settings = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    return Todo(lambda: _commands().cache(names, read(settings)))


def completion(shell: str) -> Todo:
    """Print the completion script for SHELL (bash, zsh or fish): verbs, recipes, runs, clusters and keys.

    galley completion bash >> ~/.bashrc
    galley completion zsh >> ~/.zshrc
    galley completion fish > ~/.config/fish/completions/galley.fish
    """
    return Todo(lambda: _completion().show(shell))


def schema() -> Todo:
    """Print the JSON schema of a recipe, for editors. It is shipped as recipes/schema.json.

    galley schema > recipes/schema.json
    """
    return Todo(lambda: _commands().schema())


def _optional(name: str, settings: Sequence[str]) -> tuple[str, Sequence[str]]:
    """A name that may be missing, and the settings: Fire passes the first setting as the name if there is no name."""
    return ("", (name, *settings)) if "=" in name else (name, settings)


def _commands() -> ModuleType:
    """The module with the verbs' work, imported only to do it: help and mistakes need none of its imports."""
    # pydantic looks for plugins in the metadata of every installed package, which is slow on a network disk.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from galley_launch import commands

    return commands


def _completion() -> ModuleType:
    from galley_launch import completion

    return completion


def _profile_files() -> ModuleType:
    from galley_launch.cluster import profile_files

    return profile_files


def _catalogue() -> ModuleType:
    """The module of verbs that need only the recipes' files: without importing pydantic they take half the time."""
    from galley_launch.recipe import catalogue

    return catalogue


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


# `runs` is where a run is looked for by name. `force` is taken so that it can be refused with an answer of its own.
_ABOUT_A_RUN = _keys("runs")
_LAUNCH = _keys("name runs deepspeed take device ranks gpus nodes cluster init_from force")
_ROWS = (
    Verb(recipes, "[WORD…]"),
    Verb(show, "RECIPE", _keys("deepspeed"), overrides=True),
    Verb(copy, "RECIPE [TO]", cluster_words="cluster NAME [TO]"),
    Verb(plan, "RECIPE", _LAUNCH | _keys("files"), overrides=True, implied=_keys("dry_run")),
    Verb(run, "RECIPE", _LAUNCH, overrides=True, preview="plan"),
    Verb(prepare, "RECIPE", _LAUNCH | _keys("examples"), overrides=True, preview="plan"),
    Verb(submit, "RECIPE", _LAUNCH, overrides=True, on_cluster=True, preview="plan"),
    Verb(clusters, "[NAME]", on_cluster=True),
    Verb(status, "[RUN]", _ABOUT_A_RUN),
    Verb(logs, "RUN", _ABOUT_A_RUN | _keys("rank attempt"), implied=_keys("follow")),
    Verb(stop, "RUN", _ABOUT_A_RUN),
    Verb(cancel, "RUN", _ABOUT_A_RUN),
    Verb(why, "RUN", _ABOUT_A_RUN),
    Verb(report, "RUN", _ABOUT_A_RUN),
    Verb(export, "RUN", _ABOUT_A_RUN | _keys("step cluster")),
    Verb(forget, "RUN [RUN…]", _ABOUT_A_RUN | _keys("yes")),
    Verb(cache, "[prune [KIND]]", _keys("older yes")),
    Verb(completion, "SHELL"),
    Verb(schema),
)
VERBS: dict[str, Verb] = {verb.name: verb for verb in _ROWS}
"""Every verb by name, in the order in which help lists them."""
