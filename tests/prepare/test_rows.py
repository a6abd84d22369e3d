"""Rows as people write them: weights, tool calls in both forms, padded nulls, wrong files, damaged characters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare.conftest import CHATML, chat, write_jsonl
from prepare.families import MARKED, QWEN25, assistant, user
from prepare.oracle import TOOLS, call

from galley.contract.data_files import check_file
from galley.contract.errors import UserError
from galley.data.columns import IGNORED
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.conversations import EMPTY, NULLS, Conversation
from galley.prepare.formats.coverage import Coverage, check_coverage
from galley.prepare.formats.rendering import render_conversation, tokenize
from galley.prepare.formats.rows import read_file, rows_of
from galley.prepare.formats.template import study

OVERHANG = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<tool>' + m.content + '</tool>' }}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}{% if loop.index0 == 0 or messages[loop.index0-1].role != 'tool' %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
RESULT = {"role": "tool", "content": "Oslo has twelve degrees and some rain today"}
OVERHUNG = [user("weather?"), assistant("call wx"), RESULT, assistant("Take a coat.")]


def read(*records: dict[str, Any]) -> list[Conversation]:
    return [row for _, row in rows_of(iter(records), "rows", CHAT)]


def trained(tokenizer: Any, template: str, record: dict[str, Any]) -> list[str]:
    """The stretches of one row that are trained on."""
    (row,) = read(record)
    studied = study(tokenizer, template)
    check_coverage(Coverage(studied), row)
    (document,) = tokenize(tokenizer, [render_conversation(studied, row)])
    edges = np.flatnonzero(np.diff((document.labels != IGNORED).astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(document.tokens[start:end]) for start, end in edges]


@pytest.mark.parametrize("template", [OVERHANG, OVERHANG.replace("</tool>' }}", "</tool>\n' }}")])
def test_a_tools_result_without_a_generation_prompt_after_it_is_not_trained_on(tokenizer: Any, template: str) -> None:
    assert trained(tokenizer, template, {"messages": OVERHUNG}) == ["call wx<|im_end|>", "Take a coat.<|im_end|>"]


def test_an_answer_that_begins_as_the_overhang_does_is_trained_on_whole(tokenizer: Any) -> None:
    found = trained(tokenizer, OVERHANG, {"messages": [user("?"), assistant("<table>")]})
    assert found == ["<table><|im_end|>"]


def test_a_result_inside_an_answer_is_refused(tokenizer: Any) -> None:
    inside = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m.content }}{% if loop.index < messages | length and messages[loop.index].role == 'tool' %}"
        "{{ messages[loop.index].content }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="writes `content` of tool messages inside an answer, which is trained on"):
        trained(tokenizer, inside, {"messages": OVERHUNG})


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["found", "marked"])
@pytest.mark.parametrize("key", ["weight", "train", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_an_answer_of_weight_0_is_not_trained_on(tokenizer: Any, template: str, key: str, no: Any, yes: Any) -> None:
    talk = [user("2+2?"), assistant("5", **{key: no}), user("sure?"), assistant("No, 4.", **{key: yes})]
    assert trained(tokenizer, template, {"messages": talk}) == ["No, 4.<|im_end|>"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"weight": 0.5}, "messages[1] has weight 0.5, which is not understood; use 1 or true"),
        ({"weight": 2}, "messages[1] has weight 2, which"),
        ({"train": "false"}, "messages[1] has train 'false', which"),
        ({"loss": [0]}, "messages[1] has loss [0], which"),
        ({"weight": 1, "train": False}, "messages[1] has weight 1, train False, which contradict each other"),
    ],
)
def test_a_weight_that_is_not_understood_is_refused(tmp_path: Path, more: dict[str, Any], expected: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [chat("a", "b"), {"messages": [user("a"), assistant("b", **more)]}])
    with pytest.raises(UserError) as caught:
        list(read_file(path, CHAT))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert expected in str(caught.value)


def test_a_weight_of_a_users_message_is_counted() -> None:
    (row,) = read({"messages": [{**user("a"), "weight": 1}, assistant("b", weight=1)]})
    assert list(row.notes.values()) == [1]
    assert read({"messages": [{**user("a"), "weight": 0}, assistant("b", weight=1)]})[0].notes == {}


SPACE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


@pytest.mark.parametrize("answer", ["the", "Paris", "capital of"])
def test_a_one_word_answer_after_a_space_is_trained_on(tokenizer: Any, answer: str) -> None:
    """Its only token holds the prompt's space too."""
    (found,) = trained(tokenizer, SPACE, chat("Where?", answer))
    assert found.lstrip() == f"{answer}<|im_end|>"


def test_an_end_of_two_special_tokens_is_trained_on_whole(tokenizer: Any) -> None:
    two = CHATML.replace("'<|im_end|>' + '\\n'", "'<|end|><|im_end|>\n'").replace(
        "<|im_end|>' + '\n", "<|end|><|im_end|>\n"
    )
    assert "<|end|><|im_end|>" in two
    assert trained(tokenizer, two, chat("a", "b")) == ["b<|end|><|im_end|>"]
    assert study(tokenizer, two).end_of_turn == "<|im_end|>"


CALLED = [user("w?"), {"role": "assistant", "content": None, "tool_calls": [call({"city": "Oslo"})]}]
PLAIN = (
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}ARGS{% endfor %}"
)
LOOP = (
    "{% for m in messages %}"
    + PLAIN
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITERS = {
    "tojson": ("{{ c.function.arguments | tojson }}", "object"),
    "as it is": ("{{ c.function.arguments }}", "string"),
    "concatenated": ("{{ '' + c.function.arguments }}", "string"),
    "items": ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "object"),
    "either": (
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
        "object",
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}', '"{\\"city\\": \\"Oslo\\"}"'])
def test_arguments_are_given_as_the_template_writes_them(tokenizer: Any, writer: str, given: Any) -> None:
    expression, form = WRITERS[writer]
    template = LOOP.replace("ARGS", expression)
    assert study(tokenizer, template).arguments == form
    if form == "string" and isinstance(given, str) and given.startswith('"'):
        return  # a string in a string is passed on as it is
    (found,) = trained(tokenizer, template, {"messages": [CALLED[0], {**CALLED[1], "tool_calls": [call(given)]}]})
    assert found.removesuffix("<|im_end|>").removeprefix("callname1") in ('{"city": "Oslo"}', "city=Oslo")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "{city: Oslo}",
            "messages[1].tool_calls[0].arguments is a string, but not of JSON: '{city: Oslo}'; write it as JSON",
        ),
        ("[1]", "messages[1].tool_calls[0].arguments is not a JSON object: '[1]'; write one, {} for none"),
    ],
)
def test_arguments_that_are_no_object_are_refused(tokenizer: Any, given: str, expected: str) -> None:
    record = {"messages": [CALLED[0], {**CALLED[1], "tool_calls": [call(given)]}]}
    with pytest.raises(UserError) as caught:
        trained(tokenizer, QWEN25, record)
    assert str(caught.value) == f"rows, row 0: {expected}"


def test_arguments_that_a_template_cannot_write_are_refused(tokenizer: Any) -> None:
    template = LOOP.replace("ARGS", "{{ (c.function.arguments | string) | tojson }}")
    assert study(tokenizer, template).arguments is None
    with pytest.raises(
        UserError, match="writes tool calls' arguments neither from an object nor from a string as JSON"
    ):
        trained(tokenizer, template, {"messages": CALLED})


def test_nulls_that_arrow_pads_are_left_out_and_counted(tokenizer: Any) -> None:
    padded = {"name": "wx", "parameters": {"properties": {"city": {"type": "string"}, "zone": None}, "required": None}}
    record = {
        "messages": [
            {**user("w?"), "tool_calls": None},
            {**CALLED[1], "tool_calls": [call({"city": "Oslo", "zone": None, "deep": {"a": [{"b": None, "c": 1}]}})]},
        ],
        "tools": [{"type": "function", "function": padded}],
    }
    (row,) = read(record)
    assert "None" not in str(row.messages) + str(row.tools)
    assert row.notes == {NULLS: 4}
    (found,) = trained(tokenizer, QWEN25, record)
    assert '"arguments": {"city": "Oslo", "deep": {"a": [{"c": 1}]}}' in found


def test_a_null_in_a_string_of_json_stays(tokenizer: Any) -> None:
    record = {"messages": [CALLED[0], {**CALLED[1], "tool_calls": [call('{"city": null}')]}]}
    assert '"arguments": {"city": null}' in trained(tokenizer, QWEN25, record)[0]
    assert read(record)[0].notes == {}
    record["messages"][1]["tool_calls"] = json.dumps([call({"city": None})])
    assert '"arguments": {"city": null}' in trained(tokenizer, QWEN25, record)[0]


def test_no_tool_calls_are_none_and_tools_may_be_a_string() -> None:
    (row,) = read({"messages": [user("a"), assistant("b", tool_calls=[])], "tools": "[]"})
    assert row.tools is None
    assert "tool_calls" not in row.messages[1]
    for tools in (TOOLS, json.dumps(TOOLS), [json.dumps(tool) for tool in TOOLS]):
        assert read({"messages": [user("a"), assistant("b")], "tools": tools})[0].tools == TOOLS
    with pytest.raises(UserError, match="messages\\[0\\] has no content"):
        read({"messages": [assistant(None, tool_calls=[])]})  # type: ignore[arg-type]


def test_content_in_parts_of_text_is_one_text() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert read({"messages": [user(parts), assistant("c")]}) == read({"messages": [user("a b"), assistant("c")]})  # type: ignore[arg-type]


def test_keys_that_the_template_leaves_out_are_counted_by_name(tokenizer: Any) -> None:
    coverage = Coverage(study(tokenizer, CHATML))
    for record in (
        {"messages": [user("a"), assistant("b", thinking="c", name="d")], "tools": TOOLS},
        {"messages": [user("a"), assistant("b", reasoning="c"), user("a"), assistant("b", reasoning="c")]},
        {"messages": [user("a"), assistant("b")]},
    ):
        check_coverage(coverage, read(record)[0])
    shown = {name.removesuffix(" left out by the chat template"): count for name, count in coverage.counts.items()}
    assert shown == {
        "`tools` of rows": 1,
        "`thinking` of assistant messages": 1,
        "`name` of assistant messages": 1,
        "`reasoning` of assistant messages": 2,
    }


def test_an_old_function_call_is_not_taught_as_an_empty_answer(tokenizer: Any) -> None:
    record = {"messages": [user("a"), assistant("", function_call={"name": "wx", "arguments": "{}"})]}
    with pytest.raises(UserError, match=r"leaves out `function_call` of messages\[1\], so the answer would be taught"):
        trained(tokenizer, CHATML, record)


def test_half_a_surrogate_pair_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    broken = {"messages": [user("hi \ud83d there"), assistant("ok")]}
    path.write_text(json.dumps(chat("a", "b")) + "\n" + json.dumps(broken) + "\n")
    template = study(tokenizer, CHATML)
    with pytest.raises(UserError) as caught:
        tokenize(tokenizer, [render_conversation(template, row) for _, row in read_file(path, CHAT)])
    expected = (
        "holds \\ud83d, half of a surrogate pair, which is not a character; remove it, or write the whole character"
    )
    assert str(caught.value) == f"{path}:2: {expected}"


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [100, 900, 5_000, 100_000])
@pytest.mark.parametrize("place", ["tools", "arguments", "string", "key", "row"])
def test_thousands_of_levels_are_one_line(tokenizer: Any, tmp_path: Path, levels: int, place: str) -> None:
    deep = nested(levels)
    function = {"name": "f", "arguments": "DEEP"}
    row: dict[str, Any] = {"messages": [user("a"), assistant("b")]}
    if place == "tools":
        row["tools"] = ["DEEP"]
    elif place == "key":
        row["messages"][1]["extra"] = "DEEP"
    elif place == "row":
        row["messages"][0] = "DEEP"
    else:
        row["messages"][1] |= {"tool_calls": [{"type": "function", "function": function}]}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row).replace('"DEEP"', json.dumps(deep) if place == "string" else deep) + "\n")
    with pytest.raises(UserError) as caught:
        trained(tokenizer, QWEN25, vars(next(iter(read_file(path, CHAT)))[1]))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


ROW = json.dumps(chat("a", "b"))
FILES: list[tuple[str, bytes, str]] = [
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd....", "is compressed with zstd, for which the package zstandard"),
    ("x.zip", b"PK\x03\x04....", "cannot be unpacked"),
    ("x.json", json.dumps(chat("a", "b"), indent=2).encode(), "is JSON over several lines"),
    ("x.xlsx", b"\xd0\xcf\x11\xe0", "is a spreadsheet; save its rows as CSV"),
    ("x.jsonl", ROW.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ("x.jsonl", ROW.encode("utf-16-le"), "is UTF-16 text without its mark, or no text; save its rows as UTF-8"),
    ("x.csv", b"prompt,completion\n".decode().encode("utf-16-be"), "is UTF-16 text without its mark"),
    ("x.jsonl", b"\0" * 5000, "is UTF-16 text without its mark, or no text"),
    ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-LFS pointer"),
    ("x.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
    ("x.yaml", b"messages:\n", "is a YAML file"),
    ("x.csv", b"id,label\na,b\n", "it has id, label; name the columns, such as data.columns.prompt="),
    ("x.json", b'[{"id": 1},\n{"id": 2}]', "it has id; name the columns"),
    ("d.jsonl", b'{"prompt": "", "chosen": [], "rejected": []}\n', "these are preferences"),
    ("t.jsonl", b'{"text": "a"}\n', "for plain text use data.format=text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=[f"{n} {e[:24]}" for n, _, e in FILES])
def test_a_wrong_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for ask in (check_file, lambda path: list(read_file(path, CHAT))):
        with pytest.raises(UserError) as caught:
            ask(path)
        assert expected in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert len(str(caught.value)) - 2 * len(str(tmp_path)) < 420


@pytest.mark.parametrize("content", [ROW + "\n", "\ufeff" + ROW, "\n\n" + ROW, "", "{", "[1, 2]\n"])
def test_a_file_that_may_be_right_passes(tmp_path: Path, content: str) -> None:
    for suffix in (".jsonl", ".json", ".txt", ""):
        (tmp_path / f"x{suffix}").write_text(content)
        if not (content.startswith("[") and suffix == ".json") and content != "{":
            check_file(tmp_path / f"x{suffix}")
    check_file(tmp_path / "missing.jsonl")


Refused = Callable[[Any], str]


def test_marks_that_leave_out_the_end_are_seen(tokenizer: Any) -> None:
    assert study(tokenizer, MARKED).end_is_marked
    assert study(tokenizer, CHATML).end_is_marked
    short = MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% endgeneration %}", "message['content'] }}{% endgeneration %}<|im_end|>"
    )
    assert not study(tokenizer, short).end_is_marked


@pytest.mark.parametrize("key", ["functions", "chat_template_kwargs", "weight", "label"])
def test_keys_beside_the_messages_are_named(key: str) -> None:
    (row,) = read({"messages": [user("a"), assistant("b")], key: 0, "id": None})
    assert row.notes == {f"rows have a key `{key}` beside `messages`, which is not read": 1}


def test_a_system_prompt_in_a_column_of_its_own_is_read() -> None:
    """Before, it was left out."""
    turns = [user("a"), assistant("b")]
    (row,) = read({"messages": turns, "system": "be kind"})
    assert row.messages == [{"role": "system", "content": "be kind"}, *turns]
    (row,) = read({"messages": row.messages, "system": "be rude"})
    assert row.messages[0]["content"] == "be kind", "a conversation's own"
    with pytest.raises(UserError, match="`system` is a number, not a string"):
        read({"messages": turns, "system": 0})


def test_answers_that_hold_nothing_are_counted() -> None:
    (row,) = read({"messages": [user("a"), assistant(" \n"), user("a"), assistant("", weight=0)]})
    assert row.notes == {EMPTY: 1}


@pytest.mark.parametrize("value", [False, 1, [{"from": 0}]])
def test_a_key_without_text_that_the_template_does_not_look_at_is_counted(tokenizer: Any, value: Any) -> None:
    """``training: false``, as another trainer has it, was passed over, and the answer trained on."""
    (row,) = read({"messages": [user("a"), assistant("b", training=value)]})
    coverage = Coverage(study(tokenizer, CHATML))
    check_coverage(coverage, row)
    assert coverage.counts == {"`training` of assistant messages left out by the chat template": 1}
    reads = CHATML.replace("message['content']", "message['content'] ~ (message.training or '')")
    coverage = Coverage(study(tokenizer, reads))
    check_coverage(coverage, row)
    assert bool(coverage.counts) is (value is False)


def test_a_call_without_arguments_has_none(tokenizer: Any) -> None:
    bare = {"type": "function", "function": {"name": "wx", "arguments": None}}
    (found,) = trained(tokenizer, QWEN25, {"messages": [user("w?"), assistant("", tool_calls=[bare])]})
    assert '{"name": "wx", "arguments": {}}' in found


def test_a_call_in_another_shape_is_refused_with_the_right_one(tokenizer: Any) -> None:
    flat = {"name": "wx", "arguments": {"city": "Oslo"}}
    with pytest.raises(UserError, match="as OpenAI's API has them"):
        trained(tokenizer, QWEN25, {"messages": [user("w?"), assistant("", tool_calls=[flat])]})
