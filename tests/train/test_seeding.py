"""The order of samples and the seeds of steps are values that no version of numpy or Python may change."""

import pytest

from galley.data.seeding import sample_order, step_seed

ORDERS = {
    1: ([8, 0, 7, 1, 3, 6, 2, 4, 5, 9], [9, 0, 8, 6, 7, 1, 3, 4, 2, 5]),
    2: ([6, 9, 0, 5, 1, 4, 2, 3, 8, 7], [3, 8, 1, 0, 5, 2, 9, 6, 7, 4]),
}
SEEDS = {
    1: [8411785136187993296, 5696053855435215913, 9038561751297605540],
    2: [4037586493124842486, 7287448728769600323, 4675650709882518766],
}


@pytest.mark.parametrize("version", [1, 2])
def test_the_order_of_samples_stays(version: int) -> None:
    assert tuple(sample_order(7, epoch, 10, version).tolist() for epoch in (0, 1)) == ORDERS[version]


@pytest.mark.parametrize("version", [1, 2])
def test_the_seeds_of_steps_stay(version: int) -> None:
    assert [step_seed(7, step, rank, version) for step, rank in ((1, 0), (1, 1), (2, 0))] == SEEDS[version]


@pytest.mark.parametrize("version", [1, 2])
def test_no_two_ranks_or_steps_share_a_seed(version: int) -> None:
    seeds = {step_seed(0, step, rank, version) for step in range(200) for rank in range(64)}
    assert len(seeds) == 200 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
