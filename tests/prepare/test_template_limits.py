"""Chat templates that never end, take all memory or fail in Python: one line within the time limit."""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path

import pytest
from fuzz import world

from galley.contract.errors import UserError
from galley.contract.files import LARGEST_TEMPLATE, read_text
from galley.prepare.formats import rendering, template
from galley.prepare.formats.conversations import Conversation
from galley.prepare.tokens import _load
from galley.storage.limits import ends, within
from galley_launch.recipe import paths

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    ["{{ 9**(9**9) }}", "{{ (8 + messages|length)**(9**9) }}", LOOPS,
     "{{ 'x' * 10**11 }}", "{{ 1/0 }}", "{{ range(10**9) }}",
     "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ ''.__class__.__mro__ }}", "{{ '%10000000000d' % 1 }}",
     "{{ '{:>10000000000}'.format(1) }}", "{{ [[1] * 10**9] * 99 }}"],
)  # fmt: skip
def test_a_template_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(template, "PATIENCE", 1)
    world.model(tmp_path / "model")
    tokenizer = _load(tmp_path / "model", False)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"model\.chat_template: ") as caught:
        template.study(tokenizer, f"{text}{world.TEMPLATE}" if "__" not in text else f"{text}")
    assert time.monotonic() - began < 20
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_sound_template_is_studied_as_before(tmp_path: Path) -> None:
    world.model(tmp_path / "model")
    found = template.study(_load(tmp_path / "model", False), world.TEMPLATE)
    assert found.end_of_turn == "<|im_end|>"


def test_work_that_fails_has_ended() -> None:
    def fail() -> None:
        raise RuntimeError

    assert ends(fail, 5)
    assert not ends(lambda: [0] * 10**12, 5), "no memory"
    assert not ends(lambda: sum(range(10**12)), 1)


@pytest.mark.timeout(60)
def test_a_template_that_ends_for_a_probe_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the data may send it round for ever, where the probe does not."""
    monkeypatch.setattr(rendering, "PATIENCE", 0.5)
    world.model(tmp_path / "model")
    loops = f"{{% if 'again' in messages[0].content %}}{LOOPS}{{% endif %}}{world.TEMPLATE}"
    found = template.study(_load(tmp_path / "model", False), loops)
    answer = {"role": "assistant", "content": "That."}
    for content in ("What?", "What again?"):
        row = Conversation("rows.jsonl:1", [{"role": "user", "content": content}, answer], None)
        if content == "What?":
            assert "That." in rendering.render_conversation(found, row).text
            continue
        began = time.process_time()
        with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template refuses .*: it takes more than"):
            rendering.render_conversation(found, row)
        assert time.process_time() - began < 5


def test_a_limit_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ValueError, match="slow"), within(0.05, ValueError("slow")):
        sum(number for number in itertools.count())
    with within(0.05, ValueError("slow")):
        pass
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert sum(range(3_000_000)), "no alarm is left"


def test_a_template_file_without_end(tmp_path: Path) -> None:
    path = tmp_path / "endless.jinja"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 4 MB"):
        read_text(path, LARGEST_TEMPLATE)
    with pytest.raises(UserError, match=r"model\.chat_template: .* has more than 4 MB, which no template has"):
        paths._template(str(path), paths.Search(tmp_path, {}, False))
