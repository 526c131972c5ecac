"""Which patches the student sees.

True or "masked" means hidden from the student. A draw is a plain function of uniform noise at an
address, so a resumed or re-sharded run draws the same mask. B views, N patches = V visible + M
masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from milan.core.device import has_float64
from milan.errors import ConfigError


class Mask(NamedTuple):
    """A split of the patches, raster indices in ascending order; int64."""

    visible: torch.Tensor
    """[B, V]"""
    masked: torch.Tensor
    """[B, M]"""

    def boolean(self) -> torch.Tensor:
        """[B, N], True = masked."""
        n = self.visible.shape[1] + self.masked.shape[1]
        hidden = torch.ones(len(self.visible), n, dtype=torch.bool, device=self.visible.device)
        return hidden.scatter_(1, self.visible, False)


def visible_count(patches: int, mask_ratio: float) -> int:
    """V = int(N (1 - ratio)), truncated as published: (100, .9) gives 9. Raises ConfigError."""
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ConfigError(
            f"mask ratio {mask_ratio} leaves {visible} of {patches} patches visible",
            expected="at least one visible and one masked patch",
        )
    return visible


def importance_mask(attention: torch.Tensor, noise: torch.Tensor, *, visible: int) -> Mask:
    """Choose which patches stay visible, favouring those the teacher attended to.

    `attention` [B, N] is strictly positive, its rows need not sum to one; `noise` [B, N] is in
    (0, 1). An exponential race (Efraimidis & Spirakis 2006): the law of drawing `visible` patches
    without replacement with these weights, which is torch.multinomial's too (MILAN, section 3.3).
    """
    # Arrival times Exp(1) / weight: the earliest are drawn first. Divided by the greatest, weights
    # have float32's range too, which rounds a time by 1e-7: ties in one cut of 100,000.
    kind = torch.float64 if has_float64(attention.device) else torch.float32
    weight = attention.to(kind)
    arrival = -noise.to(kind).log() / (weight / weight.amax(dim=1, keepdim=True))
    order = arrival.argsort(dim=1)
    return Mask(order[:, :visible].sort(1).values, order[:, visible:].sort(1).values)


def random_mask(noise: torch.Tensor, *, visible: int) -> Mask:
    """Choose visible patches uniformly (MAE): the race with equal weights."""
    return importance_mask(torch.ones_like(noise), noise, visible=visible)
