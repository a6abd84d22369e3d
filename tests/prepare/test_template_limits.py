"""Chat templates that never end, take all memory or fail in Python: one line within the time limit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fuzz import world

from galley.contract.errors import UserError
from galley.prepare.formats import template
from galley.prepare.tokens import _load
from galley.storage.limits import ends

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
