"""What is looked for in every row: half characters, NULs, special tokens, empty answers; and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from galley.contract.errors import UserError
from galley.contract.task_data import Gates
from galley.prepare.formats.base import E, Example, Format, check_characters
from galley.prepare.formats.conversations import EMPTY

NUL = "\0"


@dataclass
class Gate:
    """The gates of one source."""

    form: Format[Any]
    gates: Gates
    special: re.Pattern[str] | None
    """Matches the tokenizer's special tokens; None where it has none."""
    shown: str = ""
    """The special token that was found first."""

    def pass_on(self, rows: Iterable[tuple[int, Example]]) -> Iterator[tuple[int, Example]]:
        """``rows`` with what is doubtful about them in their notes; of one that is dropped only the reason.

        Raises :class:`UserError` for a row that is refused.
        """
        for number, example in rows:
            yield number, self._judged(example)

    def _judged(self, example: Example) -> Example:
        try:
            doubts = self._doubts(example)
        except UserError as error:
            if self.gates.unreadable == "refuse":
                raise
            return self._dropped(error, "rows dropped, for they hold half a character")
        for gate, (note, _) in doubts.items():
            choice = getattr(self.gates, gate)
            if choice == "refuse":
                todo = f"change the row, or use data.gates.{gate}=warn or drop"
                raise UserError(example.where, f"refused, for {note}", todo)
            if choice == "drop":
                return self._dropped(UserError(example.where, note, ""), f"rows dropped, for {note}")
        return self._noted(example, doubts) if doubts else example

    def _dropped(self, error: UserError, reason: str) -> Example:
        row: Example = dropped_row(self.form, error, reason)
        return row

    def _doubts(self, example: Example) -> dict[str, tuple[str, int]]:
        """The gates that this row does not pass freely: what it holds, and how often. Raises for half a character."""
        nul = special = 0
        for text in _strings([getattr(example, name, None) for name in ("messages", "tools", "text")]):
            if not text.isascii():
                check_characters(example.where, text)
            nul += NUL in text
            if self.special and (match := self.special.search(text)):
                special, self.shown = special + 1, self.shown or match[0]
        written = f"texts hold special tokens, such as {self.shown}, which the model reads as those and not as text"
        counts = {
            "empty_answers": (EMPTY, example.notes.get(EMPTY, 0)),
            "null_characters": ("texts hold NUL characters", nul),
            "special_tokens": (written, special),
        }
        return {gate: doubt for gate, doubt in counts.items() if doubt[1]}

    def _noted(self, example: Example, doubts: Mapping[str, tuple[str, int]]) -> Example:
        notes = {note: count for note, count in example.notes.items() if note != EMPTY}
        for gate, (note, count) in doubts.items():
            if getattr(self.gates, gate) == "warn":
                todo = f"data.gates.{gate}=drop leaves such rows out, allow is for those that are meant so"
                notes[f"{note}; {todo}"] = count
        changed: Any = replace(cast(Any, example), notes=notes)
        return cast(Example, changed)


def dropped_row(form: Format[E], error: UserError, reason: str) -> E:
    """A row that becomes no document, for a reason. Raises ``error`` where the format knows no such row."""
    if form.nothing is None:
        raise error
    return form.nothing(error.where, reason)


def special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches any special token of the tokenizer that is written out."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {token for token in [*added, *tokenizer.all_special_tokens] if token.strip()}
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))  # a pattern takes the first that matches
    return re.compile("|".join(map(re.escape, longest_first))) if tokens else None


def _strings(value: Any) -> Iterator[str]:
    """Every text in ``value``, at any depth, but for the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
