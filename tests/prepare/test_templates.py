"""Every chat template at hand, with every kind of row: what is trained on is judged by planted words."""

from collections import Counter
from typing import Any

import pytest
from prepare import turns
from prepare.oracle import HUNDRED, KINDS, Verdict, double_encoded, judge, templates, tokenizer_for

from galley.prepare.formats.template import Template, study

ALL = templates()
# Templates for images and text that take content as a list of parts only: they are given it so.
PARTS_ONLY = ("idefics3", "smolvlm", "llava_next")
TEXT = list(ALL)
CALLS = [kind for kind in KINDS if "call" in kind]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_for(list(ALL.values()))


@pytest.fixture(scope="module")
def studied(tokenizer: Any) -> dict[str, Template]:
    return {name: study(tokenizer, ALL[name]) for name in TEXT}


@pytest.fixture(scope="module")
def verdicts(tokenizer: Any, studied: dict[str, Template]) -> dict[tuple[str, str], Verdict]:
    return {(name, kind): judge(tokenizer, studied[name], KINDS[kind]) for name in TEXT for kind in KINDS}


def test_there_are_many_templates(verdicts: Any) -> None:
    assert len([name for name in TEXT if not name.endswith("_training")]) > 40  # those that models came with
    assert len(verdicts) == len(TEXT) * len(KINDS) > 2200
    assert sum(verdict.refused is None for verdict in verdicts.values()) > 1800


@pytest.mark.parametrize("name", TEXT)
def test_answers_are_trained_on_whole_and_nothing_else_is(verdicts: Any, name: str) -> None:
    """No word of a user, system prompt, tool or result; every answer with its first token and what ends it."""
    faults = {kind: verdicts[name, kind].faults for kind in KINDS if verdicts[name, kind].faults}
    assert faults == {}


# Gemma 4 writes what is said with a call behind the call's result, so that one turn stands in two places: it is masked
# and counted, or marked by the template itself.
APART = ("gemma4", "gemma4_v3", "gemma4_v4", "diffusion_gemma_training")


@pytest.mark.parametrize("name", TEXT)
def test_decoded_is_every_turn_from_behind_its_header_through_its_end(
    studied: dict[str, Template], verdicts: Any, name: str
) -> None:
    """To the character, as a table of headers and ends has it; what is missing is counted, one for one."""
    for kind in KINDS:
        verdict = verdicts[name, kind]
        if verdict.refused is None and not (kind == "call and content" and name in APART):
            marked, masked = studied[name].marked, verdict.rendered.masked
            assert turns.faults(name, verdict.text, verdict.stretches, masked, marked) == [], kind


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_a_conversation_of_a_hundred_turns(tokenizer: Any, studied: dict[str, Template], name: str) -> None:
    verdict = judge(tokenizer, studied[name], HUNDRED)
    assert verdict.rendered is not None
    assert verdict.faults == []
    masked = verdict.rendered.masked
    assert turns.faults(name, verdict.text, verdict.stretches, masked, studied[name].marked) == []
    assert len(turns.written(name, verdict.text)) == 50
    assert masked in (0, 49)  # all but the last, where a template takes thinking out of what lies behind


def test_a_wrong_mask_is_seen() -> None:
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n  a<|im_end|>\n"
    assert turns.faults("qwen2_5", text, ["  a<|im_end|>"], 0, False) == []
    assert turns.faults("qwen2_5", text, ["\n  a<|im_end|>"], 0, False) == []
    assert turns.faults("qwen2_5", text, [], 1, False) == []
    for wrong in (["a<|im_end|>"], ["  a"], ["  a<|im_end|>", "q"], ["assistant\n  a<|im_end|>"], []):
        assert turns.faults("qwen2_5", text, wrong, 0, False) != []


@pytest.mark.parametrize("name", TEXT)
def test_plain_rows_are_accepted(verdicts: Any, name: str) -> None:
    for kind in ("plain", "turns", "tools unused", "thinking", "thinking in content"):
        assert verdicts[name, kind].refused is None


@pytest.mark.parametrize("name", TEXT)
def test_tool_calls_are_written_once_and_whole_or_refused(verdicts: Any, name: str) -> None:
    for kind in CALLS:
        verdict = verdicts[name, kind]
        if verdict.refused:
            assert verdict.refused.startswith("here, row 0: the chat template ")
            continue
        assert not double_encoded(verdict.text), kind
        assert not [word for word in verdict.absent if word.startswith(("arg", "call"))], kind


@pytest.mark.parametrize("name", TEXT)
def test_arguments_as_a_string_or_an_object_are_the_same(verdicts: Any, name: str) -> None:
    string, whole = verdicts[name, "call, string"], verdicts[name, "call, object"]
    assert (string.refused, string.trained) == (whole.refused, whole.trained)


@pytest.mark.parametrize("name", TEXT)
def test_whatever_does_not_reach_the_text_is_counted(verdicts: Any, name: str) -> None:
    for kind in KINDS:
        verdict = verdicts[name, kind]
        if verdict.refused is None and [word for word in verdict.absent if word.startswith("reason")]:
            assert any("thinking" in note or "reasoning" in note for note in verdict.left_out), kind
        if verdict.refused is None and [word for word in verdict.absent if word.startswith("answer")]:
            assert any("`content` of assistant" in note for note in verdict.left_out), kind


def test_templates_that_leave_out_tool_calls_are_refused_by_name(verdicts: Any) -> None:
    """Among them those that Galley ships; before, an empty answer was taught."""
    refused = Counter(
        name for name in TEXT if "leaves out `tool_calls` of messages[1]" in (verdicts[name, "call last"].refused or "")
    )
    assert {"galley-chatml", "galley-llama3", "phi3", "llama3", "qwen2_5_vl", "cohere"} <= set(refused)
    assert len(refused) >= 21
    assert not {"qwen3", "llama3_1", "gemma4", "deepseekv3", "gptoss"} & set(refused)


@pytest.mark.parametrize("name", PARTS_ONLY)
def test_a_template_that_writes_parts_only_is_given_parts(studied: dict[str, Template], name: str) -> None:
    """Before, they were refused, for they write nothing of a string."""
    assert studied[name].parts
    assert not studied["qwen2_5_vl"].parts  # takes both
