"""Packing and splitting, as properties."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.data.seeding import random_ranks
from galley.prepare.packing import pack, pick_held_out, separate

LENGTHS = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=200))
)


@given(LENGTHS, st.integers(0, 2**31 - 1))
def test_every_document_once_and_no_sample_too_long(case: tuple[int, list[int]], seed: int) -> None:
    capacity, lengths = case
    samples = pack(np.array(lengths), capacity, seed)
    assert sorted(document for sample in samples for document in sample) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in sample) <= capacity for sample in samples)
    assert samples == pack(np.array(lengths), capacity, seed)


@given(LENGTHS)
def test_best_fit_is_never_more_than_half_empty(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    fills = sorted(sum(lengths[document] for document in sample) for sample in pack(np.array(lengths), capacity, 0))
    # Two samples that would fit into one could not both be opened.
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


def docstrings(count: int) -> np.ndarray:
    """Lengths as docstrings have them: mean near 100 tokens, a long tail."""
    draws = np.random.default_rng(0).lognormal(4.4, 0.65, count)
    return np.clip(draws, 12, 512).astype(np.int64)


def test_docstring_like_rows_fill_97_percent() -> None:
    lengths = docstrings(20_000)
    samples = pack(lengths, 512, seed=0)
    assert lengths.sum() / (len(samples) * 512) >= 0.97


def test_many_documents_take_seconds() -> None:
    lengths = docstrings(300_000)
    began = time.perf_counter()
    pack(lengths, 2048, seed=0)
    assert time.perf_counter() - began < 10  # half a second on an idle core


def test_long_documents_are_spread_over_the_epoch() -> None:
    lengths = docstrings(20_000)
    longest = np.array([max(lengths[sample]) for sample in pack(lengths, 512, seed=0)])
    first, second = np.array_split(longest, 2)
    assert abs(first.mean() - second.mean()) < 0.1 * longest.mean()


@given(
    st.integers(1, 500),
    st.floats(0.001, 0.9),
    st.integers(0, 1000),
    st.data(),
)
def test_held_out_has_its_share_and_at_least_one(count: int, share: float, seed: int, data: st.DataObject) -> None:
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    train, held_out = pick_held_out(count, share, seed, kept)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(np.intersect1d(held_out, kept)) == max(1, round(share * len(kept)))


def test_dropping_rows_leaves_most_of_the_split_as_it_was() -> None:
    everything = np.arange(1000)
    _, before = pick_held_out(1000, 0.1, 7, everything)
    _, after = pick_held_out(1000, 0.1, 7, everything[everything % 50 != 3])
    assert len(np.intersect1d(before, after)) >= 95


def test_no_share_holds_nothing_out() -> None:
    train, held_out = pick_held_out(5, 0.0, 0, np.arange(5))
    assert list(train) == [0, 1, 2, 3, 4]
    assert len(held_out) == 0


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_random_ranks_are_a_permutation_and_differ_by_purpose(count: int) -> None:
    one, two = random_ranks(count, 5, 1), random_ranks(count, 5, 2)
    assert sorted(one) == list(range(count))
    assert count < 3 or list(one) != list(two)


def test_the_order_is_the_one_that_it_has_always_been() -> None:
    """A new library version must not reorder the samples of a run that has begun."""
    assert random_ranks(10, 0, 1).tolist() == ORDER
    assert sorted(separate(4, 0)) == [[0], [1], [2], [3]]


ORDER = [8, 3, 7, 9, 1, 2, 6, 0, 5, 4]
