"""The grammar of the command line, settled before Fire sees a word.

``key=value``, ``--key=value`` and ``--key value`` are the same. Fire by itself would run a command first and complain
about a misspelt flag after, let a flag swallow the next word, and turn ``1e3`` into a float.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from galley.contract.errors import UserError
from galley_launch.base import words as foreign

_KEY = re.compile(r"[A-Za-z_][\w.-]*=")
_PLAN_KEYS = "name runs deepspeed take device ranks gpus nodes cluster init_from force"

RESERVED = frozenset(f"{_PLAN_KEYS} files step attempt rank yes".split())
"""The launcher's own keys; no recipe key may be one of these."""

_CLUSTER = "cluster."
_COPY_CLUSTER = "cluster NAME [TO]"
_BY_VALUE = frozenset(["device", "gpus"])
"""Keys of the launcher whose values are looked up: other trainers write them otherwise."""
_SWITCHES = frozenset(["dry_run", "follow", "yes"])
"""Keys that are true where they stand without a value."""


@dataclass(frozen=True)
class Verb:
    """What may follow a verb."""

    words: str
    """Its positional words, optional ones in brackets, as the usage line shows them; ``[WORD…]``: any number."""
    keys: frozenset[str]
    """The launcher's keys that it takes."""
    settings: bool = False
    """Whether it takes a recipe's keys too."""


VERBS = {
    "recipes": Verb("[WORD…]", frozenset()),
    "show": Verb("RECIPE", frozenset(["deepspeed"]), settings=True),
    "copy": Verb("RECIPE [TO]", frozenset()),
    "plan": Verb("RECIPE", frozenset(f"{_PLAN_KEYS} files".split()), settings=True),
    "run": Verb("RECIPE", frozenset(_PLAN_KEYS.split()), settings=True),
    "submit": Verb("RECIPE", frozenset(_PLAN_KEYS.split()), settings=True),
    "clusters": Verb("[NAME]", frozenset()),
    "status": Verb("[RUN]", frozenset(["runs"])),
    "logs": Verb("RUN", frozenset(["runs", "rank", "attempt"])),
    "stop": Verb("RUN", frozenset(["runs"])),
    "cancel": Verb("RUN", frozenset(["runs"])),
    "why": Verb("RUN", frozenset(["runs"])),
    "report": Verb("RUN", frozenset(["runs"])),
    "export": Verb("RUN", frozenset(["runs", "step", "cluster"])),
    "forget": Verb("RUN [RUN…]", frozenset(["runs", "yes"])),
    "completion": Verb("SHELL", frozenset()),
    "schema": Verb("", frozenset()),
}


@dataclass(frozen=True)
class Command:
    """A command line in its one normal form."""

    verb: str
    positionals: tuple[str, ...]
    settings: tuple[str, ...]
    """``key=value`` words, in order."""
    help: bool = False
    notes: tuple[str, ...] = ()
    """Words that are not Galley's own, and what they were taken for."""

    @property
    def argv(self) -> list[str]:
        """The words that Fire gets."""
        return [self.verb, *self.positionals, *self.settings]


def is_text(value: str) -> bool:
    """Whether ``value`` can be written as UTF-8: names of files and words of a command line may be any bytes."""
    return not any("\ud800" <= each <= "\udfff" for each in value)


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or the list of what is known where nothing is near."""
    known = sorted(set(known))
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"


def _normal_words(argv: list[str]) -> list[str]:
    """``argv`` with every ``--key value`` and ``--key=value`` written ``key=value``."""
    words, waiting = [], list(argv)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            todo = foreign.answer(word.removeprefix("-")) or "write key=value, or see galley --help"
            raise UserError("command line", f"{word!r} is not an option", todo)
        words.append(f"{_key(name)}={value if equals else _value(word, _key(name), waiting)}")
    return words


def _value(word: str, key: str, waiting: list[str]) -> str:
    """The value of the flag ``word``, taken from ``waiting``; a switch that stands alone is true."""
    switch = key in _SWITCHES or foreign.is_switch(key)
    if switch and (not waiting or not foreign.is_truth(waiting[0])):
        return "true"
    if not waiting or waiting[0].startswith("--") or _KEY.match(waiting[0]):
        raise UserError("command line", f"{word} has no value", f"write {key}=VALUE")
    return waiting.pop(0)


def _key(name: str) -> str:
    return name.replace("-", "_")


def _check_count(verb: str, positionals: list[str]) -> None:
    words = _COPY_CLUSTER if verb == "copy" and positionals[:1] == ["cluster"] else VERBS[verb].words
    asked = words.split()
    least = sum(not word.startswith("[") for word in asked)
    usage = f"write: galley {verb} {words}".rstrip()
    if len(positionals) < least:
        raise UserError(verb, f"{asked[len(positionals)]} is missing", usage)
    if len(positionals) > len(asked) and not (asked and asked[-1].endswith("…]")):
        raise UserError(verb, f"{positionals[len(asked)]!r} is one word too many", f"{usage} [key=value …]")


def _check_keys(verb: str, settings: list[str]) -> None:
    seen: set[str] = set()
    for setting in settings:
        key = setting.partition("=")[0]
        if key in seen:
            raise UserError("command line", f"{key} is given twice", "keep one of them")
        seen.add(key)
        allowed = VERBS[verb].keys
        if key.startswith(_CLUSTER) and ("cluster" in allowed or verb == "clusters"):
            continue
        if key in allowed or (VERBS[verb].settings and key not in RESERVED):
            continue
        if key == "rank" and VERBS[verb].settings:
            raise UserError(verb, "rank is a key of galley logs", "write method.rank=N for the adapter's rank")
        if foreign.answer(key):
            raise UserError(verb, f"takes no key {key!r}", foreign.answer(key))
        raise UserError(
            verb, f"takes no key {key!r}", nearest(key, allowed) if allowed else f"see galley {verb} --help"
        )


def _understood(verb: str, settings: list[str]) -> tuple[list[str], list[str]]:
    """``settings`` in Galley's own words, and notes of what was taken for them.

    Raises ``UserError`` with the key to use where a word could mean several.
    """
    own, notes = [], []
    clusters = verb in ("submit", "clusters") or any(split(setting)[0] == "cluster" for setting in settings)
    for setting in settings:
        key, value = split(setting)
        means = None if key in VERBS[verb].keys - _BY_VALUE else foreign.meaning(key, value, clusters)
        if means is None:
            own.append(setting)
            continue
        if means.refusal:
            raise UserError("command line", f"{setting!r} is not understood", means.refusal)
        own += means.settings
        notes.append(means.note)
    return own, notes


def _verb(word: str, words: list[str]) -> tuple[str, list[str], list[str]]:
    """The verb that is meant, the words that are left, and notes. Raises ``UserError`` where there is none."""
    notes = []
    verb = word if word in VERBS else foreign.verb(word)
    if not verb:
        raise UserError("command line", f"no such command: {word!r}", foreign.verb_answer(word) or nearest(word, VERBS))
    if verb != word:
        notes = [f"galley {word} is read as galley {verb}"]
    dry = next((each for each in words if _dry(each)), "")
    if dry and verb in ("run", "submit"):
        if verb == "submit" and not any(split(each)[0] == "cluster" for each in words):
            raise UserError("submit", "has no dry run", "write: galley plan RECIPE cluster=NAME")
        notes.append(f"galley {verb} with {dry} is read as galley plan")
        verb = "plan"
    needless = dry if verb == "plan" else ""
    follows = verb == "logs"
    left = [each for each in words if each != needless and not (follows and each == "follow=true")]
    return verb, left, notes


def _dry(word: str) -> bool:
    key, value = split(word)
    return key == "dry_run" and foreign.is_true(value)


def parse(argv: list[str]) -> Command:
    """The command that ``argv`` (without the program's name) gives. Raises ``UserError``."""
    for word in argv:
        if not is_text(word):
            raise UserError("command line", f"{word!r} is not UTF-8", "use another name")
    asks_help = any(word in ("--help", "-h") for word in argv)
    if asks_help or not argv or argv[0] == "help":
        verbs = [foreign.verb(word) or word for word in argv if word in VERBS or foreign.verb(word)]
        return Command(verbs[0] if verbs else "", (), (), help=True)
    follows = argv[0] == "logs" or foreign.verb(argv[0]) == "logs"
    words = _normal_words([word for word in argv[1:] if not (follows and word == "-f")])
    verb, words, notes = _verb(argv[0], words)
    settings = [word for word in words if _KEY.match(word)]
    positionals = [word for word in words if not _KEY.match(word)]
    _check_count(verb, positionals)
    settings, taken = _understood(verb, settings)
    _check_keys(verb, settings)
    return Command(verb, tuple(positionals), tuple(settings), notes=(*notes, *taken))


def is_ours(setting: str) -> bool:
    """Whether a ``key=value`` word is the launcher's own, not the recipe's."""
    key = split(setting)[0]
    return key in RESERVED or key.startswith(_CLUSTER)


def of_cluster(settings: Iterable[str]) -> list[str]:
    """The words that change a cluster's profile; ``ranks`` and ``device`` do, too."""
    short = {"ranks": "cluster.ranks_per_node", "device": "cluster.device"}
    pairs = [split(setting) for setting in settings]
    return [f"{short.get(key, key)}={value}" for key, value in pairs if key in short or key.startswith(_CLUSTER)]


def split(setting: str) -> tuple[str, str]:
    """Key and value of a ``key=value`` word."""
    key, _, value = setting.partition("=")
    return key, value


def whole(ours: dict[str, str], key: str, least: int) -> int | None:
    """The whole number that ``ours`` gives for ``key``, if any. Raises ``UserError`` where it is not from ``least``."""
    text = ours.get(key)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        todo = f"write {key}={least}, {key}={least + 1} …"
        raise UserError(key, f"{text!r} is not a whole number from {least}", todo)
    return int(text)
