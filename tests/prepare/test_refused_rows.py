"""``data.refused_rows`` and ``data.rewritten_turns``: what a chat template does not write as it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import write_jsonl
from prepare.families import MISTRAL, SMOLLM2, assistant, user
from prepare.oracle import KINDS, answer, stretches_of, templates, tokenizer_for
from prepare.oracle import user as question

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import read_manifest
from galley.prepare.formats.base import Document, Limits, Turns
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.merging import DROPPED, JOINED, MOVED
from galley.prepare.formats.template import study
from galley.prepare.prepare import work

Make = Callable[..., tuple[RunSpec, RunDir]]
ALL = templates()
GEMMA = ALL["gemma"]
SYSTEM = {"role": "system", "content": "Be brief."}


def encoded(
    tokenizer: Any, template: str, record: dict[str, Any], turns: Turns, learn: str = "assistant"
) -> tuple[list[Document], dict[str, int]]:
    limits = Limits(4096, "drop", learn, turns=turns)  # type: ignore[arg-type]
    encoded = CHAT.encode(tokenizer, study(tokenizer, template), limits, [CHAT.parse(record, "here:1")])
    (documents,) = encoded.documents
    return documents, dict(encoded.left_out)


MERGE = Turns(refused="merge")
TURNS = [user("One?"), assistant("First"), user("Two?"), assistant("Second")]


@pytest.mark.parametrize(
    ("template", "messages", "same", "notes"),
    [
        (GEMMA, [SYSTEM, *TURNS], [user("Be brief.\n\nOne?"), *TURNS[1:]], {MOVED: 1}),
        (MISTRAL, [user("a"), *TURNS], [user("a\n\nOne?"), *TURNS[1:]], {JOINED: 1}),
        (GEMMA, [*TURNS, assistant("More")], [*TURNS[:3], assistant("Second\n\nMore")], {JOINED: 1}),
        (GEMMA, [SYSTEM, user("a"), *TURNS], [user("Be brief.\n\na\n\nOne?"), *TURNS[1:]], {MOVED: 1, JOINED: 1}),
        (SMOLLM2, [SYSTEM, user("a"), *TURNS], [SYSTEM, user("a"), *TURNS], {}),
    ],
    ids=["system", "alternation", "two answers", "both", "taken as it is"],
)
def test_merged_is_as_if_it_had_been_written_so(
    tokenizer: Any, template: str, messages: list[Any], same: list[Any], notes: dict[str, int]
) -> None:
    ((found,), counted) = encoded(tokenizer, template, {"messages": messages}, MERGE)
    ((expected,), _) = encoded(tokenizer, template, {"messages": same}, Turns())
    assert (found.tokens == expected.tokens).all()
    assert (found.labels == expected.labels).all()
    assert counted == notes


def test_only_answers_of_one_weight_are_joined(tokenizer: Any) -> None:
    messages = [*TURNS[:3], {**assistant("no"), "weight": 0}, assistant("yes")]
    with pytest.raises(UserError, match="here:1: the chat template refuses this conversation"):
        encoded(tokenizer, GEMMA, {"messages": messages}, MERGE)


def test_what_merging_does_not_help_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="here:1: the chat template leaves out `tool_calls`"):
        encoded(tokenizer, SMOLLM2, KINDS["call last"], MERGE)


def test_a_refused_row_is_dropped_and_counted(make_run: Make, model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    template = tmp_path / "gemma.jinja"
    template.write_text(GEMMA.replace("<end_of_turn>", "<|im_end|>"))
    rows = [{"messages": [SYSTEM, *TURNS] if n == 2 else TURNS} for n in range(5)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    spec, run = make_run(model_folder, path, chat_template=str(template), refused_rows="drop")
    work(spec, run, run.attempt(1))
    facts = read_manifest(run).train
    assert (facts.rows, facts.documents, facts.dropped_unsupervised) == (5, 4, 1)
    assert f"rows.jsonl: 1 {DROPPED}" in capsys.readouterr().out
    kept = read_manifest(run).content
    spec, run = make_run(model_folder, path, name="merge", chat_template=str(template), refused_rows="merge")
    work(spec, run, run.attempt(1))
    assert read_manifest(run).train.documents == 5
    assert read_manifest(run).content != kept


SPLIT = Turns(rewritten="split")
REWRITES = ("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_5_nothink")
LONG = {
    "turns": KINDS["turns"],
    "calls in a row": KINDS["calls in a row"],
    "thinking": {"messages": [m for n in (1, 2, 3) for m in (question(n), answer(n, reasoning_content=f"reason{n}"))]},
}


@pytest.fixture(scope="module")
def broad() -> Any:
    return tokenizer_for(list(ALL.values()))


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", REWRITES)
def test_a_rewritten_turn_is_trained_on_in_a_document_that_ends_with_it(broad: Any, name: str, kind: str) -> None:
    """As the same conversation would be that ends there, with all but its last answer left out."""
    record = LONG[kind]
    if name == "qwen3_5_nothink" and kind == "thinking":
        return  # it asks for no thinking, so that thinking is masked and counted in every place
    documents, _ = encoded(broad, ALL[name], record, SPLIT)
    answers = [index for index, message in enumerate(record["messages"]) if message["role"] == "assistant"]
    assert sum(document.masked for document in documents) == 0
    assert len(documents) == len(answers)
    last, *others = documents
    for index, document in zip([answers[-1], *answers[:-1]], [last, *others], strict=True):
        ((alone,), _) = encoded(
            broad, ALL[name], {**record, "messages": record["messages"][: index + 1]}, Turns(), "last"
        )
        assert (document.tokens == alone.tokens).all()
        assert (document.labels == alone.labels).all()
    found = "".join(part for document in documents for part in stretches_of(broad, document))
    words = (
        [f"answer{n}" for n in (1, 2, 3)]
        if kind != "calls in a row"
        else ["callname1", "callname2", "answer3", "answer4"]
    )
    words += [f"reason{n}" for n in (1, 2, 3)] * (kind == "thinking")
    assert all(found.count(word) == 1 for word in words)
    assert "question" not in found


@pytest.mark.parametrize("name", [name for name in ALL if name not in REWRITES])
def test_other_templates_are_not_split(broad: Any, name: str) -> None:
    split, _ = encoded(broad, ALL[name], KINDS["turns"], SPLIT)
    ((usual,), _) = encoded(broad, ALL[name], KINDS["turns"], Turns())
    assert [document.labels.tolist() for document in split] == [usual.labels.tolist()]


def test_pieces_of_a_row_are_counted(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "qwen3.jinja"
    template.write_text(ALL["qwen3"])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TURNS}] * 3)
    spec, run = make_run(model_folder, path, chat_template=str(template), rewritten_turns="split")
    work(spec, run, run.attempt(1))
    facts = read_manifest(run).train
    assert (facts.rows, facts.documents, facts.pieces, facts.turns_masked) == (3, 6, 3, 0)
