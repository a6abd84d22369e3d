"""What is wrong with a DeepSpeed JSON, gathered so that all of it is told at once, on one line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from galley.contract.errors import UserError

LONGEST = 480
"""Characters of a refusal; what does not fit is counted."""
_LEVELS, _SOME = 4, 3  # How briefly things can be said; how many differences are named at the briefest.
_WORD = 60  # Characters of a value or of a key that the user wrote.


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what it is, what to do."""

    what: str
    todo: str
    where: str = ""
    """Another place than the JSON, such as a key of the recipe."""
    brief: str = ""
    """A shorter way to say both, where there is much to say."""

    def line(self, brief: bool = False) -> str:
        """``what; todo``, with the place where that is another one."""
        return (
            self.brief if brief and self.brief else f"{self.where}: " * bool(self.where) + f"{self.what}; {self.todo}"
        )


@dataclass(frozen=True)
class Claim:
    """A value in the JSON that is the recipe's to say, where the recipe says something else."""

    path: str
    """Dotted path in the JSON."""
    value: Any
    """What stands there."""
    because: str
    """What the recipe makes of it: ``batch.samples 16 makes it 16``."""
    words: tuple[str, ...] = ()
    """``key=value`` words that would make the recipe agree; none: no setting does."""
    todo: str = ""
    """What to do where there are no such words."""
    minor: bool = False
    """With ``take=deepspeed`` a note is enough where there are no such words."""

    def line(self) -> str:
        """``optimizer.params.lr 3e-05, but the recipe says 0.0002``."""
        return f"{self.path} {shown(self.value)}, but {self.because}"


@dataclass
class Findings:
    """What there is to say about a JSON beside a recipe."""

    claims: list[Claim] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shown(value: Any) -> str:
    """``value`` as the JSON has it, not too long, in ASCII."""
    return clip(json.dumps(value, default=str))


def clip(text: str) -> str:
    """``text`` without line breaks, characters that a terminal would obey, or a great length."""
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _WORD else f"{text[: _WORD - 2]} …"


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name in ``known`` that ``word`` was probably meant to be, in whatever case; None where nothing is near."""
    names = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), sorted(names), n=1, cutoff=cutoff)
    return names[matches[0]] if matches else None


def short(label: str) -> str:
    """A path of which the end tells enough."""
    return clip(label) if len(label) <= _WORD else f"…{label[-_WORD + 1 :]}"


def words_of(claims: Sequence[Claim]) -> list[str]:
    """The ``key=value`` words of all ``claims``, each key once."""
    matches: dict[str, str] = {}
    for word in (word for claim in claims for word in claim.words):
        matches[word.partition("=")[0]] = word
    return list(matches.values())


def refusal(label: str, problems: Sequence[Problem], claims: Sequence[Claim], more: str = "") -> UserError:
    """All of it as one error. ``more``: what else ``take=deepspeed`` would need."""
    label = short(label)
    here = f"deepspeed {label}"
    if len(problems) == 1 and not claims:
        only = problems[0]
        return UserError(only.where or here, only.what, only.todo)
    if len(claims) == 1 and not problems:
        return UserError(here, claims[0].line(), _remedy(claims, more))
    if not problems:
        room = LONGEST - len(here)
        lines = [_differences(claims, level, more) for level in range(_LEVELS)]
        what, _, todo = next((line for line in lines if len(line) <= room), lines[-1]).partition("; ")
        return UserError(here, what, todo)
    return _numbered(here, problems, claims, more)


def _numbered(here: str, problems: Sequence[Problem], claims: Sequence[Claim], more: str) -> UserError:
    """Everything, if need be more briefly, and as much of it as one line takes."""
    room = LONGEST - len(here) - 60
    for level in range(_LEVELS):
        parts = [_differences(claims, level, more)] if claims else []
        texts = [*(problem.line(level > 0) for problem in problems), *parts]
        texts = [f"({number}) {text}" for number, text in enumerate(texts, 1)]
        if len(" ".join(texts)) <= room:
            break
    kept = [text for number, text in enumerate(texts) if number == 0 or len(" ".join(texts[: number + 1])) <= room]
    left = len(texts) - len(kept)
    todo = f"and {left} more, reported once these are fixed" if left else "then plan again"
    return UserError(here, f"{len(texts)} things: {' '.join(kept)}", todo)


def _remedy(claims: Sequence[Claim], more: str) -> str:
    words = words_of(claims)
    if not words:
        return claims[0].todo or 'write "auto" there, or add take=recipe'
    take = f"add {' '.join(words)} or take=deepspeed, or keep the recipe's with take=recipe"
    return f"{take}; with take=deepspeed also: {more}" if more else take


def _differences(claims: Sequence[Claim], level: int, more: str) -> str:
    """``level``: 0 says everything, 1 leaves out the recipe's values, 2 the file's paths too, 3 the words instead."""
    if len(claims) == 1:
        return f"{claims[0].line()}; {_remedy(claims, more)}"
    texts = [claim.line() if level == 0 else f"{claim.path} {shown(claim.value)}" for claim in claims]
    if level == _LEVELS - 1 and len(texts) > _SOME:
        texts[_SOME:] = [f"{len(texts) - _SOME} more"]
    named = "" if level == 2 else f": {', '.join(texts)}"
    stuck = [claim.path for claim in claims if not claim.words and not claim.minor]
    if stuck:
        end = f"no setting takes {', '.join(stuck)}: take=recipe, or change the file"
    else:
        end = _taking(claims, level, more)
    return f"{len(claims)} values differ from the recipe's{named}; {end}"


def _taking(claims: Sequence[Claim], level: int, more: str) -> str:
    words = " ".join(words_of(claims))
    take = ("take=deepspeed takes them" if level == _LEVELS - 1 else f"take=deepspeed sets {words}") if words else ""
    left = [claim.path for claim in claims if not claim.words]
    take += f" (but cannot take {', '.join(left)})" if left else ""
    take += f" (and also: {more})" if more else ""
    return f"{take}, take=recipe keeps the recipe's".removeprefix(", ")
