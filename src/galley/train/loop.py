"""The training loop of one rank: steps, evaluations and saves, until the run is done or told to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from galley.checkpoint.checkpoint import State
from galley.checkpoint.pending import Pending
from galley.checkpoint.saving import Writer
from galley.contract.errors import UserError
from galley.contract.spec import RunSpec
from galley.data import batches
from galley.data.batches import Batch, Order
from galley.data.columns import Split
from galley.data.seeding import step_seed
from galley.engine import engine
from galley.model import attention
from galley.objective import probes
from galley.objective.base import Objective
from galley.ranks import heartbeat
from galley.ranks.mesh import Mesh
from galley.ranks.progress import Progress
from galley.ranks.stop import Stop
from galley.ranks.world import World
from galley.train.evaluate import held_out_loss
from galley.train.health import Health
from galley.train.metrics import Recorder, TakenStep
from galley.train.profiling import Profiler
from galley.train.schedule import learning_rate
from galley.train.step_sums import StepSums

EARLY = "early stopping"


@dataclass
class Loop:
    """The training loop of one rank; ``begin.begin`` puts it together. Of its fields only ``state`` is the run's own:
    a checkpoint saves it, and everything else follows from the task and the step.
    """

    # What is trained, on what.
    spec: RunSpec
    world: World
    mesh: Mesh
    engine: Any
    objective: Objective
    order: Order
    packed: bool
    """Whether a sample holds several documents."""
    train_split: Split
    held_out_split: Split | None

    # What watches over it, and what writes.
    stop: Stop
    health: Health
    writer: Writer
    progress: Progress
    profiler: Profiler
    recorder: Recorder | None
    """On the first rank only."""

    # Where it is.
    state: State

    def train(self) -> tuple[str, str]:
        """Take steps until the run is done or told to stop, and save; returns the verdict and its reason."""
        if self.state.step < self.order.steps:
            first, steps = self.state.step + 1, self.order.steps
            self.world.print_once(f"step {first} of {steps} begins; the first takes longer than the others")
        try:
            reason = self._steps()
        except UserError:  # every rank raises it at once, so that a save under way can still become whole
            self.writer.finish()
            raise
        self.profiler.close()
        self._save()
        self._finish_save()
        self.progress.at("")
        self.writer.tidy()  # a kill may have come between an earlier save and its pruning
        if self.recorder:
            self.recorder.close()
        return ("done" if reason in (None, EARLY) else "stopped"), reason or "finished"

    def _steps(self) -> str | None:
        """Take steps until the run is done (None) or something asks for an end (the reason)."""
        while True:
            last = self.state.step >= self.order.steps
            # Measured before it is saved, so that the checkpoint of this step knows its own held-out loss.
            if self._evaluation_due(last) and (reason := self._evaluate()):
                return reason
            if self._patience_is_over():
                return EARLY
            if last:
                return None
            if self._save_due():
                self._save()
            if reason := self._step(self.state.step + 1):
                return reason

    def _step(self, step: int) -> str | None:
        """One optimizer step over the global batch; returns why it was not taken, if it was not."""
        heartbeat.beat("step", self.state.step)
        self.progress.at(f"step {step}/{self.order.steps}")
        started = time.perf_counter()
        with self.profiler.phase("data"):
            micro_batches = self._micro_batches(step)
        # Every rank goes by the same sums, so that none enters a collective which another leaves out.
        sums = self._step_sums(micro_batches)
        if self.stop.is_due(sums.stop):
            return self._stopping()
        self._saved(self.writer.advance(sums.written, sums.failed, sums.published))
        task = self.spec.task
        # Dropout and noise are a function of (seed, step, rank): a resumed run draws the same, with no state saved.
        torch.manual_seed(step_seed(task.seed, step, self.mesh.rank, task.seeding))
        loss = self._forward_backward(step, micro_batches, sums.units)
        rate = learning_rate(task.schedule, task.optimizer.lr, step, self.order.steps)
        engine.set_learning_rate(self.engine, rate)
        with self.profiler.phase("optimizer"):
            norm = self._optimizer_step(step, loss)
        seconds = time.perf_counter() - started
        epoch = self.order.epoch(step)
        self._taken(TakenStep(step, epoch, loss, rate, norm, int(sums.units), int(sums.tokens), seconds))
        self.profiler.stepped()
        return None

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        placement, mesh = self.spec.placement, self.mesh
        samples, work = self.order.batch(step), self.train_split.pairs
        shares = batches.share(samples, work, placement.micro_batch, placement.accumulation, mesh.rank, mesh.size)
        return [batches.collate(self.train_split, ids, self.packed, self.world.device) for ids in shares]

    def _step_sums(self, micro_batches: list[Batch]) -> StepSums:
        """What the ranks agree on before the step, in the one all-reduce that it makes anyway (collective).

        The units must be known before the first backward pass: each rank divides its sum of losses by their number.
        """
        save = self.writer.save_progress()
        return StepSums(
            units=sum(self.objective.units(batch) for batch in micro_batches),
            tokens=sum(batch.token_count for batch in micro_batches),
            stop=self.stop.flag(),
            written=save.written,
            failed=save.failed,
            published=save.published,
        ).over_ranks(self.world)

    def _forward_backward(self, step: int, micro_batches: list[Batch], units: float) -> float:
        """Accumulate the gradient of the mean loss over the global batch's ``units``; returns that loss (collective).

        DeepSpeed averages gradients over the ranks, so each rank's sum of losses is multiplied by their number and
        divided by ``units``: the average is then the gradient of (sum over all ranks) / units, whatever the split into
        ranks, accumulation steps and micro-batches. DeepSpeed's own division by the accumulation steps is turned off
        (``scale_wrt_gas``).
        """
        sums = []
        for number, batch in enumerate(micro_batches, start=1):
            heartbeat.beat("step", self.state.step)
            self.progress.part(f"micro-batch {number} of {len(micro_batches)}")
            with attention.documents(batch.documents):  # the backward pass may recompute the forward
                with self.profiler.phase("forward"):
                    loss = self.objective.loss(self.engine, batch)
                with self.profiler.phase("backward"):
                    self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
                    self.engine.backward(loss * (self.mesh.size / units), scale_wrt_gas=False)
                    if number < len(micro_batches):
                        self.engine.step()  # before the boundary: counts the micro-step, and steps nothing
            sums.append(float(loss.detach()))  # waits for the GPU
        # Summed in float64 on the way to a loss that is the same on every rank, and so is what is concluded from it.
        total = self.world.sum(sum(sums))[0]
        if not math.isfinite(total):
            raise self._not_finite(step, micro_batches, sums)
        return total / units

    def _not_finite(self, step: int, micro_batches: list[Batch], sums: list[float]) -> UserError:
        """Names the samples and the data rows of all micro-batches whose loss is not finite (collective)."""
        pairs = zip(micro_batches, sums, strict=True)
        here = [i for batch, loss in pairs if not math.isfinite(loss) for i in batch.ids]
        samples = sorted({i for of_rank in self.world.gather(here) for i in of_rank if i != batches.NOBODY})
        rows = sorted({int(row) for i in samples for row in self.train_split.sample(i).sources})
        return self.health.loss_is_not_finite(step, samples, rows)

    def _optimizer_step(self, step: int, loss: float) -> float:
        """Step the optimizer; returns the gradient norm before clipping, 0 where fp16 overflowed and nothing changed.

        Raises ``UserError`` on every rank where training has broken down.
        """
        norm = engine.step(self.engine)
        if not engine.has_skipped(self.engine):
            self.health.step(step, loss, norm)
            return norm
        self.state.skipped += 1
        self.world.print_once(self.health.overflow(step, engine.loss_scale(self.engine)))
        return 0.0

    def _taken(self, taken: TakenStep) -> None:
        state = self.state
        state.step = taken.step
        state.tokens += taken.tokens
        state.supervised += taken.supervised
        state.seconds += taken.seconds
        state.loss_scale = engine.loss_scale(self.engine)
        if self.recorder:
            self.recorder.step(taken)

    def _evaluation_due(self, last: bool) -> bool:
        every, step = self.spec.cadence.eval_every, self.state.step
        regular = every is not None and step > 0 and step % every == 0
        return self.held_out_split is not None and self.state.held_out_step != step and (regular or last)

    def _evaluate(self) -> str | None:
        """Measure the held-out loss, and save where it is the best yet; returns why it could not, if a stop came."""
        assert self.held_out_split is not None
        step = self.state.step
        self.progress.at(f"held-out loss after step {step}")
        measured = held_out_loss(
            self.objective,
            self.engine,
            self.held_out_split,
            self.packed,
            self.spec.placement.micro_batch,
            self.world,
            self.mesh,
            self._told_to_stop,
        )
        if measured is None:
            return self._stopping()
        self.health.held_out(step, measured.loss)
        is_best = self.state.evaluated(measured.loss)
        if self.recorder:
            self.recorder.evaluation(step, measured.loss, measured.units, is_best)
        if is_best:
            self._save()
        return None

    def _patience_is_over(self) -> bool:
        patience = self.spec.task.duration.patience
        return patience is not None and self.state.bad_evaluations >= patience

    def _told_to_stop(self) -> bool:
        """Whether somebody asked for a stop; asked between the batches of an evaluation (collective)."""
        heartbeat.beat("evaluate", self.state.step)
        return self.stop.is_due(self.world.sum(self.stop.flag())[0])

    def _stopping(self) -> str:
        reason = self.stop.reason()
        self.world.print_once(f"stopping after step {self.state.step}: {reason}")
        return reason

    def _save_due(self) -> bool:
        every = self.spec.cadence.save_every
        return every is not None and self.state.step % every == 0

    def _save(self) -> None:
        """Have the state as it is now saved; training waits for a copy of it, and for the save before to end."""
        step, pending = self.state.step, self.writer.pending
        if step == 0 or (pending and pending.state == self.state):  # nothing was trained, or it is under way already
            return
        heartbeat.beat("save", step)
        self.progress.at(f"saving step {step}")
        self._finish_save()
        if self.writer.stands(step):  # saved before an evaluation, or by the attempt before
            self.writer.amend(self.state)
            return
        # The weights as they are now, before the copy: what the export is held against must be of this very step.
        started = time.perf_counter()
        split = self.held_out_split or self.train_split
        measured = probes.measure(self.objective, self.engine, split, self.world.device)
        self.health.probes(step, measured["logits"])
        self.writer.begin(self.state, measured)
        self._stalled(started, self.writer.pending)

    def _finish_save(self) -> None:
        """Wait for the save that is under way, if one is."""
        if self.writer.pending is None:
            return
        heartbeat.beat("save", self.state.step)
        started = time.perf_counter()
        finished = self.writer.finish()
        self._stalled(started, finished)
        self._saved(finished)

    def _stalled(self, started: float, save: Pending | None) -> None:
        if self.recorder and save:
            seconds = time.perf_counter() - started
            save.stall += seconds
            self.recorder.stalled(self.state.step, seconds)

    def _saved(self, save: Pending | None) -> None:
        if self.recorder and save:
            self.recorder.saved(self.state.step, save)
