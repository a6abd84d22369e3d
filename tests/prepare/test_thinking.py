"""``data.thinking``: what answers think is kept, taken out of the rows, or written and not trained on."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prepare.oracle import KINDS, answer, judge, stretches_of, templates, tokenizer_for, user

from galley.contract.errors import UserError
from galley.prepare.formats.base import Document, Limits, Turns
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.template import Template, study

ALL = templates()
THINKING = {kind: record for kind, record in KINDS.items() if "thinking" in kind}
REASON = re.compile(r"reason\d")
SPOKEN = re.compile(r"answer\d|callname\d|argvalue\d")


@pytest.fixture(scope="module")
def broad() -> Any:
    return tokenizer_for(list(ALL.values()))


def encoded(
    tokenizer: Any, template: Template, record: dict[str, Any], learn: Any = "assistant", **turns: Any
) -> Document:
    limits = Limits(4096, "drop", learn, turns=Turns(**turns))
    ((document,),) = CHAT.encode(tokenizer, template, limits, [CHAT.parse(record, "here:1")]).documents
    return document


def silent(record: dict[str, Any]) -> dict[str, Any]:
    """The record as somebody would have written it without thinking."""
    messages = []
    for message in record["messages"]:
        kept = {key: value for key, value in message.items() if key != "reasoning_content"}
        messages.append({**kept, "content": re.sub(r"^<think>.*</think>\s*", "", kept["content"], flags=re.DOTALL)})
    return {**record, "messages": messages}


@pytest.mark.parametrize("name", ALL)
def test_dropped_is_as_if_it_had_not_been_there(broad: Any, name: str) -> None:
    template = study(broad, ALL[name])
    for kind, record in THINKING.items():
        if judge(broad, template, record).refused:
            continue
        dropped, expected = encoded(broad, template, record, thinking="drop"), encoded(broad, template, silent(record))
        assert dropped.tokens.tolist() == expected.tokens.tolist(), kind
        assert dropped.labels.tolist() == expected.labels.tolist(), kind
        assert not REASON.search(broad.decode(dropped.tokens))


@pytest.mark.parametrize("name", ALL)
def test_masked_is_written_and_not_trained_on(broad: Any, name: str) -> None:
    """What is trained on is what follows the thinking in each turn, to the character."""
    template = study(broad, ALL[name])
    for kind, record in THINKING.items():
        if judge(broad, template, record).refused:
            continue
        kept, masked = encoded(broad, template, record), encoded(broad, template, record, thinking="mask")
        assert masked.tokens.tolist() == kept.tokens.tolist()
        expected = [
            re.sub(r"^.*reason\d\s*(?:<[^<>\s]*>\s*)?", "", part, flags=re.DOTALL) for part in stretches_of(broad, kept)
        ]
        assert stretches_of(broad, masked) == expected, kind
        trained, before = "".join(stretches_of(broad, masked)), "".join(stretches_of(broad, kept))
        assert SPOKEN.findall(trained) == SPOKEN.findall(before), kind
        assert not REASON.search(trained)


def test_split_turns_are_masked_too(broad: Any) -> None:
    record = {"messages": [m for n in (1, 2) for m in (user(n), answer(n, reasoning_content=f"reason{n}"))]}
    turns = Turns(rewritten="split", thinking="mask")
    limits, rows = Limits(4096, "drop", turns=turns), [CHAT.parse(record, "here:1")]
    (documents,) = CHAT.encode(broad, study(broad, ALL["qwen3"]), limits, rows).documents
    assert [stretches_of(broad, document) for document in documents] == [["answer2<|im_end|>"], ["answer1<|im_end|>"]]
    assert ["reason2" in broad.decode(documents[0].tokens), "reason1" in broad.decode(documents[1].tokens)] == [
        True
    ] * 2


def test_everything_is_trained_on_but_thinking_is_a_contradiction(broad: Any) -> None:
    with pytest.raises(UserError, match=r"data\.thinking: mask leaves out what answers think"):
        encoded(broad, study(broad, ALL["qwen3"]), KINDS["thinking"], "all", thinking="mask")


def test_thinking_that_is_written_twice_is_refused(broad: Any) -> None:
    template = study(broad, ALL["qwen3"] + "{{ messages[-1].reasoning_content }}")
    with pytest.raises(UserError, match="here:1: the chat template writes thinking so that it cannot be told"):
        encoded(broad, template, KINDS["thinking"], thinking="mask")
