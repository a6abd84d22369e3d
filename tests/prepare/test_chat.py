"""What is learnt: assistant turns as the template writes them, through their end, and nothing else."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare.families import FAMILIES, GEMMA, LLAMA3, MISTRAL, SMOLLM2, TALK, Family, assistant, user

from galley.contract.errors import UserError
from galley.data.columns import IGNORED
from galley.prepare.formats.conversations import Conversation
from galley.prepare.formats.rendering import render_conversation, tokenize
from galley.prepare.formats.template import Template, render, study


def learnt(tokenizer: Any, template: Template, messages: list[dict[str, Any]]) -> tuple[list[str], int]:
    """The learnt stretches as text, and how many turns were masked."""
    row = Conversation("here", messages, None)
    rendered = render_conversation(template, row)
    (document,) = tokenize(tokenizer, [rendered])
    assert tokenizer.decode(document.tokens) == rendered.text
    supervised = document.labels != IGNORED
    assert (document.labels[supervised] == document.tokens[supervised]).all()
    edges = np.flatnonzero(np.diff(supervised.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(document.tokens[start:end]) for start, end in edges], rendered.masked


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_learnt_is_what_the_assistant_says_through_its_end(tokenizer: Any, family: Family) -> None:
    template = study(tokenizer, family.template)
    assert template.end_of_turn == family.end_of_turn
    found, masked = learnt(tokenizer, template, family.messages or TALK)
    assert "".join(found) == "".join(family.learnt)
    assert masked == family.masked


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_any_text_is_learnt_whole(tokenizer: Any, talk: list[tuple[str, str]]) -> None:
    template = study(tokenizer, SMOLLM2)
    found, masked = learnt(tokenizer, template, [m for q, a in talk for m in (user(q), assistant(a))])
    assert "".join(found) == "".join(f"{answer}<|im_end|>" for _, answer in talk)
    assert masked == 0


def test_tokens_are_those_that_the_template_makes(tokenizer: Any) -> None:
    row = Conversation("here", TALK, None)
    for text in (SMOLLM2, MISTRAL, GEMMA):
        (document,) = tokenize(tokenizer, [render_conversation(study(tokenizer, text), row)])
        expected = tokenizer.apply_chat_template(TALK, chat_template=text, return_dict=False)
        assert document.tokens.tolist() == expected  # so there is one beginning-of-text token at most


def test_the_first_token_is_never_learnt(tokenizer: Any) -> None:
    template = study(tokenizer, "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    found, _ = learnt(tokenizer, template, [user(""), assistant("Aye aye")])
    assert found[0] != "Aye aye"
    assert "Aye aye".endswith(found[0])


def test_the_date_stands_still(tokenizer: Any) -> None:
    assert "Today Date: 26 Jul 2024\n" in render(study(tokenizer, LLAMA3), TALK)


def test_a_first_token_that_takes_the_prompts_space_along_is_trained_on(tokenizer: Any) -> None:
    """The prompt ends in a space, which is part of the answer's first token."""
    text = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    found, _ = learnt(tokenizer, study(tokenizer, text), [user("?"), assistant("the fox")])
    assert found == [" the fox</s>"]


@pytest.mark.parametrize(
    ("text", "messages", "reason"),
    [
        (GEMMA, [{"role": "system", "content": "x"}, *TALK], "System role not supported"),
        (MISTRAL, [user("a"), user("b"), assistant("c")], "Conversation roles must alternate"),
    ],
)
def test_a_conversation_that_the_template_refuses(
    tokenizer: Any, text: str, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(UserError, match=f"^x.jsonl:3: the chat template refuses this conversation: {reason}"):
        render_conversation(study(tokenizer, text), Conversation("x.jsonl:3", messages, None))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ messages[0]['content'] }}", "leaves out what the assistant says"),
        ("{{ nothing.at.all }}", "fails on a question and an answer"),
        ("{% for %}", "fails on a question and an answer"),
    ],
)
def test_a_template_that_cannot_be_used(tokenizer: Any, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^model.chat_template: {reason}"):
        study(tokenizer, text)


def test_tools_reach_the_template(tokenizer: Any) -> None:
    text = "{% if tools %}{{ tools | tojson }}{% endif %}" + SMOLLM2
    tools = [{"type": "function", "function": {"name": "row", "parameters": {}}}]
    rendered = render_conversation(study(tokenizer, text), Conversation("here", TALK, tools))
    assert rendered.text.startswith(json.dumps(tools))
    assert len(rendered.spans) == 2


def metaspace() -> Any:
    """A tokenizer as Llama 2's: spaces are part of the word after them, unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    base.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    base.train_from_iterator(["the fox jumps over the dog. "] * 5, trainers.BpeTrainer(special_tokens=specials[:5]))
    vocabulary = json.loads(base.to_str())
    known = vocabulary["model"]["vocab"]
    known.update({byte: len(known) + n for n, byte in enumerate(specials[5:])})
    base = Tokenizer.from_str(json.dumps(vocabulary))
    return PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_tokenizer_with_byte_fallback() -> None:
    tokenizer = metaspace()
    found, _ = learnt(tokenizer, study(tokenizer, MISTRAL), [user("the dog?"), assistant("the fox\n🙂 the")])
    assert found == [" the fox\n🙂 the</s>"]
