"""The training loop: one step, many times, on one device or many; resumable, watched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from milan import checkpoint, draws
from milan.device import autocast
from milan.errors import TrainError
from milan.journal import Journal
from milan.order import Stream
from milan.ranks import Ranks, summed, whole
from milan.signals import Stop, told
from milan.watch import Watch

_STOP, _SAVE = 1, 2
_SKIPPED_AT_MOST = 10  # steps in a row without a finite loss: the run is lost, not unlucky


def learning_rate(
    epoch: float, *, peak: float, warmup: float, epochs: float, end: float = 0.0
) -> float:
    """The rate at a fractional epoch: linear from 0 to `peak`, then half a cosine to `end`.

    As published (MAE and MILAN, util/lr_sched.py).
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = (epoch - warmup) / (epochs - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: no decay for biases and 1-D parameters; class and mask token do decay.

    As published: timm's grouping by dimension, which for ViT-B gives 93 with and 175 without.
    """
    decay: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Course:
    """How a run goes: its length, its rates, how often it saves and speaks."""

    stream: Stream
    """Which images come when."""
    epochs: int
    accumulate: int
    """Micro-batches of a step, on each rank."""
    lr: float
    warmup_epochs: float
    min_lr: float
    precision: str
    save_every: int
    """Steps between checkpoints."""
    save_minutes: float
    """Minutes between checkpoints, whatever the steps."""
    keep: int
    """Checkpoints kept."""
    log_every: int
    """Steps between lines of the log."""
    on_nonfinite: str = "stop"
    """What a loss that is not finite does: stop the run, or skip its step."""
    clip_grad: float | None = None
    """The largest norm of a step's gradients; None: any."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.stream.first_step(self.epochs)

    def epoch(self, step: int) -> float:
        """Where in the run a step is, in epochs."""
        epoch, within = self.stream.at(step)
        return epoch + within / self.stream.of_epoch(epoch).steps

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(
            self.epoch(step),
            peak=self.lr,
            warmup=self.warmup_epochs,
            epochs=self.epochs,
            end=self.min_lr,
        )


class Task(Protocol):
    """What is trained, for what, and how it is judged."""

    @property
    def student(self) -> nn.Module:
        """Whose weights are trained and kept."""

    @property
    def network(self) -> nn.Module:
        """What `loss` calls: the student, or its wrapper for several ranks."""

    def loss(self, batch: Any) -> torch.Tensor:
        """The objective of a micro-batch, a mean over its images; called under autocast."""

    def rows(self, batch: Any) -> list[tuple[int, int]]:
        """(row, view) of each image of a micro-batch."""

    def judge(self, epoch: int, batches: Iterator[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """Figures, and pictures by name, after an epoch; takes its own `batches` of the stream."""


def fit(
    task: Task,
    optimiser: torch.optim.Optimizer,
    *,
    course: Course,
    run: Path,
    resumed: int | None,
    ranks: Ranks,
    device: torch.device,
    batches_from: Callable[[int], Iterable[Any]],
    journal: Journal | None,
    watch: Watch,
    stop: Stop,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train from the checkpoint of step `resumed` in `run`, or from the start, to the end.

    `batches_from(step)` gives this rank's micro-batches from a step on, and after the last step of
    an epoch those of `task.judge`. Every draw is addressed, so a resumed run is the uninterrupted
    one. Asked to `stop`, or after `stop_after` steps of this call, it ends with a checkpoint.
    Returns figures of this call; rates leave out the start of the loader. Raises TrainError on a
    loss that is not finite.
    """
    loop = _Loop(task, optimiser, course, run, ranks, device, watch, journal)
    start = loop.resume(resumed)
    last = course.steps if stop_after is None else min(course.steps, start + stop_after)
    if start >= last:  # nothing is left to do
        return {"step": start, "steps": course.steps, "finished": True, "seconds": 0.0}
    watch.begin("train", course.steps, "steps", done=start)
    loop.feed = feed = _Feed(batches_from(start))
    loop.mark = (time.perf_counter(), 0.0, start)
    task.network.train()
    asked = done = 0
    with told(stop.ask):
        for step in range(start, last):
            loop.step(step)
            done = step + 1
            asked = loop.asked(stop)
            epoch_over = course.stream.at(done)[1] == 0
            speaking = epoch_over or done == last or done % course.log_every == 0
            saving = asked or done == last or done % course.save_every == 0
            if speaking or saving:
                loop.settle()
            if epoch_over:
                loop.judge(course.stream.at(step)[0])
            if speaking:
                loop.speak(done)
            else:
                watch.advance(done)
            if saving:
                loop.save(done)
            if asked & _STOP:
                break
    watch.end()
    if journal:
        journal.close()
    seconds = time.perf_counter() - feed.began
    trained = max(seconds - feed.startup - loop.judging, 1e-9)
    return {
        "step": done,
        "steps": course.steps,
        "finished": done == course.steps,
        "seconds": round(seconds, 2),
        "startup_seconds": round(feed.startup, 2),
        "images_per_second": round((done - start) * course.stream.batch_size / trained, 2),
        "wait_share": round(feed.waited / trained, 4),
    } | ({"stopped_by": stop.by or "another rank"} if asked & _STOP else {})


class _Feed:
    """Batches as they come, and how long they were waited for."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self._batches = iter(batches)
        # The first batch waits for the loader's processes to start; that is not waiting for data.
        self._first: list[Any] = [next(self._batches)]
        self.startup = time.perf_counter() - self.began

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._first:
            return self._first.pop()
        asked = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - asked
        return batch


class _Loop:
    """What a run does over and over: step, settle, judge, speak, save."""

    feed: _Feed
    mark: tuple[float, float, int]
    """(seconds on the clock, seconds waited, steps done) when the log last spoke."""

    def __init__(
        self,
        task: Task,
        optimiser: torch.optim.Optimizer,
        course: Course,
        run: Path,
        ranks: Ranks,
        device: torch.device,
        watch: Watch,
        journal: Journal | None,
    ) -> None:
        self.task, self.optimiser, self.course, self.run = task, optimiser, course, run
        self.ranks, self.device, self.watch, self.journal = ranks, device, watch, journal
        self.scaler = torch.amp.GradScaler(device.type, enabled=course.precision == "fp16")
        self.saved = time.monotonic()
        self.judging = 0.0
        self.loss_sum, self.counted, self.skipped = 0.0, 0, 0
        self.norm = torch.zeros(())
        """Of the last step's gradients, before they were clipped."""
        self.unproven: tuple[int, torch.Tensor, torch.Tensor, list[Any]] | None = None
        """A step whose loss and gradient's norm were not looked at yet, and its batches."""
        self.judgement = ""
        """What was found last, for people."""
        self.figures: dict[str, float] = {}
        self.pictures: dict[str, Any] = {}

    def resume(self, step: int | None) -> int:
        """Load the checkpoint of a step; the step to begin with."""
        if step is None:
            return 0
        state = checkpoint.load(self.run, step, model=self.task.student, optimiser=self.optimiser)
        self.loss_sum, self.counted = state["losses"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        return step

    def step(self, step: int) -> None:
        """One update of the weights."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.course.rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        loss, batches = torch.zeros((), device=self.device), []
        for micro in range(self.course.accumulate):
            batch = next(self.feed)
            # A student may drop paths: that too is drawn by address, or a resumed run would differ.
            at = (step, micro, self.ranks.rank)
            torch.manual_seed(
                int(draws.bits(self.course.stream.seed, draws.DROPPED, at, 1)[0] >> 1)
            )
            with summed(self.task.network, micro + 1 == self.course.accumulate):
                with autocast(self.device, self.course.precision):
                    part = self.task.loss(batch) / self.course.accumulate
                self.scaler.scale(part).backward()
            loss += part.detach()
            batches.append(batch)
        self.scaler.unscale_(self.optimiser)
        self.norm = gradient_norm(self.task.student)
        if self.course.on_nonfinite == "skip" and self._skips(step, loss, batches):
            self.scaler.update()
            return
        if self.course.clip_grad is not None:
            parameters = self.task.student.parameters()
            clip_grads_with_norm_(parameters, self.course.clip_grad, self.norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        # On a GPU this step runs while the loss of the one before is waited for.
        self.settle()
        self.unproven = step, loss, self.norm, batches

    def settle(self) -> None:
        """Look at the loss of the last step. Raises TrainError if it is not finite."""
        if self.unproven is None:
            return
        step, loss, norm, batches = self.unproven
        self.unproven = None
        wrong = self._not_finite(loss, norm)
        if wrong:
            raise self._lost(step, wrong, batches)
        self.loss_sum, self.counted = self.loss_sum + loss.item(), self.counted + 1

    def _not_finite(self, loss: torch.Tensor, norm: torch.Tensor) -> dict[str, float]:
        """What of a step is not finite, by name; empty if all is well."""
        found = {"loss": loss.item()}
        if not self.scaler.is_enabled():  # which sees to gradients that overflow
            found["gradient's norm"] = norm.item()
        return {name: value for name, value in found.items() if not math.isfinite(value)}

    def _skips(self, step: int, loss: torch.Tensor, batches: list[Any]) -> bool:
        """Whether any rank's loss or gradient is not finite, so that no rank may use it."""
        wrong = self._not_finite(loss, self.norm)
        if not self.ranks.agree(int(bool(wrong))):
            self.skipped = 0
            return False
        self.skipped += 1
        error = self._lost(step, wrong or {"loss of another rank": math.nan}, batches)
        if self.skipped == _SKIPPED_AT_MOST:
            raise error
        self.watch.note(f"skipped: {error.found}")
        return True

    def _lost(self, step: int, wrong: dict[str, float], batches: list[Any]) -> TrainError:
        (what, value), *_ = wrong.items()
        saved = checkpoint.steps(self.run)
        where = f"the last checkpoint is step {saved[-1]}" if saved else "no checkpoint yet"
        rows = [f"{row}.{view}" for batch in batches for row, view in self.task.rows(batch)]
        shown = ", ".join(rows[:32]) + (", …" if len(rows) > 32 else "")
        whose = "the batch" if self.ranks.size == 1 else f"rank {self.ranks.rank}'s share"
        return TrainError(
            f"the {what} of step {step} is {value}; {where}; rows and views of {whose}: {shown}",
            expected="a finite loss and gradient",
            fix="a smaller --lr, --precision bf16 or fp32, or --on-nonfinite skip",
        )

    def asked(self, stop: Stop) -> int:
        """What any rank asks for after this step: _STOP, _SAVE; 0 is nothing."""
        late = time.monotonic() - self.saved > 60 * self.course.save_minutes
        flags = (_STOP if stop.by else 0) | (_SAVE if late and self.ranks.first else 0)
        return self.ranks.agree(flags)

    def judge(self, epoch: int) -> None:
        """See how far the run is after an epoch."""
        began, waited = time.perf_counter(), self.feed.waited
        self.task.network.eval()
        self.figures, self.pictures = self.task.judge(epoch, self.feed)
        self.task.network.train()
        found = [f", {name} {value:.3f}" for name, value in self.figures.items()]
        self.judgement = "".join(found) or self.judgement
        seconds, self.feed.waited = time.perf_counter() - began, waited
        self.judging += seconds
        self.mark = (self.mark[0] + seconds, *self.mark[1:])

    def speak(self, done: int) -> None:
        """A line of the log: of the steps since the last one, this epoch's judgement included."""
        clock, waited, before = self.mark
        self.mark = (time.perf_counter(), self.feed.waited, done)
        span = max(self.mark[0] - clock, 1e-9)
        (total,) = self.ranks.sums([self.loss_sum / self.ranks.size])
        images = (done - before) * self.course.stream.batch_size
        line = {
            "step": done,
            "epoch": round(self.course.epoch(done), 4),
            "loss": total / self.counted if self.counted else math.nan,
            "lr": self.course.rate(done - 1),
            "grad_norm": float(self.norm),
            "images_per_second": round(images / span, 2),
            "wait_share": round((self.feed.waited - waited) / span, 4),
        } | self.figures
        if self.journal:
            # What a skipped step has not, the log leaves out: JSON has no NaN.
            finite = {name: value for name, value in line.items() if math.isfinite(value)}
            self.journal.add(finite, self.pictures)
        self.watch.advance(
            done,
            f"epoch {line['epoch']:.1f}, loss {line['loss']:.4f}, lr {line['lr']:.1e}, "
            f"{line['images_per_second']:,.0f} images/s, waiting {line['wait_share']:.0%}"
            f"{self.judgement}",
        )
        self.loss_sum, self.counted, self.figures, self.pictures = 0.0, 0, {}, {}

    def save(self, done: int) -> None:
        """Write a checkpoint; the sums of an unfinished line are in it."""
        (total,) = self.ranks.sums([self.loss_sum / self.ranks.size])
        checkpoint.save(
            self.run,
            step=done,
            model=self.task.student,
            optimiser=self.optimiser,
            state={"scaler": self.scaler.state_dict(), "losses": [total, self.counted]},
            keep=self.course.keep,
            ranks=self.ranks,
        )
        self.saved = time.monotonic()
        if self.journal:
            self.journal.keep()


def gradient_norm(student: nn.Module) -> torch.Tensor:
    """The Euclidean norm of all gradients together, a scalar; over all ranks if it is sharded."""
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return whole(get_total_norm(grads))
