"""Several sources: what each gives to training, counted and exact, whatever the order in which they are read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import chat, rows, write_jsonl

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import IGNORED
from galley.data.prepared import HELD_OUT, TRAIN, open_split, read_manifest, row_names
from galley.prepare.prepare import work

Mixed = Callable[..., RunDir]
ALPACA = [{"instruction": f"Do {n}", "input": "", "output": f"Done {n} times"} for n in range(30)]


@pytest.fixture
def mixed(make_run: Callable[..., tuple[RunSpec, RunDir]], model_folder: Path) -> Mixed:
    """Prepares a run of several sources: dictionaries as ``data.sources`` has them, whose paths are files."""

    def prepare(*sources: dict[str, Any], name: str = "run", **more: Any) -> RunDir:
        spec, run = make_run(model_folder, "", name=name, sources=list(sources), **more)
        work(spec, run, run.attempt(1))
        return run

    return prepare


def documents(run: RunDir, split: str = TRAIN) -> Iterator[tuple[Any, Any]]:
    """Tokens and labels of every document of a split."""
    columns = open_split(run, split)
    for sample in map(columns.sample, range(len(columns))):
        bounds = [*sample.document_starts.tolist(), len(sample.tokens)]
        for begin, end in itertools.pairwise(bounds):
            yield sample.tokens[begin:end], sample.labels[begin:end]


def texts(run: RunDir, tokenizer: Any, split: str = TRAIN) -> Counter[str]:
    """Every document of a split as text, and how often."""
    return Counter(tokenizer.decode(tokens) for tokens, _ in documents(run, split))


def test_two_sources_of_two_formats_are_what_each_is_alone(
    mixed: Mixed, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_jsonl(tmp_path / "chat.jsonl", rows(20))
    two = write_jsonl(tmp_path / "alpaca.jsonl", ALPACA)
    both = mixed({"path": str(one)}, {"path": str(two)}, name="both")
    alone = [mixed({"path": str(path)}, name=path.stem) for path in (one, two)]
    assert texts(both, tokenizer) == texts(alone[0], tokenizer) + texts(alone[1], tokenizer)
    facts = read_manifest(both).train
    assert [(share.path, share.rows, share.documents) for share in facts.shares] == [
        (str(one), 20, 20),
        (str(two), 30, 30),
    ]
    assert [share.supervised for share in facts.shares] == [read_manifest(run).train.supervised for run in alone]
    assert row_names(facts.shares, [0, 19, 20, 49]) == [f"{one}:1", f"{one}:20", f"{two}:1", f"{two}:30"]
    assert row_names([], [0, 19]) == ["1", "20"]
    assert sum(share.supervised for share in facts.shares) == facts.supervised
    share = facts.shares[0].supervised / facts.supervised
    assert (
        f"data: {one}: {share:.1%} of the tokens trained on; 20 documents an epoch, of 20 rows"
        in capsys.readouterr().out
    )


def test_one_source_is_what_a_path_is(
    mixed: Mixed, make_run: Callable[..., tuple[RunSpec, RunDir]], model_folder: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", rows(20))
    spec, plain = make_run(model_folder, path, name="plain", held_out=0.2)
    work(spec, plain, plain.attempt(1))
    listed = mixed({"path": str(path)}, name="listed", held_out=0.2)
    for split in (TRAIN, HELD_OUT):
        files = {file.name: file.read_bytes() for file in (plain.data / split).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (listed.data / split).iterdir()}
    assert read_manifest(listed).train.shares == []


def test_weights_limits_and_repeats(mixed: Mixed, tmp_path: Path, tokenizer: Any) -> None:
    one = str(write_jsonl(tmp_path / "chat.jsonl", rows(20)))
    two = str(write_jsonl(tmp_path / "alpaca.jsonl", ALPACA))

    def counts(run: RunDir) -> list[int]:
        return [share.documents for share in read_manifest(run).train.shares]

    assert counts(mixed({"path": one, "weight": 2}, {"path": two, "weight": 1}, name="weights")) == [20, 10]
    assert counts(mixed({"path": one, "limit": 7}, {"path": two}, name="limit")) == [7, 30]
    run = mixed({"path": one, "repeats": 2.5}, {"path": two}, name="repeats")
    assert counts(run) == [50, 30]
    times = Counter(texts(run, tokenizer).values())
    assert times == {2: 10, 3: 10, 1: 30}
    assert counts(mixed({"path": one, "limit": 5}, name="alone")) == []
    assert read_manifest(mixed({"path": one, "limit": 5}, name="alone")).train.documents == 5


def test_each_source_has_its_own_mask_columns_and_held_out_share(mixed: Mixed, tmp_path: Path, tokenizer: Any) -> None:
    one = write_jsonl(tmp_path / "chat.jsonl", rows(20))
    two = write_jsonl(tmp_path / "own.jsonl", [{"q": f"Why {n}?", "a": f"Because {n}"} for n in range(40)])
    own = {"path": str(two), "learn": "all", "columns": {"prompt": "q", "completion": "a"}}
    run = mixed({"path": str(one)}, own, held_out=0.25)
    for tokens, labels in documents(run):
        assert (labels[1:] != IGNORED).all() == ("Why" in tokenizer.decode(tokens))
    held = texts(run, tokenizer, HELD_OUT)
    assert (sum("Why" in text for text in held), sum("Question" in text for text in held)) == (10, 5)
    assert not set(held) & set(texts(run, tokenizer))


def test_a_bad_row_names_its_own_file(mixed: Mixed, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "chat.jsonl", rows(3))
    two = write_jsonl(tmp_path / "bad.jsonl", [chat("a", "b"), {"messages": []}])
    with pytest.raises(UserError, match=f"^{two}:2: not a conversation"):
        mixed({"path": str(one)}, {"path": str(two)})
