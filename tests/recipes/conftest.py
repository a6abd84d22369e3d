"""Every shipped recipe is run: three of them always, all of them with ``GALLEY_RECIPES=all``."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Ranks
from recipes.bench import Bench

FAMILIES = ("llama", "qwen3", "qwen3_moe", "gemma3", "mistral", "phi3", "olmo2", "olmo3", "smollm3")
PRELOAD = (
    *(f"transformers.models.{name}.modeling_{name}" for name in FAMILIES),
    "bitsandbytes", "galley.prepare.prepare", "galley.prepare.arrays", "galley.prepare.fetch",
    "galley.prepare.isolation", "galley.prepare.convert",
    "prepare.conftest",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "recipes: one of all shipped recipes; runs with GALLEY_RECIPES=all")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("recipes")]
    if left_out and os.environ.get("GALLEY_RECIPES") != "all":
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("recipes")]


@pytest.fixture(scope="session")
def _bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("recipes")
    server = Ranks({"HF_HUB_CACHE": str(root / "hub")}, PRELOAD)
    yield Bench(root, server)
    server.close()


@pytest.fixture
def bench(_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The twins' hub is this process's, too, and it is where the data are."""
    monkeypatch.chdir(_bench.root)
    monkeypatch.setenv("HF_HUB_CACHE", str(_bench.hub))
    monkeypatch.setenv("GALLEY_CACHE", str(_bench.root / "cache"))
    return _bench
