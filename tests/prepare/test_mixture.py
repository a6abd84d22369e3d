"""How many rows each source gives to an epoch, and which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.prepare.mixture import Portion, mix

COUNTS = st.lists(st.integers(0, 200), min_size=1, max_size=4)


@given(COUNTS, st.integers(0, 2**32 - 1))
def test_without_wishes_every_row_comes_once(counts: list[int], seed: int) -> None:
    for count, rows in zip(counts, mix(counts, [Portion()] * len(counts), seed), strict=True):
        assert rows.tolist() == list(range(count))


@given(st.integers(0, 200), st.integers(1, 300), st.integers(0, 9))
def test_a_limit_draws_rows_and_a_larger_one_draws_more(count: int, limit: int, seed: int) -> None:
    (few,) = mix([count], [Portion(limit=limit)], seed)
    (more,) = mix([count], [Portion(limit=limit + 10)], seed)
    assert len(few) == min(count, limit)
    assert len(set(few.tolist())) == len(few)
    assert set(few.tolist()) <= set(more.tolist())


@given(st.integers(1, 200), st.floats(0.1, 5), st.integers(0, 9))
def test_repeats_differ_by_one_at_most(count: int, repeats: float, seed: int) -> None:
    (rows,) = mix([count], [Portion(repeats=repeats)], seed)
    times = np.bincount(rows, minlength=count)
    assert times.max() - times.min() <= 1
    assert len(rows) == pytest.approx(count * repeats, abs=0.5 + 1e-9)


@given(COUNTS, st.data())
def test_weights_are_shares_of_rows_and_nothing_is_repeated_for_them(counts: list[int], data: st.DataObject) -> None:
    weights = [data.draw(st.floats(0.05, 10)) for _ in counts]
    taken = [len(rows) for rows in mix(counts, [Portion(weight=weight) for weight in weights], 3)]
    assert all(size <= count for size, count in zip(taken, counts, strict=True))
    there = [(size, count, weight) for size, count, weight in zip(taken, counts, weights, strict=True) if count]
    if there:
        assert any(size == count for size, count, _ in there)  # the scarcest gives all
        scale = min(count / weight for _, count, weight in there)
        assert all(abs(size - scale * weight) <= 0.5 + 1e-6 for size, _, weight in there)


def test_which_rows_is_the_seeds_choice_and_each_source_has_its_own() -> None:
    portions = [Portion(limit=5), Portion(limit=5)]
    one, two = mix([100, 100], portions, 0)
    assert one.tolist() != two.tolist()
    assert mix([100, 100], portions, 0)[0].tolist() == one.tolist()
    assert mix([100, 100], portions, 1)[0].tolist() != one.tolist()


def test_three_to_one() -> None:
    """900 rows of chat at three parts, 1,000 rows of code at one: an epoch of 1,200."""
    chat, code = mix([900, 1000], [Portion(weight=3), Portion(weight=1)], 0)
    assert (len(chat), len(code)) == (900, 300)
    chat, code = mix([900, 1000], [Portion(weight=3, repeats=2), Portion(weight=1)], 0)
    assert (len(chat), len(code)) == (1800, 600)
