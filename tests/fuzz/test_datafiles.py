"""Data files of every kind, whole and damaged: rows in are rows used and rows dropped with a reason, or one refusal.

``GALLEY_FUZZ=17`` repeats one file.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import check, datafiles
from prepare.conftest import CHATML, SPECIALS, build_spec, train_tokenizer

from galley.contract.data_files import check_file
from galley.contract.data_folders import list_files, part_descriptions
from galley.contract.errors import UserError
from galley.data.columns import COLUMNS
from galley.prepare.arrays import Arrays, Job, prepare_arrays
from galley.prepare.formats.base import Limits
from galley.prepare.formats.template import Template, study
from galley.prepare.sources import find_sources
from galley.prepare.tokens import Tokens

SEED = int(os.environ.get("GALLEY_FUZZ_SEED", "0"))
LONGEST = 900
"""Characters of a refusal, its path not counted."""


@pytest.fixture(scope="module")
def tokens() -> dict[bool, Tokens]:
    """Of conversations, and of plain text."""
    tokenizer = train_tokenizer(SPECIALS, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    studied = {False: study(tokenizer, CHATML), True: Template(text="", variables={})}
    return {plain: Tokens(tokenizer, template, "", "", []) for plain, template in studied.items()}


def prepared(case: datafiles.Case, root: Path, tokens: dict[bool, Tokens]) -> Arrays:
    spec = build_spec(root, "model", str(case.path), root / "cache", max_length=1000, **case.settings)
    data = spec.task.data
    sources, facts = find_sources(spec)
    chosen = tokens[data.format == "text"]
    limits = Limits(data.max_length, data.overlong, data.learn, data.gates)
    vocab = len(chosen.tokenizer)
    return prepare_arrays(Job(sources, facts, limits, 0.0, 0, chosen, vocab, packed=True), root / "cache")


def planned(case: datafiles.Case) -> None:
    """What ``galley plan`` asks of the same files."""
    form, columns = case.settings["format"], case.settings.get("columns", {})
    for file in part_descriptions(list_files(case.path, "train"), form, columns)[0]:
        check_file(file, form, columns)


def rows_of(arrays: Arrays, tokenizer: Any) -> list[set[int]]:
    """For each document that is trained on, the rows whose words are in it."""
    folder = arrays.folder / "train"
    tokens, bounds = (np.asarray(COLUMNS[name].open(folder)) for name in ("tokens", "documents"))
    texts = [tokenizer.decode(tokens[start:end]) for start, end in itertools.pairwise(bounds)]
    return [{n for word in re.findall(r"k\d{8}k", text) if (n := datafiles.marked(word)) is not None} for text in texts]


def judge(case: datafiles.Case, root: Path, tokens: dict[bool, Tokens]) -> str:
    """What is wrong; nothing where all is well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        result, wrong = check.guarded(lambda: prepared(case, root, tokens), (UserError,))
        refused, plan_wrong = check.guarded(lambda: planned(case), (UserError,))
    if wrong or plan_wrong:
        return wrong or f"plan: {plan_wrong}"
    expected = expectation(case)
    if isinstance(result, UserError):
        text = str(result)
        if "\n" in text or len(text.replace(str(case.path), "")) > LONGEST or not text.strip():
            return f"a refusal that is not one short line: {text[:1500]!r}"
        return "" if expected is None or case.damaged else f"refused, though nothing is wrong: {text}"
    return accounted(case, result, tokens) or _planned_too(case, refused) or _exact(case, result, expected, tokens)


def expectation(case: datafiles.Case) -> list[int] | None:
    """The rows that must be trained on; None where the file must be refused."""
    bad = datafiles.BAD in case.outcomes and case.settings.get("gates", {}).get("unreadable") != "drop"
    kept = [number for number, outcome in enumerate(case.outcomes) if outcome == datafiles.KEEP]
    return None if bad or not kept else kept


def accounted(case: datafiles.Case, arrays: Arrays, tokens: dict[bool, Tokens]) -> str:
    facts = arrays.train
    used = facts.documents - facts.pieces + facts.dropped_overlong + facts.dropped_unsupervised
    if facts.rows != used:
        return f"{facts.rows} rows in, {used} accounted for"
    joined = [rows for rows in rows_of(arrays, tokens[False].tokenizer) if len(rows) > 1]
    if joined and not case.joined and not any("over several lines inside quotes" in line for line in arrays.warnings):
        return f"rows joined in silence: {joined[:3]}"
    return ""


def _planned_too(case: datafiles.Case, refused: Any) -> str:
    dropping = case.settings.get("gates", {}).get("unreadable") == "drop"
    return f"plan refuses what is read: {refused}" if isinstance(refused, UserError) and not dropping else ""


def _exact(case: datafiles.Case, arrays: Arrays, expected: list[int] | None, tokens: dict[bool, Tokens]) -> str:
    if case.damaged:
        return ""
    if expected is None:
        return f"not refused: {case.outcomes}"
    kept = sorted(row for rows in rows_of(arrays, tokens[False].tokenizer) for row in rows)
    if kept != expected:
        return f"trained on {sorted(set(kept) - set(expected))} too many, {sorted(set(expected) - set(kept))} missing"
    if arrays.train.rows != len(case.outcomes):
        return f"{arrays.train.rows} rows, not {len(case.outcomes)}"
    return ""


def failures(count: int, seed: int, root: Path, tokens: dict[bool, Tokens]) -> list[str]:
    asked = os.environ.get("GALLEY_FUZZ", "")
    found = []
    for number in [int(asked)] if asked else range(count):
        folder = root / str(number)
        folder.mkdir()
        case = datafiles.draw(random.Random(f"{seed}/{number}"), folder)
        if wrong := judge(case, folder, tokens):
            found.append(f"seed {seed}, file {number}: {'; '.join(case.done)}, {case.settings}\n  {wrong}")
        if len(found) >= 20:
            break
    return found


def test_sixty_data_files(tmp_path: Path, tokens: dict[bool, Tokens]) -> None:
    found = failures(60, SEED, tmp_path, tokens)
    assert not found, "\n\n".join(found[:10])


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_thousand_data_files(tmp_path: Path, tokens: dict[bool, Tokens]) -> None:
    found = failures(1000, 1000 + SEED, tmp_path, tokens)
    assert not found, "\n\n".join(found[:10])
