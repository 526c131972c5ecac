"""Linear probes as papers have them, but for augmentation: features are those of centre crops.

published   MILAN and MAE (main_linprobe.py): class token, batch normalisation without weights of
            its own, LARS, 100 or 90 epochs of 16,384 images a step
dinov2      DINOv2 (dinov2/eval/linear.py): 13 learning rates x last block or 4 x with the mean of
            patches or without, by SGD of 1,024 images a step, all in the same passes

Their numbers are those of ImageNet: 78 steps an epoch, or 12,500 in all. On fewer images a step has
fewer, and the learning rates stay: LARS changes a weight by a share of itself, and in the few steps
that would be left it would not get away from the initial weights.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from milan.core.device import has_float64
from milan.core.distributed import Ranks
from milan.evaluation.config import LinearProbeConfig
from milan.evaluation.evaluation import Evaluation
from milan.evaluation.heads import Head, Steps, at_most, best_of, of_step

_LARGE = 1024  # width of ViT-L, from which on MILAN's learning rate is another
_RATES = tuple(
    rate * 1024 / 256
    for rate in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
)


def fit_published(evaluation: Evaluation) -> tuple[nn.Module, dict[str, Any]]:
    """(features [b, F] to scores, the settings that it was trained with)."""
    config, frozen, images = evaluation.config, evaluation.frozen, len(evaluation.train)
    assert isinstance(config, LinearProbeConfig)
    width = evaluation.train.features.width // len(frozen.parts)
    step_images = of_step(config.step_images, images, most=16_384, steps=78)
    epochs = config.epochs or 100
    lr = config.lr or (1.28 if width >= _LARGE else 3.2)

    def make() -> Head:
        linear = nn.Linear(width, evaluation.classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        norm = WholeBatchNorm(width, evaluation.context.ranks)
        module = nn.Sequential(Columns(0, width), norm, linear).to(evaluation.context.device)
        # LARS scales a step by the norms of weights and gradient; a bias has its own step.
        groups = [
            {"params": [linear.weight], "lr": lr, "always_adapt": True},
            {"params": [linear.bias], "lr": lr},
        ]
        return Head(module, groups)

    steps = Steps(
        epochs, step_images, partial(Lars, momentum=0.9, trust_coeff=0.001),
        warmup=min(10.0, epochs / 2),
    )  # fmt: skip
    module, _ = best_of(evaluation, [{}], make, steps, "classifier by LARS", otherwise={})
    return module, {"epochs": epochs, "step_images": step_images, "lr": lr}


def fit_dinov2(evaluation: Evaluation) -> tuple[nn.Module, dict[str, Any]]:
    """(features [b, F] to scores, the settings that were chosen)."""
    config, parts = evaluation.config, evaluation.frozen.parts
    assert isinstance(config, LinearProbeConfig)
    images, whole = len(evaluation.train), evaluation.train.features.width
    width = whole // len(parts)
    blocks = parts.count(parts[0])
    step_images = of_step(config.step_images, images, most=1024, steps=20)
    epochs = config.epochs or at_most(12_500, 100, images, step_images)

    def make(lr: float, blocks: int, mean_of_patches: bool) -> Head:
        of_blocks = parts.count(parts[0])
        columns = Columns(
            (of_blocks - blocks) * width, whole if mean_of_patches else of_blocks * width
        )
        linear = nn.Linear(columns.width, evaluation.classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        module = nn.Sequential(columns, linear).to(evaluation.context.device)
        return Head(module, [{"params": linear.parameters(), "lr": lr}])

    means = (False, True) if len(parts) > blocks else (False,)
    grid = [
        {"lr": lr, "blocks": count, "mean_of_patches": mean}
        for count, mean, lr in product(sorted({1, blocks}), means, _RATES)
    ]
    steps = Steps(epochs, step_images, partial(torch.optim.SGD, momentum=0.9))
    few = {"lr": _RATES[-2], "blocks": 1, "mean_of_patches": means[-1]}
    module, chosen = best_of(evaluation, grid, make, steps, "linear classifiers", otherwise=few)
    return module, {"epochs": epochs, "step_images": step_images, **chosen}


class Columns(nn.Module):
    """Some of the features, [b, F] to [b, width]."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__()
        self.first, self.end, self.width = first, end, end - first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Columns first to end - 1."""
        return x[:, self.first : self.end]


class WholeBatchNorm(nn.Module):
    """Batch normalisation without weights, by mean and variance over all ranks, [b, F] to [b, F].

    torch's BatchNorm1d(F, affine=False, eps=1e-6), but for that: on several ranks it normalises
    each one's images by themselves, and its SyncBatchNorm runs on no CPU.
    """

    def __init__(self, width: int, ranks: Ranks) -> None:
        super().__init__()
        self.ranks, self.momentum, self.eps = ranks, 0.1, 1e-6
        self.mean: torch.Tensor
        self.variance: torch.Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """By those of the batch in training, by their running averages else."""
        if not self.training:
            return (x - self.mean) * (self.variance + self.eps).rsqrt()
        exact = x.double() if has_float64(x.device) else x
        count = exact.new_tensor([float(len(x))])
        sums = torch.cat([exact.sum(dim=0), exact.square().sum(dim=0), count])
        self.ranks.add_up(sums)
        images = sums[-1]
        mean, square = (sums[:-1] / images).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        unbiased = variance * images / (images - 1).clamp_min(1)
        self.mean.lerp_(mean.to(self.mean), self.momentum)
        self.variance.lerp_(unbiased.to(self.variance), self.momentum)
        return (x - mean.to(x)) * (variance + self.eps).rsqrt().to(x)
