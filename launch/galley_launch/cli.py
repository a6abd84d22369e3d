"""The command line. Fire reads it; a verb is pure and returns a ``Todo``; only :func:`main` acts.

So nothing has happened when Fire finds a word that it cannot use. ``base/grammar.py`` settles the grammar before that.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from galley.contract.errors import UserError
from galley.contract.text import Plain, one_line
from galley_launch.base.grammar import Command, parse
from galley_launch.verbs import VERBS, Todo


def help_text(verb: str) -> str:
    """The screen of ``galley --help``, or of ``galley VERB --help``."""
    if verb:
        settings = " [key=value …]" if VERBS[verb].keys else ""
        return f"galley {verb} {VERBS[verb].words}".rstrip() + f"{settings}\n\n{_manual(verb)}"
    lines = [f"  {name:<12}{_manual(name).splitlines()[0]}" for name in VERBS]
    return "\n".join(
        [
            "galley: fine-tune a language model from a recipe and a ZeRO config",
            "",
            *lines,
            "",
            "Settings are key=value; --key=value and --key value mean the same; lists are [a,b].",
            "galley VERB --help has details. To begin:",
            "",
            "  galley recipes                          list the recipes",
            "  galley plan smollm2-135m-lora           show what it would do",
            "  galley run smollm2-135m-lora            train on this box's GPUs",
            "  galley run smollm2-135m-lora device=cpu ranks=2 steps=20",
        ]
    )


def _manual(verb: str) -> str:
    return inspect.getdoc(VERBS[verb].function) or ""


def _dispatch(command: Command) -> Todo:
    import fire
    from fire.decorators import SetParseFn

    # Every word stays the string that was typed: Fire would make 1e3 a number and [a,b] a list.
    verb = SetParseFn(str)(VERBS[command.verb].function)
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
            from galley_launch.plan.compose import version

            print(f"galley {version()}")
            return 0
        if words[:2] == ["completion", "words"]:  # What a shell asks at each press of Tab: the words as they stand.
            from galley_launch.completion import candidates

            print("\n".join(candidates(words[2:], VERBS)))
            return 0
        command = parse(words, VERBS)
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
