"""The proof that a format is a seam: one that only this file knows is prepared and trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from prepare.conftest import write_jsonl
from ranks import Ranks

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import IGNORED
from galley.data.prepared import open_split, read_manifest
from galley.prepare.formats.base import Document, Encoded, Format, Limits, encode_batch
from galley.prepare.formats.table import FORMATS
from galley.prepare.formats.template import Template
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]
SAMPLE = '{"sum": [1, 2]}'


@dataclass(frozen=True)
class Sum:
    """Two numbers, whose sum is trained on."""

    where: str
    numbers: list[int]
    notes: Mapping[str, int] = field(default_factory=dict)


def parse(record: object, where: str) -> Sum:
    numbers = record.get("sum") if isinstance(record, Mapping) else None
    if not isinstance(numbers, list):
        raise UserError(where, "is no sum", f"write {SAMPLE}")
    return Sum(where, numbers)


def encode(tokenizer: Any, template: Template, limits: Limits, rows: Sequence[Sum]) -> Encoded:
    """One document a row: ``a + b =`` and the sum, of which the latter is trained on."""
    del template, limits
    asked = encode_batch(tokenizer, [(row.where, " + ".join(map(str, row.numbers)) + " =") for row in rows], False)
    answered = encode_batch(tokenizer, [(row.where, f" {sum(row.numbers)}") for row in rows], False)
    documents = []
    for question, answer in zip(asked, answered, strict=True):
        labels = [IGNORED] * len(question.ids) + answer.ids
        documents.append([Document(np.array(question.ids + answer.ids, np.uint32), np.array(labels, np.int32))])
    return Encoded(documents)


def matches(columns: Collection[str]) -> bool:
    return "sum" in columns


SUMS = Format(
    name="sums", tag="sums", rows="sums", sample=SAMPLE, columns=("sum",), matches=matches, parse=parse,
    encode=encode, templated=False,
)  # fmt: skip


def with_format(spec: RunSpec) -> RunSpec:
    """The spec as it would be if the contract knew the name."""
    data = spec.task.data.model_copy(update={"format": SUMS.name})
    return spec.model_copy(update={"task": spec.task.model_copy(update={"data": data})})


def test_a_new_format_is_prepared_and_trained_on(
    make_run: Make, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, SUMS.name, SUMS)
    path = write_jsonl(tmp_path / "sums.jsonl", [{"sum": [n, 2 * n]} for n in range(40)])
    prepared, run = make_run(base_folder, path, max_length=64, packing=True)
    work(with_format(prepared), run, run.attempt(1))
    facts, split = read_manifest(run).train, open_split(run)
    assert (facts.rows, facts.documents) == (40, 40)
    assert 0 < facts.supervised == split.supervised_total < facts.tokens

    spec = toy.make_spec(run, base_folder, steps=2, samples=2, packing=True, stage=1)
    ranks = Ranks()
    try:
        assert ranks.run("galley.train.train:main", [str(run.spec)], 1, run.root / "ranks.log") == [0], toy.rank_logs(
            run
        )
    finally:
        ranks.close()
    losses = toy.metrics(run)
    assert len(losses) == spec.task.duration.steps == 2
    assert all(np.isfinite(losses))


def test_its_errors_name_the_row(
    make_run: Make, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, SUMS.name, SUMS)
    path = tmp_path / "sums.jsonl"
    for line, what in (
        (json.dumps({"messages": []}), "is no sum; write"),
        ("words", f"not JSON: .* write one object a line, such as {SUMS.sample[:6]}"),
    ):
        path.write_text('{"sum": [1, 1]}\n' + line + "\n")
        spec, run = make_run(base_folder, path)
        with pytest.raises(UserError, match=rf"sums\.jsonl:2: {what}"):
            work(with_format(spec), run, run.attempt(1))
