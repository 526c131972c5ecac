"""Targets of the teacher's grid of patches, for a student whose patches are of another size.

Both grids cover the same view edge to edge, so positions are shares of the view, and a patch's
place is its centre: no half-pixel shift. `shape` is the view's, of which the ratio of height to
width counts. B views, N patches (`patches`: the student's), T = 1 + N.
"""

from __future__ import annotations

import torch

from milan.core.device import device_constant
from milan.core.size import Size, grid_of


def resampled_features(features: torch.Tensor, patches: int, shape: Size) -> torch.Tensor:
    """Token features [B, T, C] of one grid to those [B, 1 + patches, C] of another, float32.

    Linear interpolation between the centres of patches; where the new grid is coarser the filter
    is as wide as a new patch (torch's antialiased bilinear). Row 0 stays as it is.
    """
    b, t, c = features.shape
    old, new = grid_of(t - 1, shape), grid_of(patches, shape)
    grid = features[:, 1:].float().reshape(b, old[0], old[1] * c)
    down, along = (_interpolation(features.device, *pair) for pair in zip(old, new, strict=True))
    with torch.autocast(features.device.type, enabled=False):
        rows = (down @ grid).view(b, new[0], old[1], c)
        resampled = along @ rows
    return torch.cat([features[:, :1].float(), resampled.view(b, patches, c)], dim=1)


def resampled_attention(attention: torch.Tensor, patches: int, shape: Size) -> torch.Tensor:
    """Attention [B, N] of one grid to [B, patches] of another, float32; > 0 stays > 0.

    What a patch was given is spread evenly over its area, and a new patch gets what lies in its
    own. The sum stays the same, of every region that both grids can draw.
    """
    old, new = grid_of(attention.shape[1], shape), grid_of(patches, shape)
    down, along = (_overlap(attention.device, *pair) for pair in zip(old, new, strict=True))
    with torch.autocast(attention.device.type, enabled=False):
        grid = attention.float().view(-1, *old)
        return (down @ grid @ along.T).flatten(1)


@device_constant
def _interpolation(old: int, new: int) -> torch.Tensor:
    """Weights [new, old] of the old centres at the new ones; rows sum to one."""
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    distance = (centres[:, None] - torch.arange(old)).abs()
    weights = (1 - distance / max(1.0, old / new)).clamp_min(0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


@device_constant
def _overlap(old: int, new: int) -> torch.Tensor:
    """Which share of each old interval lies in each new one [new, old]; columns sum to one."""
    ends, edges = torch.arange(new + 1) * old, torch.arange(old + 1) * new  # in 1 / (old * new)
    inside = torch.minimum(ends[1:, None], edges[1:]) - torch.maximum(ends[:-1, None], edges[:-1])
    return inside.clamp_min(0).float() / new
