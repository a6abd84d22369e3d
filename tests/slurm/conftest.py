"""Two Slurms. ``slurm`` is a real cluster, brought up once, at rest before each test; its tests are ``slow``.

``fakes`` are stand-ins for the commands, for what a real cluster cannot be brought into.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from slurm.box import Box, end_abandoned, why_not
from slurm.fakes.scenario import Scenario, path_without_slurm
from slurm.result import endings

from galley_launch.job import successor

if TYPE_CHECKING:
    from slurm.runs import Kitchen  # imports torch

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cluster_slow: Slurm's own clocks make it slow; runs with GALLEY_SLURM_SLOW=1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if os.environ.get("GALLEY_SLURM_SLOW") == "1":
        return
    left_out = [item for item in items if item.get_closest_marker("cluster_slow")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("cluster_slow")]


@pytest.fixture(scope="session")
def _box() -> Iterator[Box]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    end_abandoned()
    # not under tmp_path: a socket's path has a hundred characters at most
    box = Box(Path(f"/var/tmp/galley-slurm-{os.getpid()}"), 3)
    box.cluster("down")
    box.up()
    yield box
    box.cluster("down")


@pytest.fixture
def slurm(_box: Box, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """The cluster, with its commands on this process's PATH and no job's variables around."""
    for name in set(os.environ) - set(_box.env):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", _box.env["PATH"])
    yield _box
    _box.reset()


@pytest.fixture(scope="session")
def _kitchen(_box: Box, tmp_path_factory: pytest.TempPathFactory) -> "Kitchen":
    from slurm.runs import make_kitchen

    return make_kitchen(tmp_path_factory.mktemp("kitchen"), _box)


@pytest.fixture
def kitchen(slurm: Box, _kitchen: "Kitchen", request: pytest.FixtureRequest) -> Iterator["Kitchen"]:
    """A small model, its data and recipes, to be submitted to the cluster. Reports say how the attempts ended."""
    _kitchen.made.clear()
    yield _kitchen
    if _kitchen.made:
        request.node.user_properties.append(("attempts", endings(_kitchen.made[-1].endings())))


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """Fake commands on this process's PATH, which has no other Slurm on it."""
    scenario = Scenario(tmp_path / "fakes")
    monkeypatch.setenv("PATH", f"{scenario.bin}:{path_without_slurm(tmp_path / 'bin')}")
    # Minutes of patience with a controller that is away, in a test's time.
    for name, seconds in (("FIRST_S", 0.05), ("LONGEST_S", 0.2), ("BEGIN_S", 1.5), ("END_S", 2.0)):
        monkeypatch.setattr(successor, name, seconds)
    return scenario
