"""The optimiser and its schedule: AdamW, warm-up, cosine; how often a run saves and logs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.utils import get_total_norm

from milan.core.distributed import full_tensor


def adamw(
    model: nn.Module, device: torch.device, *, weight_decay: float, beta2: float
) -> torch.optim.Optimizer:
    """AdamW as published; its learning rate is set at every step.

    No decay for biases and 1-D parameters, but for class and mask token: timm's grouping, which
    for ViT-B gives 93 with and 175 without.
    """
    return torch.optim.AdamW(
        param_groups_weight_decay(model, weight_decay),
        lr=0.0,
        betas=(0.9, beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The Euclidean norm of all gradients together, a scalar; over all ranks if it is sharded."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return full_tensor(get_total_norm(grads))


def learning_rate(
    epoch: float, *, peak: float, warmup: float, epochs: float, end: float = 0.0
) -> float:
    """The learning rate at a fractional epoch: linear from 0 to `peak`, half a cosine to `end`.

    As published (MAE and MILAN, util/lr_sched.py).
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = (epoch - warmup) / (epochs - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))


class Epochs(Protocol):
    """Steps in epochs: all that the loop has to know of the data it trains on."""

    @property
    def seed(self) -> int:
        """Of what the loop itself draws."""

    @property
    def batch_size(self) -> int:
        """Images of a step, over all ranks."""

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)"""


@dataclass(frozen=True)
class Schedule:
    """How long a run is, its learning rates, and how often it saves and logs."""

    data: Epochs
    epochs: int
    accumulate: int
    """Micro-batches of a step, on each rank."""
    lr: float
    """Peak learning rate."""
    warmup_epochs: float
    min_lr: float
    precision: str
    save_every: int | None
    """Steps between checkpoints; None: at the end of epochs, unless one is younger than two
    minutes."""
    save_minutes: float | None
    """Minutes between checkpoints, whatever the steps; None: 15, or what they cost asks for."""
    keep: int
    """Checkpoints kept."""
    log_every: int
    """Steps between lines of the log."""
    on_nonfinite: str = "stop"
    """What a loss that is not finite does: stop the run, or skip its step."""
    clip_grad: float | None = None
    """The largest norm of a step's gradients; None: no clipping."""
    drops: tuple[float, ...] = ()
    """Shares of the run after each of which the rate is a tenth; empty: half a cosine."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.data.first_step(self.epochs)

    def epoch(self, step: int) -> float:
        """Where in the run a step is, in epochs."""
        epoch, within = self.data.position(step)
        return epoch + within / (self.data.first_step(epoch + 1) - self.data.first_step(epoch))

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        epoch = self.epoch(step)
        if self.drops and epoch >= self.warmup_epochs:
            return self.lr * 0.1 ** sum(epoch >= share * self.epochs for share in self.drops)
        return learning_rate(
            epoch,
            peak=self.lr,
            warmup=self.warmup_epochs,
            epochs=self.epochs,
            end=self.min_lr,
        )
