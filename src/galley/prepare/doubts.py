"""What a user should know about prepared data before trusting a run on it: counted, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from galley.contract.errors import UserError
from galley.contract.text import plain
from galley.data.columns import I64
from galley.data.prepared import SourceFacts, SplitFacts
from galley.prepare.formats.encode import KEPT, OVERLONG, UNSUPERVISED, Documents

MASKED_SHARE = 0.2
DROPPED_SHARE = 0.01
KEEP = "to keep long rows raise data.max_length, or use data.overlong=truncate"
MOST_NOTES = 20
"""Of one file, for any row may have keys of its own."""


def count_overlap(train: Documents, chosen: I64, other: Documents, kept_out: I64) -> int:
    """Held-out documents (rows ``kept_out`` of ``other``) that are, token for token, among those trained on."""
    return int(np.isin(_hashes(other, kept_out), _hashes(train, chosen)).sum())


def _hashes(documents: Documents, rows: I64) -> I64:
    hashes: I64 = documents.hashes[np.searchsorted(documents.kept, rows[documents.outcomes[rows] == KEPT])]
    return hashes


def counts(documents: Documents) -> dict[str, Any]:
    """What :func:`warnings` needs of one file or data set. It is kept with the arrays, and the words are put together
    when a run uses them: another run may have the same rows under another name.
    """
    masked = documents.masked
    return {
        "notes": {plain(what): count for what, count in documents.notes.items()},  # keys of rows may hold anything
        "masked": int(masked.sum()),
        "masked_rows": int((masked > 0).sum()),
        "rows": len(masked),
        "overlong": int((documents.outcomes == OVERLONG).sum()),
        "unsupervised": int((documents.outcomes == UNSUPERVISED).sum()),
    }


def check_dropped(documents: Documents, path: str, most: float | None) -> None:
    """Raise :class:`UserError` where a larger share than ``most`` of a source's rows is dropped; None: any may be."""
    tally = counts(documents)
    lost = tally["overlong"] + tally["unsupervised"]
    if most is not None and lost > most * tally["rows"]:
        todo = f"{KEEP}, or use data.gates.dropped={lost / tally['rows']:.3f} or more"
        raise UserError("data.gates.dropped", f"{_dropped(path, tally)}, more than {most:.1%}", todo)


def _dropped(name: str, tally: Mapping[str, Any]) -> str:
    reasons = {"overlong": "longer than data.max_length", "unsupervised": "with nothing to train on"}
    lost = [f"{tally[key]:,} {reason}" for key, reason in reasons.items() if tally[key]]
    total = tally["overlong"] + tally["unsupervised"]
    return f"{name}: {total:,} of {tally['rows']:,} rows are dropped ({total / tally['rows']:.1%}): {', '.join(lost)}"


def warnings(
    sources: list[SourceFacts], counted: Mapping[str, Mapping[str, Any]], held_out: SplitFacts | None
) -> list[str]:
    """One line for each doubt about the data; ``counted``: the :func:`counts` of each source."""
    paths = {source.name: source for source in sources}
    lines = []
    for use, tally in counted.items():
        name = Path(paths[use].path).name if use in paths else use
        lines += [f"{name}: {count:,} {what}" for what, count in [*tally["notes"].items()][:MOST_NOTES]]
        if (more := len(tally["notes"]) - MOST_NOTES) > 0:
            lines.append(f"{name}: and {more:,} more kinds of such notes")
        if tally["masked_rows"] and tally["masked_rows"] >= MASKED_SHARE * tally["rows"]:
            lines.append(_masked(name, tally))
        if tally.get("overlong", 0) + tally.get("unsupervised", 0) > DROPPED_SHARE * tally["rows"]:
            lines.append(f"{_dropped(name, tally)}; {KEEP}")
    data, other = paths.get("data"), paths.get("held_out")
    if data and other and data.sha256 == other.sha256:
        same = Path(data.path).resolve() == Path(other.path).resolve()
        lines.append(f"data.held_out_path {'is the file' if same else 'holds the same as the file'} of data.path")
    if held_out and held_out.overlap:
        lines.append(
            f"{held_out.overlap:,} of {held_out.documents:,} held-out rows are training rows too, so the held-out loss "
            "does not measure what is new; remove the duplicates, or give other rows as data.held_out_path"
        )
    return lines


def _masked(name: str, tally: Mapping[str, Any]) -> str:
    """Where a large share of the rows has answers that cannot be trained on."""
    return (
        f"{name}: {tally['masked']:,} answers in {tally['masked_rows']:,} of {tally['rows']:,} rows are not trained "
        "on, for the chat template writes them otherwise once the conversation goes on; use "
        "data.rewritten_turns=split, or a model.chat_template with {% generation %} marks"
    )
