"""``data.learn`` as a list of roles: planted words of these roles are trained on, of no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare.conftest import write_jsonl
from prepare.families import assistant, user
from prepare.oracle import KINDS, TEXTS, judge, stretches_of, templates, tokenizer_for

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data.prepared import read_manifest
from galley.export import card
from galley.export.bases import Base
from galley.prepare.formats.base import Document, Limits
from galley.prepare.formats.chat import CHAT
from galley.prepare.formats.roles import CLOSING
from galley.prepare.formats.template import Template, study
from galley.prepare.prepare import work
from galley_launch import cli

Make = Callable[..., tuple[RunSpec, RunDir]]
ALL = templates()
ROLES = (("user",), ("system",), ("tool",), ("assistant", "tool"), ("system", "tool", "user"))
WORDS = {"user": r"question\d", "system": "systemprompt", "tool": r"result\d"}
ROWS = {kind: KINDS[kind] for kind in ("turns", "system", "call, object", "two calls and more turns", "calls in a row")}
ROWS["call, object"] = {
    **ROWS["call, object"],
    "messages": [KINDS["system"]["messages"][0], *ROWS["call, object"]["messages"]],
}


@pytest.fixture(scope="module")
def broad() -> Any:
    return tokenizer_for(list(ALL.values()))


def encoded(tokenizer: Any, template: Template, record: dict[str, Any], learn: Any) -> list[Document]:
    rows = [CHAT.parse(record, "here:1")]
    (documents,) = CHAT.encode(tokenizer, template, Limits(4096, "drop", learn), rows).documents
    return list(documents)


@pytest.mark.parametrize("name", ALL)
def test_what_these_roles_say_is_trained_on_and_nothing_else(broad: Any, name: str) -> None:
    template = study(broad, ALL[name])
    end = re.escape(template.end_of_turn or "")
    for kind, record in ROWS.items():
        verdict = judge(broad, template, record)
        if verdict.refused:
            continue
        usual = verdict.stretches
        for roles in ROLES:
            (document,) = encoded(broad, template, record, roles)
            stretches = stretches_of(broad, document)
            others = stretches
            if "assistant" in roles:
                trained = "".join(stretches)
                assert all(part in trained for part in usual), (kind, roles)
                others = re.split("|".join(map(re.escape, sorted(usual, key=len, reverse=True))), "\0".join(stretches))
                others = [part for piece in others for part in piece.split("\0") if part]
            wanted = [
                message["content"] for message in record["messages"] if message["role"] in set(roles) - {"assistant"}
            ]
            pattern = "|".join(WORDS[role] for role in roles if role in WORDS)
            for part in others:  # the word itself, and what the template writes from there to the end of the turn
                assert re.fullmatch(rf"\s?(?:{pattern})(?:{CLOSING}{end})?", part), (kind, roles, part)
            missing = len(wanted) - len(others)
            masked_answers = verdict.rendered.masked if "assistant" in roles and verdict.rendered else 0
            assert missing == document.masked - masked_answers, (kind, roles, stretches, document.masked)


@pytest.mark.parametrize("name", ALL)
def test_texts_of_all_kinds_are_trained_on_whole(broad: Any, name: str) -> None:
    template = study(broad, ALL[name])
    end = re.escape(template.end_of_turn or "")
    for kind, text in TEXTS.items():
        (document,) = encoded(broad, template, KINDS[kind], ("user",))
        pattern = rf"\s*{re.escape(text.strip())}\s*(?:{CLOSING}{end})?"
        stretches = stretches_of(broad, document)
        assert [bool(re.fullmatch(pattern, part)) for part in stretches] == [True, True], (kind, stretches)


TALK = [{**user("One?"), "weight": 0}, assistant("First answer"), user("Two?"), assistant("Second")]


def test_arrays_of_a_run(make_run: Make, model_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TALK} for _ in range(4)])
    counts, contents = {}, set()
    for number, learn in enumerate(
        ("assistant", ["assistant"], ["user"], ["user", "assistant"], ["assistant", "user"])
    ):
        spec, run = make_run(model_folder, path, name=str(number), learn=learn)
        work(spec, run, run.attempt(1))
        manifest = read_manifest(run)
        counts[number] = (manifest.train.supervised, manifest.train.turns_muted)
        contents.add(manifest.content)
    assert counts[0] == counts[1]
    assert counts[3] == counts[4]
    assert counts[2][0] + counts[0][0] == counts[3][0]
    assert counts[2][1] == 4, "a weight of 0 counts for whoever is trained on"
    assert len(contents) == 3
    part = card.Part("model", tmp_path, None, "AutoModelForCausalLM", chats=True)
    text = card.render(spec, manifest, run.checkpoint(1), part, Base("", "", ""))
    assert "loss on what messages of these roles say only: assistant, user." in text


def test_words_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "talks.jsonl", [{"messages": TALK}])
    words = ["plan", "smollm2-135m-lora", "data.path=talks.jsonl", "device=cpu", "ranks=1"]
    assert cli.main([*words, "data.learn=[assistant, tool]"]) == 0
    capsys.readouterr()
    for wrong in ("[assistant, robot]", "[]", "robot"):
        assert cli.main([*words, f"data.learn={wrong}"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert "data.learn" in lines[-1]
        assert "Traceback" not in "".join(lines)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "a"}])
    assert cli.main([*words[:2], "data.path=texts.jsonl", *words[3:], "data.format=text", "data.learn=[user]"]) == 2
    assert "data.learn: plain text has no last answer and no roles" in capsys.readouterr().err
