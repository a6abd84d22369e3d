"""Everything that the training loop needs, put together where the newest checkpoint left off."""

from __future__ import annotations

from typing import Any

from galley.checkpoint import checkpoint, whole
from galley.checkpoint.checkpoint import State
from galley.checkpoint.saving import Writer
from galley.contract.rundir import Attempt, RunDir
from galley.contract.spec import RunSpec
from galley.data import batches
from galley.data.columns import Split
from galley.data.prepared import HELD_OUT, TRAIN, Manifest, open_split
from galley.model import model
from galley.objective import table
from galley.ranks.mesh import mesh
from galley.ranks.progress import Progress
from galley.ranks.stop import Stop
from galley.ranks.world import World
from galley.train import metrics
from galley.train.health import Health
from galley.train.loop import Loop
from galley.train.profiling import Profiler
from galley.train.schedule import note_longer


def begin(
    spec: RunSpec, run: RunDir, attempt: Attempt, world: World, manifest: Manifest, engine: Any, progress: Progress
) -> Loop:
    """The loop of one rank, with the state of the newest checkpoint that is whole (collective).

    Raises ``Superseded`` on every rank where a later attempt has begun, and ``UserError`` where checkpoints were
    written and none is whole.
    """
    train_split = open_split(run, TRAIN)
    order = batches.order(spec.task, len(train_split))
    placement = spec.placement
    _introduce(world, manifest, engine, order)
    state = _resume(spec, run, attempt, world, engine, order.steps)
    world.fence(attempt)  # a recorder drops the rows after the checkpoint, which a later attempt may have written
    utilisation, recorder = _utilisation(spec, manifest, world, engine, train_split), None
    if world.is_first:
        recorder = metrics.Recorder(spec, run, attempt, utilisation, world.device, state.step, order.steps)
    return Loop(
        spec=spec,
        world=world,
        mesh=mesh(world),
        engine=engine,
        objective=table.of(spec.task),
        order=order,
        packed=manifest.packed,
        train_split=train_split,
        held_out_split=open_split(run, HELD_OUT) if manifest.held_out else None,
        stop=Stop(attempt, reads=world.is_first),
        health=Health(spec, manifest.train.shares),
        writer=Writer(run, attempt, world, engine, spec.cadence.keep, placement.ranks_per_node),
        progress=progress,
        profiler=Profiler(placement.profile, attempt, world),
        recorder=recorder,
        state=state,
    )


def _introduce(world: World, manifest: Manifest, engine: Any, order: batches.Order) -> None:
    """Print what is trained, and for how long."""
    # Under ZeRO-3 a parameter is empty outside its layer's forward pass; DeepSpeed keeps its size in ds_numel.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.trained(engine.module).values())
    share = parameters / max(manifest.model.parameters, 1)
    world.print_once(
        f"{parameters / 1e6:.2f}M trainable parameters ({share:.1%} of the model's), in {order.steps} steps of "
        f"{order.per_step} samples; {manifest.train.samples} samples are an epoch"
    )


def _resume(spec: RunSpec, run: RunDir, attempt: Attempt, world: World, engine: Any, steps: int) -> State:
    """Load the newest checkpoint that is whole into ``engine``; returns its state, or a fresh one."""
    world.fence(attempt)  # damaged checkpoints are moved out of the way
    newest = whole.newest(run, world)
    if newest is None:
        return State()
    state = checkpoint.load(newest, engine)
    world.print_once(f"resuming after step {state.step}")
    if note := note_longer(run, spec.task.schedule, spec.task.optimizer.lr, newest.step, steps):
        world.print_once(note)
    return state


def _utilisation(
    spec: RunSpec, manifest: Manifest, world: World, engine: Any, train_split: Split
) -> metrics.Utilisation:
    task, weights = spec.task, manifest.model.parameters
    document = train_split.tokens_total / max(manifest.train.documents, 1)  # mean length: attention stays inside
    return metrics.Utilisation(
        # Measured on every rank at once: on a CPU they share its cores, as they will in training.
        peak_flops=metrics.peak_flops(world.device, model.DTYPES[task.model.dtype]),
        flops_per_token=metrics.flops_per_token(engine.module, weights, task.method.kind == "full", document),
        ranks=world.size,
    )
