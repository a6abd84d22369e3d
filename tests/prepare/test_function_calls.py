"""Function-calling tasks of a public benchmark, through the chat templates that know tools: no wrong mask.

``make test`` takes a sample, ``make test-calls`` all, and writes its dated result.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepare import function_calls, turns
from prepare.oracle import KINDS, Verdict, judge, stretches_of, templates, tokenizer_for

from galley.contract.errors import UserError
from galley.prepare.formats.conversations import parse
from galley.prepare.formats.coverage import Coverage, check_coverage
from galley.prepare.formats.rendering import render_conversation, tokenize
from galley.prepare.formats.template import Template, study

DATA = function_calls.folder()
RESULT = os.environ.get("GALLEY_CALLS_RESULT")
SAMPLE = 16
ALL = templates()
PLAIN = re.compile(r"[A-Za-z0-9 ,.:/-]+")
pytestmark = pytest.mark.skipif(DATA is None, reason="needs the package bfcl-eval, which `make test` installs")


@pytest.fixture(scope="module")
def tasks() -> list[dict[str, Any]]:
    assert DATA is not None
    every = function_calls.tasks(DATA)
    assert len(every) == 2501
    return every if RESULT else random.Random(7).sample(every, SAMPLE)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_for(list(ALL.values()))


@pytest.fixture(scope="module")
def counts() -> Iterator[dict[str, Counter[str]]]:
    """What became of the tasks, by template; written where ``GALLEY_CALLS_RESULT`` says."""
    table: dict[str, Counter[str]] = {}
    yield table
    if RESULT:
        Path(RESULT).write_text(page(table), encoding="utf-8")


@pytest.mark.parametrize("name", ALL)
def test_no_mask_of_a_task_is_wrong(tokenizer: Any, tasks: list[dict[str, Any]], counts: Any, name: str) -> None:
    template = study(tokenizer, ALL[name])
    if judge(tokenizer, template, KINDS["call, object"]).refused:
        return  # it writes no tool calls, and such rows are refused
    coverage, count = Coverage(template), counts.setdefault(name, Counter())
    for task in tasks:
        verdict = verdict_of(tokenizer, coverage, task)
        if verdict.refused:
            assert "the chat template " in verdict.refused
            count["refused"] += 1
            continue
        assert faults(template, name, task, verdict) == [], task["id"]
        assert verdict.rendered is not None
        count["masked"] += verdict.rendered.masked
        count["judged"] += 1
        count["turns"] += 2
    assert count["judged"] or name == "gptoss"


def verdict_of(tokenizer: Any, coverage: Coverage, task: dict[str, Any]) -> Verdict:
    """Render and tokenise as preparing does."""
    try:
        row = parse({"messages": task["messages"], "tools": task["tools"]}, task["id"])
        check_coverage(coverage, row)
        rendered = render_conversation(coverage.template, row)
    except UserError as error:
        return Verdict(refused=str(error))
    (document,) = tokenize(tokenizer, [rendered])
    return Verdict(rendered.text, rendered=rendered, stretches=stretches_of(tokenizer, document))


def faults(template: Template, name: str, task: dict[str, Any], verdict: Verdict) -> list[str]:
    """What is wrong with a mask: by the table of headers and ends, and by the names and words that were called."""
    assert verdict.rendered is not None
    wrong = turns.faults(name, verdict.text, verdict.stretches, verdict.rendered.masked, template.marked)
    trained = "".join(verdict.stretches)
    calls = [call["function"] for message in task["messages"] for call in message.get("tool_calls", ())]
    if not verdict.rendered.masked:
        words = [word for call in calls for word in [call["name"], *texts(call["arguments"])]]
        wrong += [f"{word!r} is not trained on" for word in words if PLAIN.fullmatch(word) and word not in trained]
    results = [f"result{number}" for number in range(len(calls))]
    return wrong + [f"{word} is trained on" for word in results if word in trained]


def texts(value: Any) -> Iterator[str]:
    """Every string in the arguments of a call."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(item)


def page(table: dict[str, Counter[str]]) -> str:
    """The counts as a page."""
    names = ("trl", "transformers", "tokenizers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    total = sum(table.values(), Counter[str]())
    rows = [
        f"| {name} | {count['judged']:,} | {count['turns']:,} | {count['masked']:,} | {count['refused']:,} |"
        for name, count in table.items()
    ]
    intro = (
        f"The 2,501 tasks with possible answers of bfcl-eval 2026.3.23 ({versions}), each as question, call, results"
        f" and answer, through the {len(table)} chat templates that write tool calls: {total['judged']:,} conversations"
        f" and {total['turns']:,} of their turns judged, no wrong mask. *Masked*: turns that are not trained on,"
        " and counted. *Refused*: by the template (several calls at once), in one line. `make test-calls` wrote this."
    )
    head = "| template | conversations | turns | masked | refused |\n|---|---|---|---|---|"
    return "\n".join(["# Function calls: masks", "", intro, "", head, *rows, ""])
