"""A run from ``galley submit`` to its exported model."""

import pytest
from slurm.runs import Kitchen, assert_sound


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_nodes_of_two_ranks(kitchen: Kitchen, zero: str) -> None:
    alone = kitchen.losses("tiny", 4, f"deepspeed={zero}")
    made = kitchen.submit("tiny", "cluster.ranks_per_node=2", f"deepspeed={zero}")
    made.wait_over()
    assert made.endings() == [("done", "finished", "")]
    assert_sound(made, alone)
