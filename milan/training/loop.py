"""The training loop: one step, many times, on one device or many; resumable, watched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from milan.core import rng
from milan.core.device import autocast
from milan.core.distributed import Ranks, full_tensor, sync_gradients
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.errors import TrainError
from milan.reporting.log import RunLog
from milan.training import checkpoint
from milan.training.optim import Schedule

_STOP, _SAVE, _LOST = 1, 2, 4
_SKIPPED_AT_MOST = 10  # steps in a row without a finite loss: the run is lost, not unlucky


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
    schedule: Schedule,
    run: Path,
    resumed: int | None,
    ranks: Ranks,
    device: torch.device,
    batches_from: Callable[[int], Iterable[Any]],
    log: RunLog | None,
    progress: Progress,
    stop: Stop,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train from the checkpoint of step `resumed` in `run`, or from the start, to the end.

    `batches_from(step)` gives this rank's micro-batches from a step on, and after the last step of
    an epoch those of `task.judge`. Every draw is addressed, so a resumed run is the uninterrupted
    one. Asked to `stop`, or after `stop_after` steps of this call, it ends with a checkpoint.
    Returns figures of this call; rates leave out the start of the loader, and are missing if no
    step was taken. Raises TrainError on a loss that is not finite.
    """
    loop = _Loop(task, optimiser, schedule, run, ranks, device, progress, stop, log)
    start = done = loop.resume(resumed)
    last = schedule.steps if stop_after is None else min(schedule.steps, start + stop_after)
    asked = loop.asked() if start < last else 0
    if start >= last or asked & _STOP:
        return loop.end(start, {"seconds": 0.0})
    progress.begin("train", schedule.steps, "steps", done=start)
    loop.feed = feed = _Feed(batches_from(start), loop.beat)
    loop.mark = (time.perf_counter(), 0.0, start)
    task.network.train()
    with closing(feed):
        for step in range(start, last):
            loop.step(step)
            loop.done = done = step + 1
            asked = loop.asked()
            epoch_over = schedule.stream.at(done)[1] == 0
            speaking = epoch_over or done == last or done % schedule.log_every == 0
            saving = asked or done == last or done % schedule.save_every == 0
            if speaking or saving:
                loop.settle()
            if epoch_over:
                loop.judge(schedule.stream.at(step)[0])
            if speaking:
                loop.speak(done)
            else:
                progress.advance(done)
            if saving:
                loop.save(done)
            if asked & _STOP:
                break
        progress.end()
        seconds = time.perf_counter() - feed.began
    trained = max(seconds - feed.startup - loop.judging, 1e-9)
    images = (done - start) * schedule.stream.batch_size
    return loop.end(
        done,
        {
            "seconds": round(seconds, 2),
            "startup_seconds": round(feed.startup, 2),
            "images_per_second": round(images / trained, 2),
            "wait_share": round(feed.waited / trained, 4),
        },
    )


class _Feed:
    """Batches as they come, and how long they were waited for; `beat` is called at each."""

    def __init__(self, batches: Iterable[Any], beat: Callable[[], None]) -> None:
        self.began, self.beat = time.perf_counter(), beat
        self.waited = 0.0
        self._batches = iter(batches)
        # The first batch waits for the loader's processes to start; that is not waiting for data.
        self._first: list[Any] = [next(self._batches)]
        self.startup = time.perf_counter() - self.began

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.beat()
        if self._first:
            return self._first.pop()
        asked = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - asked
        return batch

    def close(self) -> None:
        """Let the loader end its processes."""
        if isinstance(self._batches, Generator):
            self._batches.close()


class _StepResult(NamedTuple):
    """A step as it was taken, and what came of it: known once the device is done with it."""

    step: int
    batches: list[Any]
    figures: torch.Tensor
    """[micro-batches + 1] on the CPU: shares of the step's loss, and the gradients' norm."""
    ready: torch.cuda.Event | None
    """When `figures` are there; None: they are."""

    @classmethod
    def from_device(
        cls, step: int, batches: list[Any], losses: list[torch.Tensor], norm: torch.Tensor
    ) -> _StepResult:
        """Copy the figures of a step, whose device is not waited for."""
        cuda = norm.device.type == "cuda"
        figures = torch.stack([*losses, norm]).to("cpu", non_blocking=cuda)
        ready = torch.cuda.Event() if cuda else None
        if ready:
            ready.record()
        return cls(step, batches, figures, ready)

    @property
    def loss(self) -> torch.Tensor:
        """[micro-batches], each one's share of the step's loss."""
        return self._known()[:-1]

    @property
    def norm(self) -> float:
        """Of the gradients, before they were clipped."""
        return self._known()[-1].item()

    def _known(self) -> torch.Tensor:
        if self.ready:
            self.ready.synchronize()
        return self.figures


class _Loop:
    """What a run does over and over: step, settle, judge, speak, save."""

    feed: _Feed
    mark: tuple[float, float, int]
    """(seconds on the clock, seconds waited, steps done) when the log last spoke."""

    def __init__(
        self,
        task: Task,
        optimiser: torch.optim.Optimizer,
        schedule: Schedule,
        run: Path,
        ranks: Ranks,
        device: torch.device,
        progress: Progress,
        stop: Stop,
        log: RunLog | None,
    ) -> None:
        self.task, self.optimiser, self.schedule, self.run = task, optimiser, schedule, run
        self.ranks, self.device = ranks, device
        self.progress, self.stop, self.log = progress, stop, log
        self.stopping = ""
        """Who asked to stop; empty if nobody did."""
        self.done = 0
        """Steps taken, of the whole run."""
        self.scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")
        self.saved = time.monotonic()
        self.judging = 0.0
        self.loss_sum, self.counted, self.skipped = 0.0, 0, 0
        self.norm = torch.zeros(())
        """Of the last step's gradients, before they were clipped."""
        self.unproven: _StepResult | None = None
        """A step whose loss and gradient's norm were not looked at yet."""
        self.lost: _StepResult | None = None
        """A step whose loss or gradient is not finite, as this rank sees it."""
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
        self.done = step
        return step

    def beat(self) -> None:
        """Between two batches: whoever watches sees that the run is alive, and was heard."""
        if self.stop.by and not self.stopping:
            self.stopping = self.stop.by
            self.progress.note(f"{self.stopping}: finishing the step, then a checkpoint")
        self.progress.advance(self.done)

    def step(self, step: int) -> None:
        """One update of the weights."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(step)
        self.optimiser.zero_grad(set_to_none=True)
        losses, batches = [], []
        for micro in range(self.schedule.accumulate):
            batch = next(self.feed)
            # A student may drop paths: that too is drawn by address, or a resumed run would differ.
            at = (step, micro, self.ranks.rank)
            torch.manual_seed(int(rng.bits(self.schedule.stream.seed, rng.DROPPED, at, 1)[0] >> 1))
            with sync_gradients(self.task.network, micro + 1 == self.schedule.accumulate):
                with autocast(self.device, self.schedule.precision):
                    part = self.task.loss(batch) / self.schedule.accumulate
                self.scaler.scale(part).backward()
            losses.append(part.detach())
            batches.append(batch)
        self.scaler.unscale_(self.optimiser)
        self.norm = gradient_norm(self.task.student)
        taken = _StepResult.from_device(step, batches, losses, self.norm)
        if self.schedule.on_nonfinite == "skip" and self._skips(taken):
            self.scaler.update()
            return
        if self.schedule.clip_grad is not None:
            parameters = self.task.student.parameters()
            clip_grads_with_norm_(parameters, self.schedule.clip_grad, self.norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        # On a GPU this step is queued already when the loss of the one before is looked at.
        self._look()
        self.unproven = taken

    def settle(self) -> None:
        """Look at the last step's loss. Raises TrainError on all ranks if one's is not finite."""
        self._look()
        if self.ranks.any_flags(_LOST if self.lost else 0):
            raise self._error(self.lost)

    def _look(self) -> None:
        """See whether the last step was well; on this rank alone."""
        taken, self.unproven = self.unproven, None
        if taken is None:
            return
        if self._wrong(taken):
            self.lost = self.lost or taken
        else:
            self.loss_sum, self.counted = self.loss_sum + taken.loss.sum().item(), self.counted + 1

    def _wrong(self, taken: _StepResult) -> str:
        """What of a step is not finite, in words; empty if all is well."""
        if not math.isfinite(loss := taken.loss.sum().item()):
            return f"loss of step {taken.step} is {loss}"
        # A gradient scaler sees to gradients that overflow.
        if not self.scaler.is_enabled() and not math.isfinite(norm := taken.norm):
            return f"gradient's norm of step {taken.step} is {norm}"
        return ""

    def _skips(self, taken: _StepResult) -> bool:
        """Whether any rank's loss or gradient is not finite, so that no rank may use it."""
        lost = taken if self._wrong(taken) else None
        if not self.ranks.any_flags(_LOST if lost else 0):
            self.skipped = 0
            return False
        self.skipped += 1
        error = self._error(lost)
        if self.skipped == _SKIPPED_AT_MOST:
            raise error
        self.progress.note(f"skipped: {error.found}")
        return True

    def _error(self, lost: _StepResult | None) -> TrainError:
        """What is wrong with a step, and with whose images; all ranks ask together."""
        mine = None
        if lost:
            bad = (~lost.loss.isfinite()).tolist()
            found = [b for b, wrong in zip(lost.batches, bad, strict=True) if wrong or not any(bad)]
            rows = [f"{row}.{view}" for batch in found for row, view in self.task.rows(batch)]
            mine = self._wrong(lost), rows
        told = self.ranks.gather_objects(mine)
        # One rank's loss is every rank's gradient: name the images of that one.
        rank, (what, rows) = min(told, key=lambda t: not t[1][0].startswith("loss"))
        saved = checkpoint.steps(self.run)
        where = f"the last checkpoint is step {saved[-1]}" if saved else "no checkpoint yet"
        shown = ", ".join(rows[:32]) + (", …" if len(rows) > 32 else "")
        whose = "the batch" if self.ranks.size == 1 else f"rank {rank}'s share"
        return TrainError(
            f"the {what}; {where}; rows and views of {whose}: {shown}",
            expected="a finite loss and gradient",
            fix="a smaller --lr, --precision bf16 or fp32, or --on-nonfinite skip",
        )

    def end(self, done: int, figures: dict[str, Any]) -> dict[str, Any]:
        """What a call did, with how the run stands."""
        steps = self.schedule.steps
        found = {"step": done, "steps": steps, "finished": done == steps} | figures
        return found | ({"stopped_by": self.stopping} if self.stopping and done < steps else {})

    def asked(self) -> int:
        """What any rank asks for after this step: _STOP, _SAVE; 0 is nothing.

        Raises TrainError on all ranks if a step before was lost on one.
        """
        late = time.monotonic() - self.saved > 60 * self.schedule.save_minutes
        flags = (_STOP if self.stop.by else 0) | (_SAVE if late and self.ranks.is_rank0 else 0)
        asked = self.ranks.any_flags(flags | (_LOST if self.lost else 0))
        if asked & _LOST:
            raise self._error(self.lost)
        if asked & _STOP:
            self.stopping = self.stop.by or "another rank"
        return asked

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
        (total,) = self.ranks.all_reduce_sum([self.loss_sum / self.ranks.size])
        images = (done - before) * self.schedule.stream.batch_size
        line = {
            "step": done,
            "epoch": round(self.schedule.epoch(done), 4),
            "loss": total / self.counted if self.counted else math.nan,
            "lr": self.schedule.rate(done - 1),
            "grad_norm": float(self.norm),
            "images_per_second": round(images / span, 2),
            "wait_share": round((self.feed.waited - waited) / span, 4),
        } | self.figures
        if self.log:
            # What a skipped step has not, the log leaves out: JSON has no NaN.
            finite = {name: value for name, value in line.items() if math.isfinite(value)}
            self.log.add(finite, self.pictures)
        self.progress.advance(
            done,
            f"epoch {line['epoch']:.1f}, loss {line['loss']:.4f}, lr {line['lr']:.1e}, "
            f"{line['images_per_second']:,.0f} images/s, waiting {line['wait_share']:.0%}"
            f"{self.judgement}",
        )
        self.loss_sum, self.counted, self.figures, self.pictures = 0.0, 0, {}, {}

    def save(self, done: int) -> None:
        """Write a checkpoint; the sums of an unfinished line are in it."""
        (total,) = self.ranks.all_reduce_sum([self.loss_sum / self.ranks.size])
        if self.log:  # a run that goes on from here counts on it
            self.log.keep()
        checkpoint.save(
            self.run,
            step=done,
            model=self.task.student,
            optimiser=self.optimiser,
            state={"scaler": self.scaler.state_dict(), "losses": [total, self.counted]},
            keep=self.schedule.keep,
            ranks=self.ranks,
        )
        self.saved = time.monotonic()


def gradient_norm(student: nn.Module) -> torch.Tensor:
    """The Euclidean norm of all gradients together, a scalar; over all ranks if it is sharded."""
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    return full_tensor(get_total_norm(grads))
