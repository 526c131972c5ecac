"""What a prediction is compared with: the teacher's features (MILAN), or pixels (MAE)."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def feature_regression(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean over B views and all T tokens of 2 - 2 cos (MILAN eq. 1, and its models_milan.py).

    `prediction`, `features` [B, T, C], any float dtype; computed in float32. Only directions
    matter; visible, masked and class tokens count alike. Scalar in [0, 4].
    """
    cosine = F.cosine_similarity(prediction.float(), features.float(), dim=-1, eps=1e-12)
    return (2 - 2 * cosine).mean()


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, 3, S, S] to [B, N, patch * patch * 3], raster order, channels last within a patch."""
    b, c, height, width = images.shape
    grid = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def pixel_regression(
    prediction: torch.Tensor, images: torch.Tensor, hidden: torch.Tensor, *, patch: int
) -> torch.Tensor:
    """Mean squared error on masked patches, each target patch normalised to mean 0, variance 1.

    `prediction` [B, T, patch * patch * 3] (a class token's is ignored), `images` [B, 3, S, S]
    normalised, `hidden` [B, N] bool, True = masked. MAE (arXiv 2111.06377) with norm_pix_loss.
    """
    target, mean, deviation = _patches(images, patch)
    target = (target - mean) / deviation
    error = (prediction[:, -target.shape[1] :].float() - target).square().mean(dim=-1)
    return (error * hidden).sum() / hidden.sum()


def unpatchify_prediction(
    prediction: torch.Tensor, images: torch.Tensor, *, patch: int
) -> torch.Tensor:
    """What `pixel_regression` compares as pictures [B, 3, S, S], normalised as `images` are.

    Mean and deviation of a patch, which the student does not predict, are the image's own.
    """
    _, mean, deviation = _patches(images, patch)
    b, _, size, _ = images.shape
    grid = size // patch
    pixels = prediction[:, -mean.shape[1] :].float() * deviation + mean
    pixels = pixels.reshape(b, grid, grid, patch, patch, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, size, size)


def _patches(images: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(patches [B, N, patch * patch * 3], the mean of each, the deviation of each)"""
    patches = patchify(images, patch).float()
    deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return patches, patches.mean(dim=-1, keepdim=True), deviation
