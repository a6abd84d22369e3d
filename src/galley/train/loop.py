"""The training loop of one rank: steps, evaluations and saves, until the run is done or told to stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from galley.checkpoint import checkpoint, whole
from galley.checkpoint.checkpoint import State
from galley.checkpoint.saving import Pending, Writer
from galley.contract.errors import UserError
from galley.contract.metrics import MetricsRow
from galley.contract.rundir import Attempt, RunDir
from galley.contract.spec import RunSpec
from galley.data import batches
from galley.data.prepared import HELD_OUT, TRAIN, Manifest, open_split
from galley.data.seeding import step_seed
from galley.engine import engine
from galley.model import attention, model
from galley.objective import probes, table
from galley.ranks import heartbeat
from galley.ranks.mesh import mesh
from galley.ranks.progress import Progress
from galley.ranks.stop import Stop
from galley.ranks.world import World
from galley.train import evaluate, metrics
from galley.train.health import Health
from galley.train.profiling import Profiler
from galley.train.schedule import learning_rate, note_longer

EARLY = "early stopping"


@dataclass
class Loop:
    """The training loop of one rank."""

    spec: RunSpec
    run: RunDir
    attempt: Attempt
    world: World
    manifest: Manifest
    engine: Any
    state: State = field(default_factory=State)
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.cadence = self.spec.cadence
        self.train = open_split(self.run, TRAIN)
        self.held_out = open_split(self.run, HELD_OUT) if self.manifest.held_out else None
        self.profiler = Profiler(self.spec.placement.profile, self.attempt, self.world)
        self.stop = Stop(self.attempt, self.world.is_first)
        self.order = batches.order(self.spec.task, len(self.train))
        self.mesh = mesh(self.world)
        self.objective = table.of(self.spec.task)
        self.health = Health(self.spec)
        self.writer = Writer(
            self.run, self.attempt, self.world, self.engine, self.cadence.keep, self.spec.placement.ranks_per_node
        )

    def run_to_end(self) -> tuple[str, str]:
        """Resume, loop, save; returns the verdict and its reason."""
        self._resume()
        self.world.fence(self.attempt)  # the recorder drops rows
        self.recorder = self._recorder()
        if self.state.step < self.order.steps:
            self._say(
                f"step {self.state.step + 1} of {self.order.steps} begins; the first takes longer than the others"
            )
        try:
            reason = self._steps()
        except UserError:  # on every rank at once: what was being saved is whole all the same
            self.writer.finish()
            raise
        self.profiler.close()
        self._save()
        self._finish_save()
        self.progress.at("")
        self.writer.tidy()  # a kill may have come between an earlier save and its pruning
        if self.recorder:
            self.recorder.close()
        stopped = reason not in (None, EARLY)
        return ("stopped" if stopped else "done"), reason or "finished"

    def introduce(self) -> None:
        """Print what is trained, and for how long."""
        learning = sum(getattr(p, "ds_numel", p.numel()) for p in model.trained(self.engine.module).values())
        share = learning / max(self.manifest.model.parameters, 1)
        self._say(
            f"{learning / 1e6:.2f}M trainable parameters ({share:.1%} of the model's), in {self.order.steps} steps of "
            f"{self.order.per_step} samples; {self.manifest.train.samples} samples are an epoch"
        )

    def _resume(self) -> None:
        """Go on from the newest checkpoint that is whole."""
        self.world.fence(self.attempt)  # damaged ones are moved out of the way
        if found := whole.newest(self.run, self.world):
            self.state = checkpoint.load(found, self.engine)
            self._say(f"resuming after step {self.state.step}")
            task = self.spec.task
            if note := note_longer(self.run, task.schedule, task.optimizer.lr, found.step, self.order.steps):
                self._say(note)

    def _recorder(self) -> metrics.Recorder | None:
        task, device = self.spec.task, self.world.device
        self.peak = metrics.peak_flops(device, model.DTYPES[task.model.dtype])
        length = self.train.tokens_total / max(self.manifest.train.documents, 1)
        weights, trains_all = self.manifest.model.parameters, task.method.kind == "full"
        self.flops = metrics.flops_per_token(self.engine.module, weights, trains_all, length)
        if not self.world.is_first:
            return None
        return metrics.Recorder(self.spec, self.run, self.attempt, self.state.step, self.order.steps)

    def _steps(self) -> str | None:
        """Take steps until the run is done (None) or something asks for an end (the reason)."""
        while True:
            last = self.state.step >= self.order.steps
            if self._evaluation_due(last) and (reason := self._evaluate()):
                return reason
            if self._patience_is_over():
                return EARLY
            if last:
                return None
            if self.cadence.save_every and self.state.step % self.cadence.save_every == 0:
                self._save()
            if reason := self._step(self.state.step + 1):
                return reason

    def _evaluation_due(self, last: bool) -> bool:
        every, step = self.cadence.eval_every, self.state.step
        regular = every is not None and step > 0 and step % every == 0
        return self.held_out is not None and self.state.held_out_step != step and (regular or last)

    def _step(self, step: int) -> str | None:
        """One optimizer step over the global batch; returns why it was not taken, if it was not."""
        heartbeat.beat("step", self.state.step)
        self.progress.at(f"step {step}/{self.order.steps}")
        started = time.perf_counter()
        with self.profiler.phase("data"):
            mine = self._batches(step)
        counts = (sum(self.objective.units(each) for each in mine), sum(each.token_count for each in mine))
        supervised, tokens, sight, *news = self.world.sum(*counts, self.stop.look(), *self.writer.news())
        if self.stop.is_due(sight):
            return self._stopping()
        self._saved(self.writer.hear(*news))
        task = self.spec.task
        torch.manual_seed(step_seed(task.seed, step, self.mesh.rank, task.seeding))
        loss = self._forward_backward(mine, supervised, step)
        rate = learning_rate(self.spec.task.schedule, self.spec.task.optimizer.lr, step, self.order.steps)
        engine.set_learning_rate(self.engine, rate)
        with self.profiler.phase("optimizer"):
            norm = engine.step(self.engine)
        if engine.has_skipped(self.engine):
            norm = 0.0
            self._skipped(step)
        else:
            self.health.step(step, loss, norm)
        self._record(step, loss, rate, norm, int(supervised), int(tokens), time.perf_counter() - started)
        self.profiler.stepped()
        return None

    def _skipped(self, step: int) -> None:
        self.state.skipped += 1
        scale = engine.loss_scale(self.engine) or {"cur_scale": 0.0}
        if scale["cur_scale"] <= engine.LEAST_SCALE:
            what = f"the gradients of step {step} are not finite in fp16, whatever the loss is scaled by"
            raise UserError("train", what, self.health.advice)
        self._say(
            f"step {step} changes nothing: its gradients overflow fp16; losses are scaled by {scale['cur_scale']:g} now"
        )

    def _batches(self, step: int) -> list[batches.Batch]:
        """This rank's micro-batches of a step."""
        place, mesh = self.spec.placement, self.mesh
        batch, work = self.order.batch(step), self.train.pairs
        shares = batches.share(batch, work, place.micro_batch, place.accumulation, mesh.rank, mesh.size)
        return [batches.collate(self.train, ids, self.manifest.packed, self.world.device) for ids in shares]

    def _forward_backward(self, mine: list[batches.Batch], supervised: float, step: int) -> float:
        """Mean loss over the global batch. Each loss is scaled so that DeepSpeed's mean over ranks is that mean."""
        sums = []
        for number, batch in enumerate(mine, start=1):
            heartbeat.beat("step", self.state.step)
            self.progress.part(f"micro-batch {number} of {len(mine)}")
            with attention.documents(batch.documents):  # the backward pass may recompute the forward
                with self.profiler.phase("forward"):
                    loss = self.objective.loss(self.engine, batch)
                with self.profiler.phase("backward"):
                    self.engine.set_gradient_accumulation_boundary(number == len(mine))
                    self.engine.backward(loss * (self.mesh.size / supervised), scale_wrt_gas=False)
                    if number < len(mine):
                        self.engine.step()
            sums.append(float(loss.detach()))
        total = self.world.sum(sum(sums))[0]
        if not math.isfinite(total):
            raise self._not_finite(mine, sums, step)
        return total / supervised

    def _not_finite(self, mine: list[batches.Batch], sums: list[float], step: int) -> UserError:
        bad = [i for batch, loss in zip(mine, sums, strict=True) if not math.isfinite(loss) for i in batch.ids]
        everywhere = sorted({i for each in self.world.gather(bad) for i in each if i != batches.NOBODY})
        rows = sorted({int(row) + 1 for i in everywhere for row in self.train.sample(i).sources})
        what = (
            f"the loss of step {step} is not finite in micro-batches of samples {everywhere[:8]}, data rows {rows[:8]}"
        )
        return UserError("train", what, f"look at those rows; {self.health.advice}")

    def _record(
        self, step: int, loss: float, rate: float, norm: float, supervised: int, tokens: int, seconds: float
    ) -> None:
        state = self.state
        state.step, state.tokens, state.supervised = step, state.tokens + tokens, state.supervised + supervised
        state.seconds += seconds
        state.loss_scale = engine.loss_scale(self.engine)
        if self.recorder is None:
            return
        speed = tokens / seconds
        row = MetricsRow(
            epoch=round(self.order.epoch(step), 4),
            loss=loss,
            lr=rate,
            grad_norm=norm,
            supervised_tokens=supervised,
            tokens=tokens,
            tokens_per_s=round(speed, 1),
            mfu=round(speed * self.flops / (self.peak * self.world.size), 4) if self.peak else None,
            peak_memory_gb=round(metrics.peak_memory_gb(self.world.device), 3),
        )
        self.recorder.step(step, seconds, row)

    def _evaluate(self) -> str | None:
        """Measure the held-out loss, and save where it is the best yet; returns why it could not, if a stop came."""
        assert self.held_out is not None
        self.progress.at(f"held-out loss after step {self.state.step}")
        measured = evaluate.held_out_loss(
            self.objective,
            self.engine,
            self.held_out,
            self.manifest.packed,
            self.spec.placement.micro_batch,
            self.world,
            self.mesh,
            self._stop_agreed,
        )
        if measured is None:
            return self._stopping()
        loss, tokens = measured
        self.health.held_out(self.state.step, loss)
        state = self.state
        state.held_out_loss, state.held_out_step = loss, state.step
        better = state.best_loss is None or loss < state.best_loss
        state.bad_evaluations = 0 if better else state.bad_evaluations + 1
        if better:
            state.best_loss = loss
        if self.recorder:
            self.recorder.evaluation(state.step, loss, tokens, better)
        if better:
            self._save()
        return None

    def _patience_is_over(self) -> bool:
        patience = self.spec.task.duration.patience
        return patience is not None and self.state.bad_evaluations >= patience

    def _save(self) -> None:
        """Have the state as it is now saved; training waits for a copy of it, and for the save before to end."""
        step, pending = self.state.step, self.writer.pending
        if step == 0 or (pending and pending.state == self.state):
            return
        heartbeat.beat("save", step)
        self.progress.at(f"saving step {step}")
        self._finish_save()
        if self.writer.stands(step):
            self.writer.amend(self.state)
            return
        started = time.perf_counter()
        split = self.held_out or self.train
        measured = probes.measure(self.objective, self.engine, split, self.world.device)
        self.health.probes(step, measured["logits"])
        self.writer.begin(self.state, measured)
        self._stalled(started, self.writer.pending)

    def _finish_save(self) -> None:
        """Wait for the save that is on its way, if one is."""
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

    def _stop_agreed(self) -> bool:
        heartbeat.beat("evaluate", self.state.step)
        return self.stop.is_due(self.world.sum(self.stop.look())[0])

    def _stopping(self) -> str:
        reason = self.stop.reason()
        self._say(f"stopping after step {self.state.step}: {reason}")
        return reason

    def _say(self, text: str) -> None:
        if self.world.is_first:
            print(text, flush=True)
