"""MAE's objective, the baseline: the pixels of masked patches (arXiv 2111.06377)."""

from __future__ import annotations

from typing import Any

import torch

from milan.core.device import MEAN, STD, denormalise
from milan.images.channels import as_colours
from milan.objectives.base import Objective, Prediction


class PixelRegression(Objective):
    """Predict the normalised pixels of masked patches."""

    decoder = "mae"
    masking = "random"
    needs_features = False

    def target_width(self, encoder: Any) -> int:
        """The student's channels of every pixel of a patch."""
        return encoder.patch_embed.proj.in_channels * encoder.patch_embed.patch_size[0] ** 2

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """`pixel_regression`."""
        mask = prediction.mask
        _, decoded = mask.split(prediction.tokens)
        return pixel_regression(
            decoded, prediction.images, torch.ones_like(mask.decoded),
            patch=prediction.patch_size, at=mask.decoded,
        )  # fmt: skip

    def picture(self, prediction: Prediction) -> tuple[None, torch.Tensor]:
        """The predicted pixels."""
        images = unpatchify_prediction(
            prediction.patches, prediction.images, patch=prediction.patch_size
        )
        if prediction.batch.channels is None:
            return None, denormalise(images, MEAN, STD)
        seen = images.float().permute(0, 2, 3, 1).cpu().numpy()
        return None, torch.from_numpy(as_colours(seen, self.config.shown_channels))


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, C, H, W] to [B, N, patch * patch * C], raster order, channels last within a patch."""
    b, c, height, width = images.shape
    grid = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def pixel_regression(
    prediction: torch.Tensor,
    images: torch.Tensor,
    masked: torch.Tensor,
    *,
    patch: int,
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error on masked patches, each target patch normalised to mean 0, variance 1.

    `prediction` [B, T, patch * patch * C] (a class token's is ignored), `images` [B, C, H, W]
    normalised, `masked` [B, N] bool, True = masked. MAE (arXiv 2111.06377) with norm_pix_loss.
    `at` [B, K] names the patches of `prediction`, if not all N in raster order: `masked` is theirs.
    """
    target, mean, deviation = _patches(images, patch)
    target = (target - mean) / deviation
    if at is not None:
        target = target.gather(1, at[..., None].expand(-1, -1, target.shape[2]))
    error = (prediction[:, -target.shape[1] :].float() - target).square().mean(dim=-1)
    return (error * masked).sum() / masked.sum()


def unpatchify_prediction(
    prediction: torch.Tensor, images: torch.Tensor, *, patch: int
) -> torch.Tensor:
    """Predicted patches as pictures [B, C, H, W], normalised as `images` are.

    Mean and deviation of a patch, which the student does not predict, are the image's own.
    """
    _, mean, deviation = _patches(images, patch)
    b, c, height, width = images.shape
    pixels = prediction[:, -mean.shape[1] :].float() * deviation + mean
    pixels = pixels.reshape(b, height // patch, width // patch, patch, patch, c)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


def _patches(images: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(patches [B, N, patch * patch * C], the mean of each, the deviation of each)"""
    patches = patchify(images, patch).float()
    deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return patches, patches.mean(dim=-1, keepdim=True), deviation
