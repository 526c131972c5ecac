"""Which patches the student sees, and which it decodes.

True or "masked" means hidden from the student. A draw is a plain function of uniform noise at an
address, so a resumed or re-sharded run draws the same mask. B views, N patches = V visible + M
masked, of which D are decoded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from milan.core.device import has_float64
from milan.errors import ConfigError


class Mask(NamedTuple):
    """A split of the patches, raster indices in ascending order; int64."""

    visible: torch.Tensor
    """[B, V]"""
    masked: torch.Tensor
    """[B, M]"""
    chosen: torch.Tensor | None = None
    """[B, D]: the masked patches that are decoded; None: all are, as published."""

    @property
    def decoded(self) -> torch.Tensor:
        """[B, D]: the masked patches that are decoded."""
        return self.masked if self.chosen is None else self.chosen

    @property
    def order(self) -> torch.Tensor:
        """[B, V + D]: the patches that a decoder predicts, in its order: visible ones first."""
        return torch.cat([self.visible, self.decoded], dim=1)

    @property
    def rows(self) -> torch.Tensor:
        """[B, 1 + V + D]: where the class token and these patches are in a table that has the class
        token first and then all patches in raster order, as stores have them."""
        return F.pad(1 + self.order, (1, 0))

    @property
    def predicted(self) -> torch.Tensor:
        """[B, V + D]: the same patches in raster order."""
        return self.order.sort(dim=1).values

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(those of visible patches [B, V, ...], those of decoded ones [B, D, ...]) of tokens in
        the decoder's order; others may stand before the patches."""
        decoded = tokens.shape[1] - self.decoded.shape[1]
        return tokens[:, decoded - self.visible.shape[1] : decoded], tokens[:, decoded:]

    def in_raster(self, patches: torch.Tensor) -> torch.Tensor:
        """What belongs to the patches `order`, [B, V + D, C], as it belongs to `predicted`."""
        at = self.order.argsort(dim=1)
        return patches.gather(1, at[..., None].expand_as(patches))

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


def decode_share(mask: Mask, noise: torch.Tensor, share: float) -> Mask:
    """The mask with a `share` of its masked patches decoded, and the others left out of the step:
    D = M share, rounded, at least 1 unless the share is 0 (partial prediction; CrossMAE, arXiv
    2401.14391).

    They are chosen uniformly, by the low bits of the `noise` [B, N] float32 whose high bits drew
    the mask: 2^-12 is the coarsest grid of what is left, and ties go to the lower index.
    """
    count = max(1, round(mask.masked.shape[1] * share)) if share else 0
    low = (noise * 4096).frac().gather(1, mask.masked)
    at = low.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    return mask._replace(chosen=mask.masked.gather(1, at))
