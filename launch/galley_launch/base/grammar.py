"""The grammar of the command line, checked before Fire sees a word.

``key=value``, ``--key=value`` and ``--key value`` are the same. Fire by itself would call the function first and
complain about a misspelt flag afterwards, let a flag take the next word for its value, and turn ``1e3`` into a float.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from galley.contract.errors import UserError
from galley_launch.base import words as foreign
from galley_launch.base.options import CLUSTER_PREFIX, RESERVED, split

_KEY = re.compile(r"[A-Za-z_][\w.-]*=")
_BY_VALUE = frozenset(["device", "gpus"])
"""Launch options whose values are looked up in ``words.toml``: other trainers write these values differently."""
_SWITCHES = frozenset(["dry_run", "follow", "yes"])
"""Keys that are true where they are given without a value (``--yes``)."""


@dataclass(frozen=True)
class Verb:
    """A verb of the command line: what may follow it, and what it does."""

    function: Callable[..., object]
    """Takes the positional words, then the settings. Its name is the verb's, its docstring the verb's help."""
    words: str = ""
    """Its positional words, optional ones in brackets, as the usage line shows them; ``[WORD…]``: any number.

    What completion offers follows from their names: RECIPE, RUN, NAME (of a cluster), SHELL.
    """
    keys: frozenset[str] = frozenset()
    """The launch options that it takes."""
    overrides: bool = False
    """Whether it takes keys of a recipe too."""
    cluster_words: str = ""
    """Its positional words where the first one is ``cluster``; empty: that word means nothing special."""
    on_cluster: bool = False
    """Whether it is always about a cluster, so that keys of a profile and Slurm's words are understood."""
    preview: str = ""
    """The verb that shows what this one would do: what ``--dry-run`` makes of it."""
    implied: frozenset[str] = frozenset()
    """Switches of other programs that ask for what this verb does anyway (``--follow`` for ``logs``): ignored."""

    @property
    def name(self) -> str:
        """The word that is typed."""
        return str(self.function.__name__)


Verbs = Mapping[str, Verb]
"""The table of verbs, by name: :data:`galley_launch.verbs.VERBS`."""


@dataclass(frozen=True)
class Command:
    """A command line in its one normal form."""

    verb: str
    positionals: tuple[str, ...]
    settings: tuple[str, ...]
    """``key=value`` words, in order."""
    help: bool = False
    notes: tuple[str, ...] = ()
    """For each word that is not Galley's own: how it was understood."""

    @property
    def argv(self) -> list[str]:
        """The words that Fire gets."""
        return [self.verb, *self.positionals, *self.settings]


def is_text(value: str) -> bool:
    """Whether ``value`` can be written as UTF-8: names of files and words of a command line may be any bytes."""
    # Python decodes other bytes to lone surrogates (PEP 383, "surrogateescape"), which no file or job script can hold.
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?``, or the list of what is known where nothing is near."""
    known = sorted(set(known))
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    # difflib counts capital and small letters as different: LR resembles lr no more than any other two letters.
    matches = matches or [name for name in known if name.lower() == word.lower()]
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(known)}"


def _normal_words(argv: list[str]) -> list[str]:
    """``argv`` with every ``--key value`` and ``--key=value`` written ``key=value``."""
    words, remaining = [], list(argv)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            todo = foreign.answer(word.removeprefix("-")) or "write key=value, or see galley --help"
            raise UserError("command line", f"{word!r} is not an option", todo)
        words.append(f"{_key(name)}={value if equals else _value(word, _key(name), remaining)}")
    return words


def _value(word: str, key: str, remaining: list[str]) -> str:
    """The value of the flag ``word``, taken from the ``remaining`` words; a switch without one is true."""
    switch = key in _SWITCHES or foreign.is_switch(key)
    # After a switch, only a word that is a boolean is its value: in `--yes old` the name is that of a run.
    if switch and (not remaining or not foreign.is_boolean(remaining[0])):
        return "true"
    if not remaining or remaining[0].startswith("--") or _KEY.match(remaining[0]):
        raise UserError("command line", f"{word} has no value", f"write {key}=VALUE")
    return remaining.pop(0)


def _key(name: str) -> str:
    return name.replace("-", "_")


def _check_count(verb: Verb, positionals: list[str]) -> None:
    words = verb.cluster_words if verb.cluster_words and positionals[:1] == ["cluster"] else verb.words
    expected = words.split()  # such as RECIPE [TO]
    least = sum(not word.startswith("[") for word in expected)
    usage = f"write: galley {verb.name} {words}".rstrip()
    if len(positionals) < least:
        raise UserError(verb.name, f"{expected[len(positionals)]} is missing", usage)
    if len(positionals) > len(expected) and not (expected and expected[-1].endswith("…]")):
        word = positionals[len(expected)]
        todo = _as_setting(word, positionals) if verb.overrides else ""
        raise UserError(verb.name, f"{word!r} is an unexpected word", todo or f"{usage} [key=value …]")


def _as_setting(word: str, positionals: list[str]) -> str:
    """How to write a word that stands alone as a setting; empty where it resembles none."""
    if "=" in positionals:
        return "write key=value without spaces around ="
    key = foreign.file_key(word)
    return f"write {key}={word}" if key else foreign.answer(_key(word))


def _check_keys(verb: Verb, settings: list[str]) -> None:
    seen: set[str] = set()
    for key, _ in map(split, settings):
        if key in seen:
            raise UserError("command line", f"{key} is given twice", "keep one of them")
        seen.add(key)
        if not _takes(verb, key):
            raise _unknown_key(verb, key)


def _takes(verb: Verb, key: str) -> bool:
    if key.startswith(CLUSTER_PREFIX) and (verb.on_cluster or "cluster" in verb.keys):
        return True
    return key in verb.keys or (verb.overrides and key not in RESERVED)


def _unknown_key(verb: Verb, key: str) -> UserError:
    if key == "rank" and verb.overrides:
        return UserError(verb.name, "rank is a key of galley logs", "write method.rank=N for the adapter's rank")
    known = nearest(key, verb.keys) if verb.keys else f"see galley {verb.name} --help"
    return UserError(verb.name, f"takes no key {key!r}", foreign.answer(key) or known)


def _translated(verb: Verb, settings: list[str]) -> tuple[list[str], list[str]]:
    """``settings`` with foreign keys (``learning_rate=``) replaced by Galley's own, and a note for each of those.

    Raises ``UserError`` with the key to use where a word could mean several.
    """
    own, notes = [], []
    on_cluster = verb.on_cluster or any(split(setting).key == "cluster" for setting in settings)
    for setting in settings:
        key, value = split(setting)
        # A key that this verb takes is its own, even where another program uses the word for something else.
        meaning = None if key in verb.keys - _BY_VALUE else foreign.meaning(key, value, on_cluster)
        if meaning is None:
            own.append(setting)
            continue
        if meaning.refusal:
            raise UserError("command line", f"{setting!r} is not understood", meaning.refusal)
        own += meaning.settings
        notes.append(meaning.note)
    return own, notes


def _verb(word: str, words: list[str], verbs: Verbs) -> tuple[Verb, list[str], list[str]]:
    """The verb that is meant, the words that are left, and notes. Raises ``UserError`` where there is none."""
    notes = []
    name = word if word in verbs else foreign.verb(word)
    if not name:
        raise UserError("command line", f"no such command: {word!r}", foreign.verb_answer(word) or nearest(word, verbs))
    if name != word:
        notes = [f"galley {word} is read as galley {name}"]
    verb = verbs[name]
    dry = next((word for word in words if _is_on(word, "dry_run")), "")
    if dry and verb.preview:
        if verb.on_cluster and not any(split(word).key == "cluster" for word in words):
            raise UserError(name, "has no dry run", f"write: galley {verb.preview} RECIPE cluster=NAME")
        notes.append(f"galley {name} with {dry} is read as galley {verb.preview}")
        verb = verbs[verb.preview]
    remaining = [word for word in words if not any(_is_on(word, switch) for switch in verb.implied)]
    return verb, remaining, notes


def _is_on(word: str, switch: str) -> bool:
    key, value = split(word)
    return key == switch and foreign.is_true(value)


def _own_verb(word: str, verbs: Verbs) -> str:
    """Galley's own verb for ``word``, where there is one."""
    # Foreign words are looked up last: reading their table takes time.
    return word if word in verbs or word.startswith("-") else foreign.verb(word) or word


def parse(argv: list[str], verbs: Verbs) -> Command:
    """The command that ``argv`` (without the program's name) gives. Raises ``UserError``."""
    for word in argv:
        if not is_text(word):
            raise UserError("command line", f"{word!r} is not UTF-8", "use another name")
    asks_help = any(word in ("--help", "-h") for word in argv)
    if asks_help or not argv or argv[0] == "help":
        names = (_own_verb(word, verbs) for word in argv)
        return Command(next((name for name in names if name in verbs), ""), (), (), help=True)
    # -f is the one short option that is understood, and only for a verb that follows anyway (galley logs -f).
    typed = verbs.get(_own_verb(argv[0], verbs))
    follows = typed is not None and "follow" in typed.implied
    words = _normal_words([word for word in argv[1:] if not (follows and word == "-f")])
    verb, words, notes = _verb(argv[0], words, verbs)
    settings = [word for word in words if _KEY.match(word)]
    positionals = [word for word in words if not _KEY.match(word)]
    _check_count(verb, positionals)
    # Foreign keys become Galley's own first: optimizer.lr=… beside learning_rate=… is then one key given twice.
    settings, translations = _translated(verb, settings)
    _check_keys(verb, settings)
    return Command(verb.name, tuple(positionals), tuple(settings), notes=(*notes, *translations))
