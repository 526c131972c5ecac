"""How a run goes: its length, its rates, how often it saves and speaks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from milan.data.order import Stream


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


@dataclass(frozen=True)
class Schedule:
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
