"""An independent judge of what is trained on: words planted in every message, looked for among the labelled tokens."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from prepare.conftest import train_tokenizer

from galley.data.columns import IGNORED
from galley.prepare.formats.base import Document
from galley.prepare.formats.conversations import parse
from galley.prepare.formats.coverage import Coverage, check_coverage
from galley.prepare.formats.rendering import Rendered, render_conversation, tokenize
from galley.prepare.formats.template import Template

ROOT = Path(__file__).resolve().parents[2]
# Anything that looks like a control token is one, as in the tokenizers that these templates belong to.
CONTROL = re.compile(r"<[|｜]?[A-Za-z0-9_/▁.-]+[|｜]?>|\[/?[A-Z_]{3,}\]|<\|\"\|>")
MORE = ["<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|tool|>", "<s>", "</s>", "<|endoftext|>"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "toolname",
            "description": "tooldescription",
            "parameters": {"type": "object", "properties": {"toolproperty": {"type": "string", "description": "d"}}},
        },
    }
]


def templates() -> dict[str, str]:
    """Name to text: those of the trl package, and Galley's own."""
    found = importlib.util.find_spec("trl")
    assert found is not None, "trl brings the chat templates that this is tried on: pip install -e '.[dev]'"
    assert found.origin is not None
    paths = sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja"))
    own = [ROOT / "src/galley/prepare/templates/chatml.jinja", ROOT / "recipes/templates/llama3.jinja"]
    return {path.stem: path.read_text() for path in paths} | {f"galley-{path.stem}": path.read_text() for path in own}


def tokenizer_for(texts: list[str]) -> Any:
    """A byte-level BPE in which whatever looks like a control token in ``texts`` is one."""
    tokens = {token for text in texts for token in CONTROL.findall(text)}
    return train_tokenizer(sorted({*tokens, *MORE}), bos_token="<s>", eos_token="</s>")


def call(arguments: Any, number: int = 1) -> dict[str, Any]:
    function = {"name": f"callname{number}", "arguments": arguments}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def result(number: int = 1) -> dict[str, Any]:
    return {
        "role": "tool",
        "name": f"callname{number}",
        "tool_call_id": f"abcdefgh{number}",
        "content": f"result{number}",
    }


def user(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"question{number}"}


def answer(number: int, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"answer{number}", **more}


def arguments(number: int = 1) -> dict[str, Any]:
    return {f"argkey{number}": f"argvalue{number}"}


OBJECT, STRING = arguments(), json.dumps(arguments())
CALLED = [user(1), {"role": "assistant", "content": "", "tool_calls": [call(OBJECT)]}, result(), answer(2)]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user(1), answer(1)]},
    "system": {"messages": [{"role": "system", "content": "systemprompt"}, user(1), answer(1)]},
    "turns": {"messages": [user(1), answer(1), user(2), answer(2), user(3), answer(3)]},
    "tools unused": {"messages": [user(1), answer(1)], "tools": TOOLS},
    "call, object": {"messages": CALLED, "tools": TOOLS},
    "call, string": {
        "messages": [user(1), {"role": "assistant", "content": "", "tool_calls": [call(STRING)]}, result(), answer(2)],
        "tools": TOOLS,
    },
    "call, no tools": {"messages": CALLED},
    "call last": {"messages": CALLED[:2], "tools": TOOLS},
    "call and content": {
        "messages": [user(1), answer(1, tool_calls=[call(OBJECT)]), result(), answer(2)],
        "tools": TOOLS,
    },
    "two calls": {
        "messages": [
            user(1),
            {"role": "assistant", "content": "", "tool_calls": [call(OBJECT), call(arguments(2), 2)]},
            result(),
            result(2),
            answer(2),
        ],
        "tools": TOOLS,
    },
    "calls in a row": {
        "messages": [
            *CALLED[:3],
            {"role": "assistant", "content": "", "tool_calls": [call(arguments(2), 2)]},
            result(2),
            answer(3),
            user(2),
            answer(4),
        ],
        "tools": TOOLS,
    },
    "thinking": {"messages": [user(1), answer(1, reasoning_content="reason1")]},
    "thinking in content": {
        "messages": [user(1), {"role": "assistant", "content": "<think>\nreason1\n</think>\n\nanswer1"}]
    },
    "thinking and call": {
        "messages": [
            user(1),
            {**CALLED[1], "reasoning_content": "reason1"},
            result(),
            answer(2, reasoning_content="reason2"),
        ],
        "tools": TOOLS,
    },
}
# What text may hold, where a trimmed, escaped or split character would show; said by the user and the assistant.
CODE = '\tdef f(x):\n\t\treturn {\'a\': x[0], "b": f"{{x}}"}  # 1 < 2 && a > b\n\n```sh\necho "$HOME" \\\\ | cat\n```'
TEXTS = {
    "leading spaces": "   \n indented\n    more",
    "trailing spaces": "trailing  \n",
    "emoji": "👩🏽‍💻 family 👨‍👩‍👧‍👦 flag 🇺🇳 e\u0301 ﬁn 😀",
    "code": CODE,
    "markup": "{{ messages }} {% raw %} <b>bold</b> &amp; [/x] %s {0} \\n",
    "right to left": "مرحبا، كيف حالك؟ שלום \u202eabc\u202c 123",
    "scripts": "漢字かな 한국어 ไทย हिन्दी ελ",
    "quotes": '\'single\' "double" \\"escaped\\" \\u0041',
}
NESTED = {
    "argkey1": {
        "deep": [{"argvalue1": [1, 2.5, None, True]}, [], {}],
        "text": "línea\n\"q\" 'x' 😀 مرحبا </tool_call> {{x}}",
    },
    "empty": "",
    "number": -1e-7,
    "flag": False,
}


def repeated(text: str) -> dict[str, Any]:
    """Two questions and answers that hold ``text``."""
    return {"messages": [{"role": role, "content": text} for role in ("user", "assistant") * 2]}


KINDS |= {kind: repeated(text) for kind, text in TEXTS.items()} | {
    "empty question": {"messages": [{"role": "user", "content": ""}, answer(1), user(2), answer(2)]},
    "empty answer": {"messages": [user(1), {"role": "assistant", "content": ""}, user(2), answer(2)]},
    "empty last answer": {"messages": [user(1), answer(1), user(2), {"role": "assistant", "content": ""}]},
    "call, nested arguments": {
        "messages": [user(1), {**CALLED[1], "tool_calls": [call(NESTED)]}, *CALLED[2:]],
        "tools": TOOLS,
    },
    "call, no arguments": {
        "messages": [user(1), {**CALLED[1], "tool_calls": [call({})]}, *CALLED[2:]],
        "tools": TOOLS,
    },
    "two calls and more turns": {
        "messages": [
            {"role": "system", "content": "systemprompt"},
            user(1),
            {**CALLED[1], "tool_calls": [call(OBJECT), call(arguments(2), 2)]},
            result(),
            result(2),
            answer(2),
            user(3),
            answer(3),
        ],
        "tools": TOOLS,
    },
    "thinking in every turn": {
        "messages": [message for n in (1, 2, 3) for message in (user(n), answer(n, reasoning_content=f"reason{n}"))]
    },
    "thinking in some turns": {
        "messages": [
            user(1),
            answer(1, reasoning_content="reason1"),
            user(2),
            answer(2),
            user(3),
            {"role": "assistant", "content": "<think>\nreason3\n</think>\n\nanswer3"},
        ]
    },
}
HUNDRED = {"messages": [message for n in range(10, 60) for message in (user(n), answer(n))]}
TAUGHT = re.compile(r"(?:answer|reason|argkey|argvalue|callname)\d")
GIVEN = re.compile(r"(?:question|result)\d|systemprompt|tool(?:name|description|property)")


@dataclass
class Verdict:
    """What was found in one conversation."""

    text: str = ""
    trained: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    rendered: Rendered | None = None
    refused: str | None = None
    faults: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Words of the assistant's that the template does not write."""
    stretches: list[str] = field(default_factory=list)
    """What is trained on, decoded: neighbouring tokens as one."""


def judge(tokenizer: Any, template: Template, record: dict[str, Any]) -> Verdict:
    """Render, tokenise and look for the planted words. A refusal is passed on as text."""
    from galley.contract.errors import UserError

    try:
        row = parse(copy.deepcopy(record), "here, row 0")
        coverage = Coverage(template)
        check_coverage(coverage, row)
        rendered = render_conversation(template, row)
    except UserError as error:
        return Verdict(refused=str(error))
    (document,) = tokenize(tokenizer, [rendered])
    taught = document.labels != IGNORED
    text, pieces = rendered.text, tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False)
    trained = "".join(text[slice(*pieces.offsets[n])] if on else "\0" for n, on in enumerate(taught))
    verdict = Verdict(text, re.sub("\0+", "\0", trained), dict(coverage.counts), rendered)
    verdict.stretches = stretches_of(tokenizer, document)
    verdict.absent = sorted({w for w in TAUGHT.findall(json.dumps(record)) if w not in text})
    verdict.faults = list(_faults(text, verdict.trained, pieces, taught, record, rendered.masked))
    return verdict


def stretches_of(tokenizer: Any, document: Document) -> list[str]:
    """What is trained on, decoded: neighbouring tokens as one."""
    edges = np.diff((document.labels != IGNORED).astype(int), prepend=0, append=0)
    return [tokenizer.decode(document.tokens[start:end]) for start, end in np.flatnonzero(edges).reshape(-1, 2)]


def _faults(text: str, trained: str, pieces: Any, taught: Any, record: Any, masked: int) -> Iterator[str]:
    yield from (f"{word} is trained on" for word in sorted(set(GIVEN.findall(trained))))
    words = [re.search(r"answer\d+$", m["content"]) for m in record["messages"] if m["role"] == "assistant"]
    answers = [match[0] for match in words if match]
    missing = [word for word in dict.fromkeys(answers) if word in text and word not in trained]
    if len(missing) > masked:
        yield f"{', '.join(missing)} not trained on, {masked} masked"
    for word in answers:
        if word not in text or word not in trained:
            continue
        at = text.rindex(word)
        first = next(n for n, (start, end) in enumerate(pieces.offsets) if start <= at < end)
        if not taught[first]:
            yield f"first token of {word} not trained on"
    if words[-1]:
        yield from _ends(text, pieces, taught, [word for word in answers if word in text and word in trained])


def _ends(text: str, pieces: Any, taught: Any, answers: list[str]) -> Iterator[str]:
    """Control tokens right after an answer that are the ones after the last answer must be trained on, all of them."""
    runs = {word: _run_after(text, pieces, text.rindex(word) + len(word)) for word in answers}
    shown = {word: [text[slice(*pieces.offsets[n])] for n in run] for word, run in runs.items()}
    last = shown[answers[-1]] if answers and text.rindex(answers[-1]) + 80 > len(text) else None
    for word, run in runs.items():
        same = [n for n, piece, wanted in zip(run, shown[word], last or [], strict=False) if piece == wanted]
        if any(not taught[n] for n in same):
            yield f"end {shown[word]} after {word} not trained on"


def _run_after(text: str, pieces: Any, spot: int) -> list[int]:
    """Tokens from character ``spot`` on, as long as they are control tokens that follow one another."""
    run = []
    for n, (start, end) in enumerate(pieces.offsets):
        if start >= spot:
            if not CONTROL.fullmatch(text[start:end]) or (run and pieces.offsets[run[-1]][1] != start):
                break
            run.append(n)
    return run


def double_encoded(text: str) -> bool:
    """Whether arguments stand in the text as a JSON string in JSON, or as Python writes a dictionary."""
    return '\\"argkey' in text or "'argkey1': " in text
