"""Plain text: every token is learnt, long texts are split, and no template is needed."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepare.conftest import write_jsonl
from transformers import AutoTokenizer

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.contract.task_data import Gates
from galley.data.columns import IGNORED, Split
from galley.data.prepared import HELD_OUT, open_split, read_manifest
from galley.prepare.formats.text import pieces
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]
Refused = Callable[[RunDir], str]
TEXTS = ["The quick brown fox. " * (1 + 7 * n % 40) for n in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text, "id": n} for n, text in enumerate(TEXTS)])


def found(split: Split) -> dict[int, list[list[int]]]:
    """Row to the tokens of its pieces, longest first; checks that all of each but its first token is learnt."""
    pieces: dict[int, list[list[int]]] = {}
    for index in range(len(split)):
        sample = split.sample(index)
        bounds = pairwise([*sample.document_starts.tolist(), len(sample)])
        for (start, end), row in zip(bounds, sample.sources.tolist(), strict=True):
            tokens, labels = sample.tokens[start:end], sample.labels[start:end]
            assert labels[0] == IGNORED
            assert (labels[1:] == tokens[1:]).all()
            assert (sample.positions[start:end] == np.arange(end - start)).all()
            pieces.setdefault(row, []).append(tokens.tolist())
    return pieces


def whole(tokenizer: Any, row: int) -> list[int]:
    ids: list[int] = tokenizer(TEXTS[row])["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def glued(parts: list[list[int]], ids: list[int]) -> bool:
    """Whether the parts, in some order, are ``ids``."""
    left = list(parts)
    while left:
        here = max((part for part in left if ids[: len(part)] == part), key=len, default=None)
        if here is None:
            return False
        left.remove(here)
        ids = ids[len(here) :]
    return not ids


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_every_text_is_there_once(make_run: Make, base_folder: Path, data: Path, packing: bool) -> None:
    spec, run = make_run(base_folder, data, format="text", max_length=64, packing=packing, held_out=0.2)
    work(spec, run, run.attempt(1))
    tokenizer, manifest = AutoTokenizer.from_pretrained(base_folder), read_manifest(run)
    train, held_out = found(open_split(run)), found(open_split(run, HELD_OUT))
    assert not set(train) & set(held_out), "pieces of one text on both sides"
    assert sorted([*train, *held_out]) == list(range(len(TEXTS)))
    assert all(glued(parts, whole(tokenizer, row)) for row, parts in (train | held_out).items())
    assert max(len(parts) for parts in train.values()) > 2
    assert manifest.held_out is not None
    assert (manifest.train.rows, manifest.held_out.rows) == (48, 12)
    assert manifest.train.documents == manifest.train.rows + manifest.train.pieces == sum(map(len, train.values()))
    assert manifest.train.dropped_overlong == manifest.train.truncated == 0
    assert manifest.train.longest <= 64


def test_long_texts_can_be_dropped_or_cut(make_run: Make, base_folder: Path, data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    long = sum(len(whole(tokenizer, row)) > 64 for row in range(len(TEXTS)))
    for name, kept in (("drop", len(TEXTS) - long), ("truncate", len(TEXTS))):
        spec, run = make_run(base_folder, data, name=name, format="text", max_length=64, overlong=name)
        work(spec, run, run.attempt(1))
        facts = read_manifest(run).train
        assert (facts.rows, facts.documents, facts.pieces) == (len(TEXTS), kept, 0)
        assert facts.dropped_overlong + facts.truncated == long > 0


def test_an_older_run_keeps_what_it_prepared(make_run: Make, model_folder: Path, data: Path) -> None:
    """The hash of what chats ask for is what it was before plain text was known."""
    from galley.prepare.prepare import request_key
    from galley.storage.cache import digest

    spec, _ = make_run(model_folder, data)
    asked = spec.task.data.model_dump(mode="json")
    assert (asked.pop("rewritten_turns"), asked.pop("refused_rows")) == ("mask", "refuse")
    assert asked.pop("thinking") == "keep"
    added = {key: asked.pop(key) for key in ("format", "columns", "system", "subset", "learn", "sources", "gates")}
    assert not any(added.pop("columns").values())
    assert added.pop("gates") == Gates().model_dump()
    assert added == {"format": "auto", "system": None, "subset": None, "learn": "assistant", "sources": []}
    assert request_key(spec) == digest([spec.task.model.model_dump(mode="json"), asked, spec.task.seed])
    assert request_key(make_run(model_folder, data, format="chat")[0]) == request_key(spec)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": []}', "not a plain text: no `text`, only id; write rows such as"),
        ('{"text": 3}', "not a plain text: `text` is a number; write rows such as"),
        ('"words"', "not a plain text: a string, not an object; write rows such as"),
        ("words", "not JSON: "),
    ],
)
def test_rows_that_are_no_text(
    make_run: Make, base_folder: Path, tmp_path: Path, refused: Refused, line: str, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "a b c"}) + "\n" + line + "\n")
    said = refused(make_run(base_folder, path, format="text")[1])
    assert said.startswith(f"{path}:2: {message}")
    assert '{"text": "…"}' in said


def test_a_tokenizer_without_an_end_is_refused(
    make_run: Make, base_folder: Path, tmp_path: Path, data: Path, refused: Refused
) -> None:
    import shutil

    folder = Path(shutil.copytree(base_folder, tmp_path / "endless"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    said = refused(make_run(folder, data, format="text")[1])
    assert "the tokenizer has no end-of-sequence token, with which texts end; give its" in said


@given(st.integers(0, 200), st.integers(2, 40))
def test_pieces_are_the_text_in_order(length: int, cut: int) -> None:
    ids = list(range(length))
    parts = pieces(ids, cut)
    assert [each for part in parts for each in part] == ids
    assert all(len(part) <= cut for part in parts)
    assert cut == 2 or length < 2 or all(len(part) > 1 for part in parts)
    assert len(parts) == max(1, -(-length // cut))
