"""Each recipe takes two steps, saves, is resumed from there to the bit, and is exported: on a twin of its model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from launch.test_shipped_recipes import NAMES, place
from recipes.bench import Bench
from recipes.result import COLUMNS
from recipes.twins import LAYERS

from galley.contract.rundir import RunDir, read_json
from galley_launch.base.options import read
from galley_launch.plan import request
from recipes import bench as benches

pytestmark = pytest.mark.slow

QUICK = ("llama3.2-3b-qlora", "gemma3-270m-full", "qwen3-30b-a3b-lora")
"""Of different kinds: these run with every test."""
NEAR = 0.7
"""How far a loss may be from that of a uniform guess: random weights know nothing, and four steps teach little."""
EVERY = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.recipes]) for name in [*NAMES, "demo"]]


def check_training(run: RunDir, vocabulary: int, attempts: int) -> None:
    """Four steps were recorded, the checkpoints of two and four stand, and no loss is out of the ordinary."""
    rows = benches.story(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4]
    for row in rows:
        loss = row.get("loss", row.get("held_out_loss"))
        assert loss == pytest.approx(math.log(vocabulary), abs=NEAR), row
        assert math.isfinite(row.get("grad_norm", 0.0)), row
    assert [each.step for each in run.checkpoints()] == [2, 4]
    end = read_json(run.attempt(attempts).exit) or {}
    assert (end["verdict"], end["step"], end["steps"]) == ("done", 4, 4)


@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_trains_resumes_and_exports(
    name: str, bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    recipe = request.resolve(name, read([])).recipe
    twin = bench.twin(recipe.model.path)
    ranks = 2 if name != "demo" and place(name)[0] > 1 else 1
    run = bench.start(name, ranks, "prepare", "train")
    manifest = read_json(run.data_manifest) or {}
    assert manifest["packed"] == recipe.data.packing
    vocabulary = manifest["model"]["vocab"]
    check_training(run, vocabulary, attempts=1)
    whole, tensors = benches.story(run), benches.digests(run, 4)
    assert not set(tensors.values()) & set(benches.digests(run, 2).values()), "every step changes what learns"

    benches.lose_all_after(run, 2)
    bench.start(name, ranks, "prepare", "train", "export")
    check_training(run, vocabulary, attempts=2)
    assert "resuming after step 2" in run.attempt(2).log("rank-0").read_text()
    assert benches.story(run) == whole, "a run that was killed has, to the bit, the losses of one that was not"
    assert benches.digests(run, 4) == tensors
    exported = benches.check_export(run, recipe, twin)
    benches.check_sizes(run, recipe, twin, vocabulary)

    losses = " ".join(f"{row['loss']:.4f}" for row in whole if "loss" in row)
    shape = f"{twin['model_type']} {LAYERS} x {twin['hidden_size']}, {vocabulary} tokens"
    values = (name, shape, recipe.method.kind, recipe.deepspeed, ranks, losses, "to the bit", exported)
    for column, value in zip(COLUMNS, values, strict=True):
        record_property(column, value)
    print(f"\n{name}: {losses}", flush=True)
