"""What the first rank says while nothing else is printed."""

import time

from galley.ranks.progress import Progress


def spoken(seconds: float, *things: str, shows: bool = True, parts: tuple[str, ...] = ()) -> list[str]:
    """Lines that come while each of ``things`` goes on for ``seconds``."""
    said: list[str] = []
    progress = Progress(shows, said.append, first_s=0.1, every_s=0.2)
    for thing in things:
        progress.at(thing)
        for part in parts:
            progress.part(part)
        time.sleep(seconds)
    progress.at("")
    time.sleep(0.3)
    return said


def test_a_long_step_is_told_again_and_again() -> None:
    said = spoken(0.55, "step 3/48", parts=("micro-batch 1 of 4", "micro-batch 2 of 4"))
    assert 2 <= len(said) <= 3
    assert said[0] == "step 3/48: micro-batch 2 of 4, 0 s so far"


def test_short_steps_are_not() -> None:
    assert spoken(0.03, *(f"step {number}/48" for number in range(10))) == []


def test_each_thing_has_its_own_clock_and_parts() -> None:
    said = spoken(0.16, "step 1/2", "held-out loss after step 1", parts=("micro-batch 1 of 1",))
    assert [line.partition(":")[0] for line in said] == ["step 1/2", "held-out loss after step 1"]
    assert spoken(0.16, "loading") == ["loading: 0 s so far"]


def test_other_ranks_are_silent() -> None:
    assert spoken(0.3, "step 1/2", shows=False) == []
