"""``data.learn``: which messages of a conversation are trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare.conftest import write_jsonl
from prepare.families import FAMILIES, TALK, Family, assistant, user

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.columns import COLUMNS, IGNORED
from galley.data.prepared import read_manifest
from galley.export import card
from galley.export.bases import Base
from galley.prepare.formats.base import Document, Limits
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.template import study
from galley.prepare.prepare import work
from galley_launch import cli

Make = Callable[..., tuple[RunSpec, RunDir]]


def encoded(tokenizer: Any, template: str, messages: list[dict[str, Any]], learn: str) -> Document:
    limits = Limits(4096, "drop", learn)  # type: ignore[arg-type]
    rows = [CHAT.parse({"messages": messages}, "here:1")]
    ((document,),) = CHAT.encode(tokenizer, study(tokenizer, template), limits, rows).documents
    return document


def text(tokenizer: Any, document: Document) -> str:
    learnt: str = tokenizer.decode(document.tokens[document.labels != IGNORED])
    return learnt


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_last_answer_as_it_is_trained_on_among_all(tokenizer: Any, family: Family) -> None:
    messages = family.messages or TALK
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    alone = [{**message, "weight": int(index == answers[-1])} if index in answers else message
             for index, message in enumerate(messages)]  # fmt: skip
    last = encoded(tokenizer, family.template, messages, "last")
    assert text(tokenizer, last) == text(tokenizer, encoded(tokenizer, family.template, alone, "assistant"))
    assert "".join(family.learnt).endswith(text(tokenizer, last))
    assert text(tokenizer, last) or family.masked
    assert last.muted == len(answers) - 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_everything_but_the_first_token(tokenizer: Any, family: Family) -> None:
    whole = encoded(tokenizer, family.template, family.messages or TALK, "all")
    assert (whole.labels[1:] == whole.tokens[1:]).all()
    assert whole.labels[0] == IGNORED
    usual = encoded(tokenizer, family.template, family.messages or TALK, "assistant")
    assert (whole.tokens == usual.tokens).all()


def test_a_weight_of_nothing_contradicts_everything(tokenizer: Any) -> None:
    messages = [user("?"), {**assistant("no"), "weight": 0}, user("?"), assistant("yes")]
    with pytest.raises(UserError, match=r"here:1: has a message of weight 0, and with data.learn=all everything is"):
        encoded(tokenizer, FAMILIES[0].template, messages, "all")


CARD = {
    "assistant": "loss on assistant tokens only.",
    "last": "loss on the last answer of each conversation only.",
    "all": "loss on every token.",
}


def test_each_has_arrays_of_its_own(
    make_run: Make, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = [user("One?"), assistant("First answer"), user("Two?"), assistant("Second")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk} for _ in range(4)])
    counts = {}
    for learn in ("assistant", "last", "all"):
        spec, run = make_run(model_folder, path, name=learn, learn=learn)
        work(spec, run, run.attempt(1))
        labels = np.asarray(COLUMNS["labels"].open(run.data / "train"))
        facts = read_manifest(run).train
        assert facts.supervised == int((labels != IGNORED).sum())
        counts[learn] = (facts.supervised, facts.turns_muted)
        part = card.Part("model", tmp_path, None, "AutoModelForCausalLM", chats=True)
        text = card.render(spec, read_manifest(run), run.checkpoint(1), part, Base("", "", ""))
        assert CARD[learn] in text
    assert 0 < counts["last"][0] < counts["assistant"][0] < counts["all"][0]
    assert [muted for _, muted in counts.values()] == [0, 4, 0]
    assert "4 assistant turns left out by their weight or data.learn" in capsys.readouterr().out


def test_plain_text_has_no_last_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    words = ["smollm2-135m-lora", "data.path=texts.jsonl", "data.format=text", "device=cpu", "ranks=1"]
    assert cli.main(["plan", *words, "data.learn=last"]) == 2
    assert "data.learn: plain text has no last answer" in capsys.readouterr().err
