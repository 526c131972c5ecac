"""Heads on frozen features that are trained in steps, all settings of a grid together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from milan.core.device import seeded_weights
from milan.core.waiting import Stopped
from milan.errors import ConfigError, DataError
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.features import Context, Share
from milan.evaluation.shuffled import Shuffled

_TENTH = 10
_LEAST = 64  # images of a step: the published probe normalises by their mean and variance
_FEW = 2  # images of a tenth, at least


@dataclass(frozen=True)
class Head:
    """A classifier to be trained, and how."""

    module: nn.Module
    """Features [b, ...] to scores [b, classes]."""
    groups: Sequence[dict[str, Any]]
    """Of its parameters, as torch's optimisers take them; lr is the peak."""


@dataclass(frozen=True)
class Steps:
    """How all heads of a protocol are trained."""

    epochs: int
    images: int
    """Of a step, over all ranks."""
    optimiser: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    warmup: float = 0.0
    """Epochs in which the learning rate rises; then it falls to zero along a cosine."""
    change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    """What features become, on the device, before heads see them."""

    def share(self, epoch: float) -> float:
        """Of the peak learning rate, `epoch` epochs after the beginning."""
        if epoch < self.warmup:
            return epoch / self.warmup
        past = (epoch - self.warmup) / (self.epochs - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * past))


def at_most(steps: int, epochs: int, images: int, step_images: int) -> int:
    """Epochs that take so many steps, at most `epochs`; `images` are those of an epoch."""
    return max(1, min(epochs, round(steps / max(1, -(-images // step_images)))))


def of_step(asked: int | None, images: int, *, most: int, steps: int) -> int:
    """Images of a step: those `asked` for, else `most`, or fewer for so many `steps` an epoch."""
    return min(images, asked or min(most, max(_LEAST, -(-images // steps))))


def best_of(
    evaluation: Evaluation,
    grid: Sequence[dict[str, Any]],
    make: Callable[..., Head],
    steps: Steps,
    what: str,
    *,
    otherwise: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """The head of those settings of `grid` that are right most often, trained on all images.

    All are trained together without a tenth of the images to fit on, which then chooses; the chosen
    one is trained anew with it. With less than two images in it, it is the one of `otherwise`.
    `make(**settings)` makes a head; torch is seeded for each. Returns its module and its settings.
    All ranks call it together. Raises Stopped, and DataError if the weights become infinite.
    """
    chosen = otherwise
    images = len(evaluation.train)
    held_out = -(-images // _TENTH)
    if len(grid) > 1 and held_out >= _FEW and images - held_out >= _FEW:
        heads = [_seeded(evaluation, make, settings) for settings in grid]
        train_heads(evaluation, heads, steps, f"{len(grid)} {what}", wanted=_learnt_from)
        chosen = grid[int(np.argmax(_right_of_tenth(evaluation, heads, steps)))]
    head = _seeded(evaluation, make, chosen)
    train_heads(evaluation, [head], steps, what)
    if not all(bool(p.isfinite().all()) for p in head.module.parameters()):
        raise DataError(
            f"the {what} of {evaluation.frozen.name} diverged: weights are no numbers",
            expected="a learning rate that suits the features",
            fix="a smaller --lr",
        )
    return head.module.eval(), chosen


def train_heads(
    evaluation: Evaluation,
    heads: Sequence[Head],
    steps: Steps,
    what: str,
    wanted: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Train all heads in the same passes over the images to fit on, or those that are `wanted`.

    Each minimises its own cross-entropy, so none knows of the others. Raises Stopped, and
    ConfigError if a step does not fit into the device's memory.
    """
    try:
        _train(evaluation, heads, steps, what, wanted)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"the device's memory is full with {steps.images} images a step",
            fix=f"--step-images {max(1, steps.images // 2)}, or --memory 1GB",
        ) from None


def _train(
    evaluation: Evaluation,
    heads: Sequence[Head],
    steps: Steps,
    what: str,
    wanted: Callable[[np.ndarray], np.ndarray] | None,
) -> None:
    context = evaluation.context
    images = Shuffled(
        evaluation.train, context, step_images=steps.images, seed=evaluation.config.seed,
        memory=evaluation.memory, wanted=wanted,
    )  # fmt: skip
    optimiser = steps.optimiser([dict(group) for head in heads for group in head.groups])
    peaks = [group["lr"] for group in optimiser.param_groups]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    context.progress.begin(what, steps.epochs * images.steps, "steps")
    done = 0
    for epoch in range(steps.epochs):
        for x, y, count in images.epoch(epoch):
            share, x = steps.share((done + 0.5) / images.steps), steps.change(x)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = share * peak
            optimiser.zero_grad()
            for head in heads:
                scores = head.module(x)
                (F.cross_entropy(scores, y, reduction="sum") / count).backward()
            _add_up_gradients(parameters, context)
            optimiser.step()
            done += 1
            context.progress.advance(done)
    context.progress.end()


def _add_up_gradients(parameters: list[torch.Tensor], context: Context) -> None:
    """Over the ranks, with word of a signal to one of them. Raises Stopped on all."""
    if context.ranks.size == 1:
        context.check_stop()
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    stopping = gradients[0].new_tensor([float(bool(context.stop.by))])
    total = torch.cat([g.flatten() for g in gradients] + [stopping])
    context.ranks.add_up(total)
    if total[-1]:
        raise Stopped(context.stop.by or "a signal to another rank")
    sizes = [g.numel() for g in gradients]
    for gradient, part in zip(gradients, total[:-1].split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


def _seeded(evaluation: Evaluation, make: Callable[..., Head], settings: dict[str, Any]) -> Head:
    """A head whose weights are the same on all ranks, and for all settings of the same shape."""
    with seeded_weights(evaluation.config.seed):
        return make(**settings)


def _learnt_from(positions: np.ndarray) -> np.ndarray:
    """Positions are permuted, so each tenth of them is a fair sample to choose by."""
    return positions % _TENTH > 0


def _right_of_tenth(evaluation: Evaluation, heads: Sequence[Head], steps: Steps) -> list[float]:
    """How often each head is right on the tenth, over all ranks."""
    context = evaluation.context
    right = torch.zeros(len(heads), dtype=torch.int64, device=context.device)
    for head in heads:
        head.module.eval()
    with torch.no_grad():
        for x, y, first in Share(evaluation.train, context, change=steps.change):
            tenth = ~torch.from_numpy(_learnt_from(np.arange(first, first + len(y))))
            tenth = tenth.to(x.device)
            for i, head in enumerate(heads):
                right[i] += (head.module(x[tenth]).argmax(dim=1) == y[tenth]).sum()
    return context.ranks.all_reduce_sum([float(count) for count in right.tolist()])


def scores_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A trained head as a function, without gradients."""
    return partial(_scores, module)


@torch.no_grad()
def _scores(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)
