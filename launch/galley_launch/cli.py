"""The command line. ``base/grammar.py`` checks it, Fire calls the verb, and what the verb returns is carried out.

Fire calls a function before it complains about words that are left over. So the function of a verb only returns a
``Todo``, and :func:`main` carries that out once Fire has used every word: a mistake never leaves anything half done.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from galley.contract.errors import UserError
from galley.contract.files import of_the_disk, shut_out_others
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

    # Every word stays the string that was typed: Fire would make 1e3 a number and [a,b] a list. `serialize` is what
    # Fire prints of the result, which is nothing here.
    verb = SetParseFn(str)(VERBS[command.verb].function)
    todo = fire.Fire({command.verb: verb}, command=command.argv, name="galley", serialize=lambda _: None)
    assert isinstance(todo, Todo), f"Fire returned {todo!r}"
    return todo


def _never_fail_to_print() -> None:
    """Print ``?`` for characters that the terminal's encoding lacks, instead of raising ``UnicodeEncodeError``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def _plain_output() -> Iterator[None]:
    """Guard stdout and stderr: nothing that is printed (names, data, logs) can act on the terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = guards = cast(TextIO, Plain(sys.stdout)), cast(TextIO, Plain(sys.stderr))
    try:
        yield
    finally:
        if sys.stdout is guards[0]:  # it is not after a broken pipe, or where `galley logs` replaced it
            sys.stdout = before[0]
        sys.stderr = before[1]


def _refuse(message: str) -> int:
    """Print why nothing is done, on one line. Returns the exit status 2."""
    print(f"galley: {one_line(message)}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run ``galley`` with ``argv`` (default: the process's own). Returns the exit status."""
    _never_fail_to_print()
    shut_out_others()
    with _plain_output():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    try:
        status = _carry_out(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # else Python does it at exit, and prints an error of its own
        return status
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130  # as shells report a program that SIGINT ended: 128 + 2
    except BrokenPipeError:
        sys.stdout = None  # the reader is gone (galley … | head): Python's flush at exit would print an error
        return 0
    except OSError as error:
        refusal = of_the_disk(error)
        if refusal is None:
            raise
        if error.filename is None:  # stdout itself may be that file: nothing more is written to it
            sys.stdout = None
        return _refuse(str(refusal))


def _carry_out(words: list[str]) -> int:
    if words in (["--version"], ["version"]):
        from galley_launch.plan.compose import version

        print(f"galley {version()}")
        return 0
    # Shells ask this at every press of Tab. It comes before the grammar, which would refuse unfinished words.
    if words[:2] == ["completion", "words"]:
        from galley_launch.completion import candidates

        print("\n".join(candidates(words[2:], VERBS)))
        return 0
    command = parse(words, VERBS)
    if command.help:
        print(help_text(command.verb))
        return 0
    for note in command.notes:
        print(f"galley: note: {one_line(note)}", file=sys.stderr)
    return _dispatch(command)._do()
