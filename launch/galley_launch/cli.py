"""The command line. Fire reads it; a verb is pure and returns a :class:`Todo`; only :func:`main` acts.

So nothing has happened when Fire finds a word that it cannot use. ``arguments.py`` settles the grammar before that.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TextIO, cast

from galley.errors import UserError
from galley.text import Plain, one_line
from galley_launch.arguments import VERBS, Command, parse


@dataclass(frozen=True)
class Todo:
    """What the command line asked for; carried out after Fire has consumed every word."""

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
    return Todo(lambda: _commands().show(recipe, settings))


def copy(recipe: str, to: str = "") -> Todo:
    """Copy a recipe to ./recipes, to be changed. TO is a name, or a path to a .yaml file.

    To change little, do not copy but extend: a recipe of your own with `extends: qwen3-4b-qlora` and what differs.

    galley copy qwen3-4b-qlora
    galley copy qwen3-4b-qlora mine
    """
    return Todo(lambda: _catalogue().copy(recipe, to))


def plan(recipe: str, *settings: str) -> Todo:
    """Print what `galley run` with the same words would write and start; write and start nothing.

    It ends with a summary: the run, the whole batch, and what these words change of the recipe.
    files=all prints every file before that, byte for byte. Works without torch and without a GPU.

    galley plan smollm2-135m-lora
    galley plan smollm2-135m-lora deepspeed=zero3 ranks=2 batch.samples=32
    galley plan my.yaml deepspeed=my-deepspeed.json files=all > plan.txt
    """
    return Todo(lambda: _commands().show_plan(recipe, settings))


def run(recipe: str, *settings: str) -> Todo:
    """Train on this box: prepare the data, train, export. The same command again resumes.

    Any key of the recipe can be set: a dotted path, or its last word where that is unique (galley show RECIPE).
      gpus=0,1             these GPUs; all visible ones otherwise
      device=cpu ranks=2   on the CPU, which has to be asked for
      deepspeed=zero3      a DeepSpeed JSON, or a preset: zero0 zero1 zero2 zero3 zero3_hpz zero3_offload_cpu
                           zero3_offload_nvme
      name=x runs=d        the run's name (the recipe's by default) and the directory of runs (./runs)
      init_from=RUN        start from the exported model of a finished run
    Ctrl-C once saves and stops, twice ends at once. A dropped ssh does not end it.
    RECIPE may be a run directory: that run goes on, with its own task, on this machine's devices.

    galley run smollm2-135m-lora
    galley run smollm2-135m-lora device=cpu ranks=2 steps=20
    galley run runs/smollm2-135m-lora epochs=3
    """
    return Todo(lambda: _commands().run(recipe, settings))


def submit(recipe: str, *settings: str) -> Todo:
    """Train on a Slurm cluster: the same recipe and words, as jobs that go on by themselves until it is done.

    cluster=NAME nodes=4   a profile (galley clusters), and how many nodes of it; the default profile otherwise
    cluster.time=4:00:00   any key of the profile, for this submission
    ranks=4                ranks on each node, where not one for each GPU
    Each job resumes where the one before it ended, whatever ended it, until the model is exported.
    `galley plan` with the same words and cluster=NAME prints all that would be written and run.

    galley submit qwen3-4b-qlora cluster=venv nodes=2
    galley submit runs/qwen3-4b-qlora cluster.partition=long
    """
    return Todo(lambda: _commands().submit(recipe, settings))


def clusters(name: str = "", *settings: str) -> Todo:
    """List the cluster profiles and what Slurm says to them, or show one NAME in full.

    Yours are ~/.config/galley/clusters/*.yaml and ./clusters/*.yaml; they win over the shipped ones.

    galley clusters
    galley clusters venv cluster.partition=gpu
    """
    at, rest = ("", (name, *settings)) if "=" in name else (name, settings)
    return Todo(lambda: _commands().clusters(at, [word for word in rest if word]))


def status(run: str = "", *settings: str) -> Todo:
    """Print a table of the runs in ./runs (or runs=DIRECTORY), or how one RUN is.

    galley status
    galley status smollm2-135m-lora
    """
    # A key given without RUN would otherwise be taken for it.
    name, rest = ("", (run, *settings)) if "=" in run else (run, settings)
    return Todo(lambda: _commands().status(name, [word for word in rest if word]))


def logs(run: str, *settings: str) -> Todo:
    """Print the logs of a run's newest attempt, and follow them while it is live.

    galley logs smollm2-135m-lora
    galley logs smollm2-135m-lora rank=1 attempt=2
    galley logs smollm2-135m-lora attempt=0        a submitted run's prepare job
    """
    return Todo(lambda: _commands().logs(run, settings))


def stop(run: str, *settings: str) -> Todo:
    """Ask a live run to save and stop. Running or submitting it again goes on from there.

    galley stop smollm2-135m-lora
    """
    return Todo(lambda: _commands().stop(run, settings))


def cancel(run: str, *settings: str) -> Todo:
    """End all jobs of a submitted run now, without saving. What was saved before stays.

    galley cancel smollm2-135m-lora
    """
    return Todo(lambda: _commands().cancel(run, settings))


def why(run: str, *settings: str) -> Todo:
    """Say why a run failed: which rank was first, the lines that show it, and what to change.

    galley why smollm2-135m-lora
    """
    return Todo(lambda: _commands().why(run, settings))


def report(run: str, *settings: str) -> Todo:
    """Write one page about a run, RUN/report.html, to look at in a browser or to send to somebody.

    Curves, attempts and where the time went, data, checkpoints, checks of the export, configuration. The page holds all
    that it shows; what looks like a secret is hidden: look before you send it. The same command writes it again.

    galley report smollm2-135m-lora
    """
    return Todo(lambda: _commands().report(run, settings))


def export(run: str, *settings: str) -> Todo:
    """Write a run's model again, from its last checkpoint, its best one, or any other that it kept.

    galley export smollm2-135m-lora
    cluster=NAME: in a job there, because login nodes end long work

    galley export smollm2-135m-lora step=best
    """
    return Todo(lambda: _commands().export(run, settings))


def schema() -> Todo:
    """Print the JSON schema of a recipe, for editors. It is shipped as recipes/schema.json.

    galley schema > recipes/schema.json
    """
    return Todo(lambda: _commands().schema())


_VERBS = (recipes, show, copy, plan, run, submit, clusters, status, logs, stop, cancel, why, report, export, schema)
_FUNCTIONS: dict[str, Callable[..., Todo]] = {each.__name__: each for each in _VERBS}


def _commands() -> ModuleType:
    """The verbs' work, imported when it is to be done: help and mistakes cost nothing."""
    # Looking for plugins of pydantic's reads the metadata of every installed package: slow on a network disk.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from galley_launch import commands

    return commands


def _catalogue() -> ModuleType:
    """The verbs that need no more than the recipes' files: without pydantic they take half the time."""
    from galley_launch import catalogue

    return catalogue


def help_text(verb: str) -> str:
    """The screen of ``galley --help``, or of ``galley VERB --help``."""
    if verb:
        doc = inspect.getdoc(_FUNCTIONS[verb]) or ""
        settings = " [key=value …]" if VERBS[verb].keys else ""
        return f"galley {verb} {VERBS[verb].words}".rstrip() + f"{settings}\n\n{doc}"
    lines = [f"  {name:<10}{(inspect.getdoc(each) or '').splitlines()[0]}" for name, each in _FUNCTIONS.items()]
    return "\n".join(
        [
            "galley: fine-tune a language model from a recipe and a ZeRO config",
            "",
            *lines,
            "",
            "Settings are key=value; --key=value and --key value mean the same; lists are [a,b].",
            "galley VERB --help says more. To begin:",
            "",
            "  galley recipes                          what there is",
            "  galley plan smollm2-135m-lora           what it would do",
            "  galley run smollm2-135m-lora            do it, on this box's GPUs",
            "  galley run smollm2-135m-lora device=cpu ranks=2 steps=20",
        ]
    )


def _dispatch(command: Command) -> Todo:
    import fire
    from fire.decorators import SetParseFn

    # Every word stays the string that was typed: Fire would make 1e3 a number and [a,b] a list.
    verb = SetParseFn(str)(_FUNCTIONS[command.verb])
    todo = fire.Fire({command.verb: verb}, command=command.argv, name="galley", serialize=lambda _: None)
    assert isinstance(todo, Todo), f"Fire returned {todo!r}"
    return todo


def _never_fail_to_print() -> None:
    """A terminal of another alphabet shows ``?`` for what it lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _plain_output() -> Iterator[None]:
    """Whatever is printed, by whomever: nothing that others wrote acts on the terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = guards = cast(TextIO, Plain(sys.stdout)), cast(TextIO, Plain(sys.stderr))
    try:
        yield
    finally:
        if sys.stdout is guards[0]:  # not where nobody reads any more
            sys.stdout = before[0]
        sys.stderr = before[1]


def _refuse(message: str) -> int:
    """Print why nothing is done, on one line, whatever a name in it may hold."""
    print(f"galley: {one_line(message)}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run ``galley`` with ``argv`` (default: the process's own). Returns the exit status."""
    _never_fail_to_print()
    with _plain_output():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    try:
        words = sys.argv[1:] if argv is None else argv
        if words in (["--version"], ["version"]):
            from galley_launch.compose import version

            print(f"galley {version()}")
            return 0
        command = parse(words)
        if command.help:
            print(help_text(command.verb))
            return 0
        for note in command.notes:
            print(f"galley: note: {note}", file=sys.stderr)
        return _dispatch(command)._do()
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None  # Nobody reads; Python's last flush would complain.
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _refuse(f"{str(error.filename)[:100]} …: no file can have so long a name; choose another")
