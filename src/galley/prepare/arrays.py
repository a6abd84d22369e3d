"""One task's conversations as finished arrays in the shared cache, named by everything that they depend on."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from galley.contract.errors import UserError
from galley.data.columns import I64
from galley.data.prepared import FORMAT, HELD_OUT, TOKENIZER, TRAIN, SourceFacts, SplitFacts
from galley.prepare.doubts import check_dropped, count_overlap, counts, warnings
from galley.prepare.formats.base import DEFAULT_GATES, USUAL, Limits
from galley.prepare.formats.encode import KEPT, OVERLONG, Documents, encode, join, write_split
from galley.prepare.formats.gates import Gate, special_tokens
from galley.prepare.formats.rows import AS_IT_IS
from galley.prepare.mixture import EVERYTHING, mix
from galley.prepare.packing import pack, pick_held_out, separate
from galley.prepare.sources import FIELDS, Source, check_unchanged, read_rows
from galley.prepare.tokens import Tokens
from galley.storage import sums
from galley.storage.cache import digest, entry

# Raise it when the same inputs give other arrays, so that no run takes what an older Galley prepared.
CODE_VERSION = 5
FACTS = "facts.json"
LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


@dataclass(frozen=True)
class Job:
    """What the arrays are made from; :attr:`key` has all of it that changes them."""

    sources: list[Source]
    """Pinned; what is trained on first."""
    fingerprints: list[SourceFacts]
    """Of the sources, and of a chat template of the user's."""
    limits: Limits
    """What happens to long rows."""
    held_out: float
    """Share of the rows to keep out of training, where no source is held out."""
    seed: int
    tokens: Tokens
    vocab: int
    """Rows of the model's embedding: no token may have a higher id."""
    packed: bool

    @property
    def trained_on(self) -> list[Source]:
        """The sources but for one that is held out."""
        return [source for source in self.sources if source.role == "data"]

    @property
    def key(self) -> str:
        """Names the cache entry."""
        contents = {fact.name: fact.sha256 for fact in self.fingerprints if fact.what != "chat_template"}
        limits: list[object] = [self.limits.max_length, self.limits.overlong]
        limits += [source.learn for source in self.sources if source.learn != "assistant"]
        limits += [repr(source.turns) for source in self.sources if source.turns != USUAL]
        choices = [*limits, self.held_out, self.packed, self.vocab, self.seed]
        rendering = [self.tokens.template_hash, self.tokens.fingerprint]
        rendering += dict.fromkeys(source.form.tag for source in self.sources if source.form.tag is not None)
        rendering += [repr(source.reading) for source in self.sources[:1] if source.reading != AS_IT_IS]
        if len(self.trained_on) > 1 or self.trained_on[0].portion != EVERYTHING:
            parts = [
                (source.form.name, source.reading, source.learn, source.turns, source.portion)
                for source in self.trained_on
            ]
            rendering += map(repr, parts)
        if self.limits.gates != DEFAULT_GATES:
            rendering.append(repr(self.limits.gates))
        return digest([CODE_VERSION, FORMAT, contents, choices, rendering])


@dataclass(frozen=True)
class Arrays:
    """A whole cache entry."""

    folder: Path
    """With ``train``, ``held_out`` where asked for, ``tokenizer`` and ``facts.json``."""
    train: SplitFacts
    held_out: SplitFacts | None
    checksums: dict[str, str]
    """CRC-32 of each file, by its path in the folder; none in entries of earlier versions."""
    warnings: list[str]
    """What the user should know about the data, one line each."""
    versions: dict[str, str]
    """Of the libraries that render and tokenise."""


def prepare_arrays(job: Job, cache: Path) -> Arrays:
    """The cache entry for ``job``, made where it is not there yet or is damaged; prints its warnings."""
    notice = f"data: preparing {job.sources[0].path}"
    folder = entry(cache, "data", job.key, lambda folder: _build(job, folder), notice)
    if problem := _damage(folder):
        print(f"data: {folder}: {problem}; preparing again", flush=True)
        shutil.rmtree(folder)
        folder = entry(cache, "data", job.key, lambda folder: _build(job, folder), notice)
    return _read(job, folder)


def _damage(folder: Path) -> str | None:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        _splits(facts)
        if sums.is_intact(facts):
            return sums.damage(folder, [(name, value, None) for name, value in facts.get("checksums", {}).items()])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return f"{FACTS} is not as it was written"


def _read(job: Job, folder: Path) -> Arrays:
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    train, held_out = _splits(facts)
    checksums = {str(name): str(value) for name, value in facts.get("checksums", {}).items()}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return Arrays(folder, train, held_out, checksums, warnings(job.fingerprints, facts["found"], held_out), versions)


def _splits(facts: dict[str, Any]) -> tuple[SplitFacts, SplitFacts | None]:
    """Counts of the training and the held-out split."""
    held_out = facts[HELD_OUT]
    return SplitFacts(**facts[TRAIN]), SplitFacts(**held_out) if held_out else None


def _build(job: Job, folder: Path) -> None:
    flat, beside = folder / "flat", [source for source in job.sources if source.role == "held_out"]
    parts = [_encode(job, source, flat / "data") for source in job.trained_on]
    counted = {source.name: counts(part) for source, part in zip(job.trained_on, parts, strict=True)}
    documents = join(parts, flat / "data")
    if beside:
        other = _encode(job, beside[0], flat / "held_out")
        counted["held_out"] = counts(other)
        chosen, kept_out = np.arange(len(documents.outcomes)), np.arange(len(other.outcomes))
    else:
        other = documents
        chosen, kept_out = _share(job, documents)
    train, held_out = _write_mixture(job, folder / TRAIN, documents, chosen), None
    if len(kept_out):
        held_out = _write(job, folder / HELD_OUT, other, kept_out)
        held_out = held_out.model_copy(update={"overlap": count_overlap(documents, chosen, other, kept_out)})
    shutil.rmtree(flat)
    # A file may have been written to while it was read.
    check_unchanged(job.fingerprints, {fact.name: fact.path for fact in job.fingerprints})
    job.tokens.tokenizer.save_pretrained(folder / TOKENIZER)
    facts: dict[str, Any] = {TRAIN: train.model_dump(), HELD_OUT: held_out and held_out.model_dump()}
    facts["found"] = counted
    facts["checksums"] = sums.of_folder(folder)
    facts[sums.SEAL] = sums.seal(facts)
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _encode(job: Job, source: Source, flat: Path) -> Documents:
    tokens, limits = job.tokens, replace(job.limits, learn=source.learn, turns=source.turns)
    encode_rows = partial(source.form.encode, tokens.tokenizer, tokens.template, limits)
    gate = Gate(source.form, limits.gates, special_tokens(tokens.tokenizer))
    documents = encode(gate.pass_on(read_rows(source)), encode_rows, limits, flat)
    if len(documents.outcomes) == 0:
        raise UserError(FIELDS[source.role], f"'{source.path}' holds no rows", f"give one with {source.form.rows}")
    if len(documents.kept) == 0:
        raise _nothing_left(documents, source, job.limits)
    check_dropped(documents, source.path, limits.gates.dropped)
    highest = int(documents.tokens.max())
    if highest >= job.vocab:
        token = tokens.tokenizer.convert_ids_to_tokens(highest)
        what = f"the tokenizer makes token {highest} ({token!r}), but the model has {job.vocab} embeddings"
        raise UserError("model.path", what, "take the tokenizer that belongs to it")
    return documents


def _nothing_left(documents: Documents, source: Source, limits: Limits) -> UserError:
    overlong = documents.lengths[documents.outcomes == OVERLONG]
    if len(overlong) == 0 and not documents.lengths.any():
        notes = ", ".join(f"{count:,} {what}" for what, count in documents.notes.items())[:200]
        return UserError(FIELDS[source.role], f"every row of '{source.path}' is dropped: {notes}", "fill the columns")
    if len(overlong) == 0:
        what = f"every token of every row of '{source.path}' is masked"
        return UserError(FIELDS[source.role], what, "check that the chat template writes what the assistant says")
    what = f"no row of '{source.path}' fits into {limits.max_length:,} tokens: the shortest has {overlong.min():,}"
    todo = f"use data.max_length={overlong.max()} to keep all, or data.overlong=truncate"
    return UserError("data.max_length", what, todo)


def _share(job: Job, documents: Documents) -> tuple[I64, I64]:
    """Documents to train on and those held out, each ascending: of each source its share of rows."""
    pairs = [_share_of(job, documents, int(begin), int(end)) for begin, end in itertools.pairwise(documents.parts)]
    train, held_out = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return train, held_out


def _share_of(job: Job, documents: Documents, begin: int, end: int) -> tuple[I64, I64]:
    """The same of one source, whose documents are ``begin`` … ``end`` - 1."""
    rows, row_of = np.unique(documents.sources[begin:end], return_inverse=True)  # the pieces of one row stay together
    kept = np.unique(row_of[documents.outcomes[begin:end] == KEPT])
    chosen, others = pick_held_out(len(rows), job.held_out, job.seed, kept)
    train, held_out = (begin + np.flatnonzero(np.isin(row_of, picked)) for picked in (chosen, others))
    if not (documents.outcomes[train] == KEPT).any():
        what = f"{job.held_out:g} of {len(kept)} rows leaves none to train on"
        raise UserError("data.held_out", what, "give more rows, or use data.held_out=0")
    return train, held_out


def _write_mixture(job: Job, folder: Path, documents: Documents, chosen: I64) -> SplitFacts:
    """The training split: of the documents ``chosen``, as many of each source as the task asks for."""
    portions = [source.portion for source in job.trained_on]
    if all(portion == EVERYTHING for portion in portions):
        return _with_shares(job, _write(job, folder, documents, chosen), documents, chosen)
    kept = documents.outcomes[chosen] == KEPT
    rows = [_rows(documents, chosen[kept], number) for number in range(len(portions))]
    drawn = mix([len(of_source) for of_source in rows], portions, job.seed)
    times = [np.bincount(picked, minlength=len(of_source)) for picked, of_source in zip(drawn, rows, strict=True)]
    often = dict(zip(np.concatenate(rows).tolist(), np.concatenate(times).tolist(), strict=True))
    repeats = np.array([often.get(row, 1) for row in documents.sources[chosen].tolist()], np.int64)
    mixed = np.repeat(chosen, np.where(kept, repeats, 1))  # what was dropped stays, to be counted
    if not (documents.outcomes[mixed] == KEPT).any():
        raise UserError("data.sources", "limits, repeats and weights leave no row to train on", "raise them")
    return _with_shares(job, _write(job, folder, documents, mixed), documents, chosen)


def _rows(documents: Documents, kept: I64, number: int) -> I64:
    """The rows of source ``number`` among the documents ``kept``, ascending."""
    begin, end = documents.parts[number], documents.parts[number + 1]
    return np.unique(documents.sources[kept[(kept >= begin) & (kept < end)]])


def _with_shares(job: Job, facts: SplitFacts, documents: Documents, chosen: I64) -> SplitFacts:
    """``facts`` with the rows that each of several sources had, and a line for each."""
    if len(job.trained_on) == 1:
        return facts
    kept, shares = chosen[documents.outcomes[chosen] == KEPT], []
    for source, share in zip(job.trained_on, facts.shares, strict=True):
        rows = len(_rows(documents, kept, source.number))
        shares.append(share.model_copy(update={"path": source.path, "rows": rows}))
    return facts.model_copy(update={"shares": shares})


def _write(job: Job, folder: Path, documents: Documents, rows: I64) -> SplitFacts:
    kept = rows[documents.outcomes[rows] == KEPT]
    limits, seed = job.limits, job.seed
    lengths = np.minimum(documents.lengths[kept], limits.max_length)
    packing = pack(lengths, limits.max_length, seed) if job.packed else separate(len(kept), seed)
    return write_split(folder, documents, rows, packing, limits)
