"""The training loop: one step, many times, on one device or many; resumable.

It knows no store and no objective: a `Task` has the model, the loss and the validation, a
`Schedule` says how long and how fast. Pretraining and fine-tuning differ in these alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from milan.core import rng
from milan.core.device import (
    Idle,
    Sender,
    Sent,
    autocast,
    copy_to_host,
    device_name,
    manual_seed,
    reached,
)
from milan.core.distributed import SINGLE, Ranks, sync_gradients
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.errors import TrainError
from milan.reporting.log import RunLog
from milan.training import checkpoint
from milan.training.joint import JointStep
from milan.training.optim import Schedule, gradient_norm

_Gradients = tuple[list[torch.Tensor], list[Any], dict[str, torch.Tensor]]
"""Of a step: each micro-batch's share in the loss, the batches on the host, parts of the loss."""
_STOP, _SAVE, _NONFINITE, _UNSAVED = 1, 2, 4, 8
_YOUNG = 120.0  # seconds: an epoch that ends so soon after a checkpoint needs none
_OLD = 900.0  # seconds after which there is a checkpoint in the middle of an epoch
_COST = 100  # times what the last one took: no checkpoint earlier, or they take more than 1 %
_SPEED = 1.0  # seconds of steps that show how fast the device is
_MOST_SKIPPED = 10  # steps in a row without a finite loss: the run has diverged


class Task(Protocol):
    """What is trained, by which loss, and how it is validated."""

    @property
    def model(self) -> nn.Module:
        """Whose weights are trained and saved."""

    @property
    def network(self) -> nn.Module:
        """What `loss` calls: the model, or its wrapper for several ranks."""

    def to_device(self, batch: Any) -> Any:
        """A micro-batch, a tuple of tensors, where `loss` wants it; a GPU's copy may not wait."""

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a micro-batch, a mean over its images; called under autocast."""

    def describe(self, batch: Any) -> list[str]:
        """A name for each image of a micro-batch on the host, to tell which ones broke a step."""

    def validate(
        self, epoch: int, batches: Iterator[Any]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics, and pictures by name, after an epoch; takes its own of the `batches`.

        They are where `loss` wants them.
        """


@dataclass(frozen=True)
class Context:
    """Where a loop runs, and who follows and stops it."""

    run: Path
    """The run's folder."""
    device: torch.device
    ranks: Ranks = SINGLE
    progress: Progress = field(default_factory=NoProgress)
    stop: Stop = field(default_factory=Stop)
    open_log: Callable[[int], RunLog] | None = None
    """Opens the log at a step, and cuts what it says of later ones. Called on rank 0, once the
    checkpoint is loaded."""
    on_speed: Callable[[float, float], dict[str, Any]] | None = None
    """Called once, after the first steps: with the images/s that this rank's device takes where it
    need not wait, and the share of time in which it waited. Returns more figures of the run."""


def fit(
    task: Task,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    context: Context,
    *,
    batches_from: Callable[[int], Iterable[Any]],
    resume_from: int | None = None,
    stop_after: int | None = None,
    joint: JointStep | None = None,
) -> dict[str, Any]:
    """Train from the checkpoint of step `resume_from`, or from the start, to the end.

    `batches_from(step)` gives this rank's micro-batches from a step on, and after the last step of
    an epoch those of `task.validate`. Every draw is addressed, so a resumed run is the
    uninterrupted one. Asked to stop, or after `stop_after` steps of this call, it ends with a
    checkpoint. Returns figures of this call; rates leave out the start of the loader, and are
    missing if no step was taken. `joint` takes the gradients of a step where all its images are
    compared, in place of `task.loss`. Raises TrainError on a loss that is not finite.
    """
    loop = _Loop(task, optimiser, schedule, context, joint)
    start = done = loop.resume(resume_from)
    last = schedule.steps if stop_after is None else min(schedule.steps, start + stop_after)
    requests = loop.requests() if start < last else 0
    if start >= last or requests & _STOP:
        return loop.summary(start, {"seconds": 0.0})
    if context.open_log and context.ranks.is_rank0:
        loop.run_log = context.open_log(start)
    context.progress.begin("train", schedule.steps, "steps", done=start)
    loop.feed = feed = _Feed(batches_from(start), task, context.device, loop.heartbeat)
    loop.logged = (time.perf_counter(), 0.0, start)
    task.network.train()
    with closing(loop), closing(feed):
        for step in range(start, last):
            loop.step(step)
            loop.done = done = step + 1
            epoch_over = schedule.data.position(done)[1] == 0
            requests = loop.requests(epoch_over)
            loop.tell_speed(done, last)
            logging = epoch_over or done == last or done % schedule.log_every == 0
            by_step = schedule.save_every and done % schedule.save_every == 0
            saving = requests or done == last or by_step
            if logging or saving:
                loop.settle()
            if epoch_over:
                loop.validate(schedule.data.position(step)[0])
                requests |= loop.requests()  # it may take long
                saving = saving or requests
            if logging:
                loop.log(done)
            else:
                context.progress.advance(done)
            if saving:
                loop.save(done)
            if requests & _STOP:
                break
        loop.written()
        context.progress.end()
        seconds = time.perf_counter() - feed.began
    if loop.run_log:
        loop.run_log.close()
    trained = max(seconds - feed.startup - loop.validating, 1e-9)
    images = (done - start) * schedule.data.batch_size
    return loop.summary(
        done,
        {
            "seconds": round(seconds, 2),
            "startup_seconds": round(feed.startup, 2),
            "images_per_second": round(images / trained, 2),
            "wait_share": round(feed.idle.seconds / trained, 4),
            "checkpoint_share": round(loop.saving / max(seconds, 1e-9), 4),
            "device": device_name(context.device, context.ranks.size),
        }
        | loop.speed_figures,
    )


class _Feed:
    """Batches as they come, on their device, and for how long it waited for them.

    `heartbeat` is called at each.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        task: Task,
        device: torch.device,
        heartbeat: Callable[[], None],
    ) -> None:
        self.began, self.heartbeat = time.perf_counter(), heartbeat
        self.idle = Idle(device)
        self._batches = iter(batches)
        self._move, self._sender = task.to_device, Sender(device)
        # The first batch waits for the loader's processes to start: no data-loading time.
        self._next: Sent | Exception | None = self._sent()
        self.startup = time.perf_counter() - self.began

    def _sent(self) -> Sent:
        return self._sender.send(next(self._batches), self._move)

    def prefetch(self) -> None:
        """Begin to copy the next batch, where that does not wait: once a step's work is queued.

        What goes wrong with it is raised when its turn comes.
        """
        if self._next is None and self._sender.stream:
            try:
                with self.idle.measured():
                    self._next = self._sent()
            except Exception as error:  # the end of all batches too
                self._next = error

    def take(self) -> tuple[Any, Any]:
        """The next batch: as it came, and on the device."""
        self.heartbeat()
        sent, self._next = self._next or self._sent(), None
        if isinstance(sent, Exception):
            raise sent
        return sent.batch, self._sender.receive(sent)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next batch on the device: one of a validation."""
        return self.take()[1]

    def close(self) -> None:
        """Let the loader end its processes."""
        if isinstance(self._batches, Generator):
            self._batches.close()


class _StepResult(NamedTuple):
    """A step that was taken; its loss and gradient norm are known once the device is done."""

    step: int
    batches: list[Any]
    """As they were on the host."""
    values: torch.Tensor
    """[micro-batches + 1 + parts] on the CPU: each one's share in the step's loss, the gradient
    norm, and the parts of the loss."""
    ready: torch.cuda.Event | None
    """When `values` have arrived; None: they have."""
    names: tuple[str, ...] = ()
    """Of the parts of the loss."""

    @classmethod
    def from_device(
        cls,
        step: int,
        batches: list[Any],
        losses: list[torch.Tensor],
        norm: torch.Tensor,
        parts: dict[str, torch.Tensor] | None = None,
    ) -> _StepResult:
        """Copy the values of a step without waiting for its device."""
        parts = parts or {}
        values = copy_to_host(torch.stack([*losses, norm, *(v.float() for v in parts.values())]))
        return cls(step, batches, values, reached(norm.device), tuple(parts))

    @property
    def loss(self) -> torch.Tensor:
        """[micro-batches], the share of each in the step's loss."""
        return self._arrived()[: len(self.batches)]

    @property
    def norm(self) -> float:
        """Of the gradients, before clipping."""
        return self._arrived()[len(self.batches)].item()

    @property
    def parts(self) -> dict[str, float]:
        """Those of the loss by name, where it has some."""
        values = self._arrived()[len(self.batches) + 1 :].tolist()
        return dict(zip(self.names, values, strict=True))

    def _arrived(self) -> torch.Tensor:
        if self.ready:
            self.ready.synchronize()
        return self.values


class _Loop:
    """What a run does over and over: step, settle, validate, log, save."""

    feed: _Feed
    logged: tuple[float, float, int]
    """(seconds on the clock, data-loading seconds, steps done) at the last line of the log."""

    def __init__(
        self,
        task: Task,
        optimiser: torch.optim.Optimizer,
        schedule: Schedule,
        context: Context,
        joint: JointStep | None = None,
    ) -> None:
        self.joint = joint
        self.task, self.optimiser, self.schedule = task, optimiser, schedule
        self.run, self.device, self.ranks = context.run, context.device, context.ranks
        self.progress, self.stop = context.progress, context.stop
        self.run_log: RunLog | None = None
        self.stopped_by = ""
        """The signal that asked to stop; empty if none did."""
        self.done = 0
        """Steps taken, of the whole run."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=schedule.precision == "fp16")
        self.saved, self.resumable = time.monotonic(), False
        """When this call could be resumed from last, or began; whether there is a checkpoint."""
        self.saving, self.last_save = 0.0, 0.0
        """Seconds that checkpoints kept training waiting in this call; that the last one did."""
        self.validating = 0.0
        """Seconds spent on validation in this call."""
        self.validated: int | None = None
        """While the model is validated: how many of the batches have come."""
        self.writer = checkpoint.Writer(
            context.run, task.model, optimiser, keep=schedule.keep, ranks=context.ranks,
            written=self._keeps,
        )  # fmt: skip
        self.loss_sum, self.counted, self.skipped = 0.0, 0, 0
        self.part_sums = dict[str, float]()
        """Of the parts of the loss, as `loss_sum`."""
        self.norm = torch.zeros(())
        """Of the last step's gradients, before clipping."""
        self.unchecked: _StepResult | None = None
        """The last step, whose loss and gradient norm were not looked at yet."""
        self.nonfinite: _StepResult | None = None
        """A step whose loss or gradient is not finite on this rank."""
        self.metrics: dict[str, float] = {}
        self.pictures: dict[str, Any] = {}
        self.last_metrics = ""
        """The validation metrics of the last epoch, for the progress bar."""
        self.on_speed, self.speed_figures = context.on_speed, dict[str, Any]()
        self.warm: tuple[float, float, int] | None = None
        """(seconds on the clock, data-loading seconds, steps done) once the first step was taken;
        speed is measured from there."""

    def resume(self, step: int | None) -> int:
        """Load the checkpoint of a step; returns the step to begin with."""
        if step is None:
            return 0
        state = checkpoint.load(self.run, step, model=self.task.model, optimiser=self.optimiser)
        self.loss_sum, self.counted = state["losses"]
        self.part_sums = dict(state.get("parts", {}))
        if self.scaler.is_enabled() and state["scaler"]:  # of a run that was in fp16 before
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.saved, self.resumable = step, time.monotonic(), True
        self._keeps(step)
        return step

    def heartbeat(self) -> None:
        """Between two batches: show that the run is alive, and that a signal has arrived."""
        if self.stop.by and not self.stopped_by:
            self.stopped_by = self.stop.by
            now = "step" if self.validated is None else "validation"
            self.progress.note(f"{self.stopped_by}: finishing the {now}, then a checkpoint")
        if self.validated is None:
            self.progress.advance(self.done)
        else:
            self.validated += 1
            self.progress.advance(self.done, f"validating, batch {self.validated:,}")

    def step(self, step: int) -> None:
        """One update of the weights."""
        schedule, model = self.schedule, self.task.model
        for group in self.optimiser.param_groups:
            # Fine-tuning has a scale for each layer.
            group["lr"] = schedule.learning_rate(step) * group.get("lr_scale", 1.0)
        self.optimiser.zero_grad(set_to_none=True)
        losses, batches, parts = self._joint_gradients(step) if self.joint else self._sum(step)
        self.scaler.unscale_(self.optimiser)
        self.norm = gradient_norm(model)
        if schedule.on_nonfinite == "skip":  # waits for the device
            self.feed.prefetch()
        result = _StepResult.from_device(step, batches, losses, self.norm, parts)
        if schedule.on_nonfinite == "skip" and self._skips(result):
            self.scaler.update()
            return
        if schedule.clip_grad is not None:
            clip_grads_with_norm_(model.parameters(), schedule.clip_grad, self.norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.feed.prefetch()
        # On a GPU this step is queued already when the loss of the one before is looked at.
        self._check_last()
        self.unchecked = result

    def _seed(self, step: int, micro: int) -> int:
        """Of what a micro-batch draws (drop path): by address, or a resumed run would differ."""
        address = (step, micro, self.ranks.rank)
        return int(rng.bits(self.schedule.data.seed, rng.DROPPED, address, 1)[0] >> 1)

    def _sum(self, step: int) -> _Gradients:
        """Add up the gradients of the micro-batches of a step."""
        losses, batches, count = [], [], self.schedule.accumulate
        for micro in range(count):
            with self.feed.idle.measured():
                batch, there = self.feed.take()
            manual_seed(self._seed(step, micro), self.device)
            with sync_gradients(self.task.network, micro + 1 == count):
                with autocast(self.device, self.schedule.precision):
                    part = self.task.loss(there) / count
                self.scaler.scale(part).backward()
            losses.append(part.detach())
            batches.append(batch)
        return losses, batches, {}

    def _joint_gradients(self, step: int) -> _Gradients:
        """The gradients of a step whose images are compared with each other."""
        assert self.joint is not None
        count = self.schedule.accumulate
        with self.feed.idle.measured():
            taken = [self.feed.take() for _ in range(count)]
        seeds = [self._seed(step, micro) for micro in range(count)]
        joint = self.joint.backward([there for _, there in taken], seeds, self.scaler.scale)
        return [joint.loss / count] * count, [batch for batch, _ in taken], joint.parts

    def settle(self) -> None:
        """Check the last step. Raises TrainError on all ranks if a loss of one is not finite."""
        self._check_last()
        if self.ranks.any_flags(_NONFINITE if self.nonfinite else 0):
            raise self._error(self.nonfinite)

    def _check_last(self) -> None:
        """See whether the last step was finite, on this rank alone."""
        result, self.unchecked = self.unchecked, None
        if result is None:
            return
        if self._nonfinite_value(result):
            self.nonfinite = self.nonfinite or result
        else:
            self.loss_sum, self.counted = self.loss_sum + result.loss.sum().item(), self.counted + 1
            for name, value in result.parts.items():
                self.part_sums[name] = self.part_sums.get(name, 0.0) + value

    def _nonfinite_value(self, result: _StepResult) -> str:
        """Which value of a step is not finite, in words; empty if all are."""
        if not math.isfinite(loss := result.loss.sum().item()):
            return f"loss of step {result.step} is {loss}"
        # The gradient scaler takes care of gradients that overflow.
        if not self.scaler.is_enabled() and not math.isfinite(norm := result.norm):
            return f"gradient's norm of step {result.step} is {norm}"
        return ""

    def _skips(self, result: _StepResult) -> bool:
        """Whether a loss or gradient of any rank is not finite, so that no rank may use it."""
        nonfinite = result if self._nonfinite_value(result) else None
        if not self.ranks.any_flags(_NONFINITE if nonfinite else 0):
            self.skipped = 0
            return False
        self.skipped += 1
        error = self._error(nonfinite)
        if self.skipped == _MOST_SKIPPED:
            raise error
        self.progress.note(f"skipped: {error.found}")
        return True

    def _error(self, nonfinite: _StepResult | None) -> TrainError:
        """What is wrong with a step, and with whose images; all ranks call it together."""
        mine = None
        if nonfinite:
            bad = (~nonfinite.loss.isfinite()).tolist()
            suspects = [
                batch
                for batch, wrong in zip(nonfinite.batches, bad, strict=True)
                if wrong or not any(bad)
            ]
            names = [name for batch in suspects for name in self.task.describe(batch)]
            mine = self._nonfinite_value(nonfinite), names
        reports = self.ranks.gather_objects(mine)
        # One rank's loss is every rank's gradient: name the images of that one.
        rank, (what, names) = min(reports, key=lambda r: not r[1][0].startswith("loss"))
        saved = self.ranks.on_rank0(self._saved_steps)
        where = f"the last checkpoint is step {saved[-1]}" if saved else "no checkpoint yet"
        shown = ", ".join(names[:32]) + (", …" if len(names) > 32 else "")
        whose = "the batch" if self.ranks.size == 1 else f"rank {rank}'s share"
        return TrainError(
            f"the {what}; {where}; rows and views of {whose}: {shown}",
            expected="a finite loss and gradient",
            fix="a smaller --lr, --precision bf16 or fp32, or --on-nonfinite skip",
        )

    def _saved_steps(self) -> list[int]:
        """Of the checkpoints, with the one that is being written."""
        self.writer.close()
        return checkpoint.steps(self.run)

    def summary(self, done: int, figures: dict[str, Any]) -> dict[str, Any]:
        """What a call did, and where the run stands."""
        steps = self.schedule.steps
        state = {"step": done, "steps": steps, "finished": done == steps} | figures
        return state | ({"stopped_by": self.stopped_by} if self.stopped_by and done < steps else {})

    def requests(self, epoch_over: bool = False) -> int:
        """What any rank requests after this step: _STOP, _SAVE; 0 is nothing.

        Raises TrainError on all ranks if a step before was not finite on one, or a checkpoint could
        not be written.
        """
        saves = self.ranks.is_rank0 and self._checkpoint_is_due(epoch_over)
        flags = (_STOP if self.stop.by else 0) | (_SAVE if saves else 0)
        flags |= _UNSAVED if self.writer.failed else 0
        requests = self.ranks.any_flags(flags | (_NONFINITE if self.nonfinite else 0))
        if requests & _NONFINITE:
            raise self._error(self.nonfinite)
        if requests & _UNSAVED:
            self.writer.wait()
        if requests & _STOP:
            self.stopped_by = self.stop.by or "another rank"
        return requests

    def _checkpoint_is_due(self, epoch_over: bool) -> bool:
        """By the clock: after 15 minutes, and at an epoch's end unless one is two minutes young.

        Both are longer where the last one kept training waiting for more than a hundredth of that,
        or is still being written.
        """
        age, cost = time.monotonic() - self.saved, _COST * self.last_save
        minutes = self.schedule.save_minutes
        if minutes and age > 60 * minutes:
            return True
        if self.writer.busy:
            return False
        if not minutes and age > max(_OLD, cost):
            return True
        if not epoch_over or self.schedule.save_every:
            return False
        return not self.resumable or age > max(_YOUNG, cost)

    def tell_speed(self, done: int, last: int) -> None:
        """After each step: once a second of them was measured, or the last is taken, tell it."""
        if self.on_speed is None:
            return
        now = time.perf_counter(), self.feed.idle.seconds, done
        if self.warm is None:
            self.warm = now
        seconds, waited, steps = (b - a for a, b in zip(self.warm, now, strict=True))
        if steps and (seconds > _SPEED or done == last):
            images = steps * self.schedule.data.batch_size / self.ranks.size
            busy = max(seconds - waited, 1e-9)
            self.speed_figures = self.on_speed(images / busy, waited / max(seconds, 1e-9))
            self.on_speed = None

    def validate(self, epoch: int) -> None:
        """Measure the model after an epoch."""
        began, self.validated = time.perf_counter(), 0
        self.task.network.eval()
        self.metrics, self.pictures = self.task.validate(epoch, self.feed)
        self.task.network.train()
        self.validated = None
        words = [f", {name} {value:.3f}" for name, value in self.metrics.items()]
        self.last_metrics = "".join(words) or self.last_metrics
        seconds = time.perf_counter() - began
        self.validating += seconds
        if self.warm:
            self.warm = (self.warm[0] + seconds, *self.warm[1:])
        self.logged = (self.logged[0] + seconds, *self.logged[1:])

    def log(self, done: int) -> None:
        """A line of the log: of the steps since the last one, with this epoch's metrics."""
        clock, waited, before = self.logged
        self.logged = (time.perf_counter(), self.feed.idle.seconds, done)
        span = max(self.logged[0] - clock, 1e-9)
        total, parts = self._sums_over_ranks()
        images = (done - before) * self.schedule.data.batch_size
        line = {
            "step": done,
            "epoch": round(self.schedule.epoch(done), 4),
            "loss": total / self.counted if self.counted else math.nan,
            **{name: value / self.counted for name, value in parts.items() if self.counted},
            "lr": self.schedule.learning_rate(done - 1),
            "grad_norm": float(self.norm),
            "images_per_second": round(images / span, 2),
            "wait_share": round((self.logged[1] - waited) / span, 4),
        } | self.metrics
        if self.run_log:
            # JSON has no NaN: what a skipped step does not have is left out.
            finite = {name: value for name, value in line.items() if math.isfinite(value)}
            self.run_log.add(finite, self.pictures)
        self.progress.advance(
            done,
            f"epoch {line['epoch']:.1f}, loss {line['loss']:.4f}, "
            + "".join(f"{name} {line[name]:.3g}, " for name in parts if name in line)
            + f"lr {line['lr']:.1e}, "
            f"{line['images_per_second']:,.0f} images/s, data loading {line['wait_share']:.0%}"
            f"{self.last_metrics}",
        )
        self.loss_sum, self.counted, self.metrics, self.pictures = 0.0, 0, {}, {}
        self.part_sums = {}

    def _sums_over_ranks(self) -> tuple[float, dict[str, float]]:
        """The sums of loss and parts since the last line, as means over the ranks."""
        sums = [self.loss_sum, *self.part_sums.values()]
        total, *parts = self.ranks.all_reduce_sum([value / self.ranks.size for value in sums])
        return total, dict(zip(self.part_sums, parts, strict=True))

    def save(self, done: int) -> None:
        """Begin to write a checkpoint; the sums of an unfinished line are in it."""
        before = self.saving
        with self._patient():
            total, parts = self._sums_over_ranks()
            if self.run_log:  # a run that is resumed from here relies on it
                self.run_log.flush()
            state = {"losses": [total, self.counted], "steps": self.schedule.steps}
            state |= {"parts": parts} if parts else {}
            self.writer.save(done, state | {"scaler": self.scaler.state_dict()})
        self.saved, self.resumable = time.monotonic(), True
        self.last_save = self.saving - before

    def written(self) -> None:
        """Wait for the last checkpoint. Raises TrainError on all ranks if it cannot be written."""
        with self._patient():
            self.writer.wait()

    def close(self) -> None:
        """Whatever ended the run: a checkpoint that is being written is finished first."""
        with self._patient():
            self.writer.close()

    @contextmanager
    def _patient(self) -> Iterator[None]:
        """Inside, training waits for a checkpoint, and a stop waits with patience."""
        began, self.stop.saving = time.monotonic(), True
        try:
            yield
        finally:
            self.stop.saving = False
            self.saving += time.monotonic() - began

    def _keeps(self, step: int) -> None:
        self.stop.kept = f"the checkpoint of step {step} stays"
