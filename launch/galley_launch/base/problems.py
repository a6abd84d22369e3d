"""What is wrong with a DeepSpeed JSON, gathered so that all of it is reported at once, on one line.

A problem is a mistake in the JSON. A difference is a value that is right by itself, but is not what the recipe has.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from galley.contract.errors import UserError

LONGEST = 480
"""Characters of a refusal; what does not fit is counted."""
# A refusal is written in full first; where it is too long, more briefly, in four levels (see `_differences_text`).
_LEVELS = 4
_NAMED = 3  # Differences that are named at the briefest level; the others are counted.
_WORD = 60  # Characters of a value or of a key that the user wrote.


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what it is, what to do."""

    what: str
    todo: str
    where: str = ""
    """Another place than the JSON, such as a key of the recipe."""
    brief: str = ""
    """A shorter text for both, for a line with many problems."""

    def line(self, brief: bool = False) -> str:
        """``what; todo``, after the place if that is not the JSON; ``brief``: the shorter text, if there is one."""
        if brief and self.brief:
            return self.brief
        return f"{self.where}: {self.what}; {self.todo}" if self.where else f"{self.what}; {self.todo}"


@dataclass(frozen=True)
class Difference:
    """A value in the JSON that the recipe has too, and has otherwise."""

    path: str
    """Dotted path in the JSON."""
    value: Any
    """The JSON's value."""
    because: str
    """What the recipe has instead: ``batch.samples 16 makes it 16``."""
    words: tuple[str, ...] = ()
    """``key=value`` words that would make the recipe agree; empty: no setting does."""
    todo: str = ""
    """What to do where there are no such words."""
    minor: bool = False
    """Whether a note is enough with ``take=deepspeed``, even where there are no such words."""

    def line(self) -> str:
        """``optimizer.params.lr 3e-05, but the recipe has 0.0002``."""
        return f"{self.path} {shown(self.value)}, but {self.because}"


@dataclass
class Findings:
    """The result of comparing a JSON with a recipe."""

    differences: list[Difference] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shown(value: Any) -> str:
    """``value`` as it is written in JSON, cut to a readable length, in ASCII."""
    return clip(json.dumps(value, default=str))


def clip(text: str) -> str:
    """``text`` in printable ASCII (no line breaks, no control codes of a terminal) and at most 60 characters."""
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _WORD else f"{text[: _WORD - 2]} …"


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name in ``known`` that ``word`` was probably meant to be, in whatever case; None where nothing is near."""
    names = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), sorted(names), n=1, cutoff=cutoff)
    return names[matches[0]] if matches else None


def short(label: str) -> str:
    """A path, of which only the end is kept where it is long."""
    return clip(label) if len(label) <= _WORD else f"…{label[-_WORD + 1 :]}"


def words_of(differences: Sequence[Difference]) -> list[str]:
    """The ``key=value`` words of all ``differences``, each key once."""
    by_key: dict[str, str] = {}
    for word in (word for difference in differences for word in difference.words):
        by_key[word.partition("=")[0]] = word
    return list(by_key.values())


def refusal(
    label: str, problems: Sequence[Problem], differences: Sequence[Difference], obstacle: str = ""
) -> UserError:
    """All of it as one error. ``obstacle``: what would be wrong next if ``take=deepspeed`` were added."""
    label = short(label)
    here = f"deepspeed {label}"
    if len(problems) == 1 and not differences:
        only = problems[0]
        return UserError(only.where or here, only.what, only.todo)
    if len(differences) == 1 and not problems:
        return UserError(here, differences[0].line(), _remedy(differences, obstacle))
    if not problems:
        room = LONGEST - len(here)
        lines = [_differences_text(differences, level, obstacle) for level in range(_LEVELS)]
        what, _, todo = next((line for line in lines if len(line) <= room), lines[-1]).partition("; ")
        return UserError(here, what, todo)
    return _numbered(here, problems, differences, obstacle)


def _numbered(here: str, problems: Sequence[Problem], differences: Sequence[Difference], obstacle: str) -> UserError:
    """All of it, numbered, at the first level of brevity that fits; what does not fit even then is counted."""
    room = LONGEST - len(here) - 60  # 60 characters are left for "N things: " and the advice at the end
    for level in range(_LEVELS):
        parts = [_differences_text(differences, level, obstacle)] if differences else []
        texts = [*(problem.line(level > 0) for problem in problems), *parts]
        texts = [f"({number}) {text}" for number, text in enumerate(texts, 1)]
        if len(" ".join(texts)) <= room:
            break
    # The first is always kept, so that the line says something; then as many as fit.
    kept = [text for number, text in enumerate(texts) if number == 0 or len(" ".join(texts[: number + 1])) <= room]
    left = len(texts) - len(kept)
    todo = f"and {left} more, reported once these are fixed" if left else "then plan again"
    return UserError(here, f"{len(texts)} things: {' '.join(kept)}", todo)


def _remedy(differences: Sequence[Difference], obstacle: str) -> str:
    words = words_of(differences)
    if not words:
        return differences[0].todo or 'write "auto" there, or add take=recipe'
    take = f"add {' '.join(words)} or take=deepspeed, or keep the recipe's with take=recipe"
    return f"{take}; with take=deepspeed also: {obstacle}" if obstacle else take


def _differences_text(differences: Sequence[Difference], level: int, obstacle: str) -> str:
    """All ``differences`` and the remedy, as ``what; todo``.

    ``level``: 0 has everything; 1 leaves out the recipe's values; 2 the JSON's paths and values too; 3 names a few of
    those, and leaves out the words that would make the recipe agree.
    """
    if len(differences) == 1:
        return f"{differences[0].line()}; {_remedy(differences, obstacle)}"
    named = [f"{difference.path} {shown(difference.value)}" for difference in differences]
    texts = [difference.line() for difference in differences] if level == 0 else named
    if level == _LEVELS - 1 and len(texts) > _NAMED:
        texts[_NAMED:] = [f"{len(texts) - _NAMED} more"]
    listing = "" if level == 2 else f": {', '.join(texts)}"
    # One value that no setting can take spoils take=deepspeed for all, so only the other two remedies are offered.
    not_settable = [difference.path for difference in differences if not difference.words and not difference.minor]
    if not_settable:
        end = f"no setting takes {', '.join(not_settable)}: take=recipe, or change the file"
    else:
        end = _taking(differences, level, obstacle)
    return f"{len(differences)} values differ from the recipe's{listing}; {end}"


def _taking(differences: Sequence[Difference], level: int, obstacle: str) -> str:
    """What ``take=deepspeed`` and ``take=recipe`` would do."""
    words = " ".join(words_of(differences))
    take = ("take=deepspeed takes them" if level == _LEVELS - 1 else f"take=deepspeed sets {words}") if words else ""
    left = [difference.path for difference in differences if not difference.words]
    take += f" (but cannot take {', '.join(left)})" if left else ""
    take += f" (and also: {obstacle})" if obstacle else ""
    return f"{take}, take=recipe keeps the recipe's".removeprefix(", ")
