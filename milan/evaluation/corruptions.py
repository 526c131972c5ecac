"""Corrupted images: what is left of a classifier's accuracy where pictures are noisy, blurred, ...

Seven corruptions at five severities, after ImageNet-C (Hendrycks and Dietterich 2019, arXiv
1903.12261), made by torchvision's transforms. Noise, blur, contrast, JPEG and pixelation have
ImageNet-C's strengths; brightness and saturation are torchvision's factors. The centre crop is
corrupted as the network sees it; lengths are those of 224 pixels, in proportion. Noise is drawn by
the image's content and the severity: every checkpoint sees the same pictures. These are no figures
of the ImageNet-C data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from milan.core import rng

SEVERITIES = {
    "gaussian noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of the range
    "gaussian blur": (1, 2, 3, 4, 6),  # standard deviation in pixels of 224
    "brightness": (1.2, 1.4, 1.6, 1.8, 2.0),  # factor
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    "saturation": (0.6, 0.4, 0.2, 0.1, 0.0),  # factor
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the pixels of an edge
}
"""corruption -> its strength at severity 1 to 5."""
_LAW = 1


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity."""

    name: str
    severity: int
    """1 to 5."""

    def __str__(self) -> str:
        return f"{self.name} {self.severity}"

    @property
    def law(self) -> dict[str, Any]:
        """All that determines it, as JSON."""
        return {"corruption": self.name, "severity": self.severity, "law": _LAW}

    def apply(self, pixels: np.ndarray, image: int) -> np.ndarray:
        """uint8 [H, W, 3] to the same shape; noise is drawn by `image`, a number of 64 bits."""
        strength = SEVERITIES[self.name][self.severity - 1]
        before = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.name == "gaussian noise":
            address = (image, list(SEVERITIES).index(self.name), self.severity)
            draw = int(rng.bits(0, rng.CORRUPTED, address, 1)[0])
            noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(draw >> 1))
            after = (before + 255 * strength * noise).round().clamp(0, 255).to(torch.uint8)
        else:
            after = _TRANSFORMS[self.name](before, strength)
        return after.permute(1, 2, 0).numpy()


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    edge = min(image.shape[-2:])
    sigma *= edge / 224
    kernel = 2 * min(math.ceil(3 * sigma), edge - 1) + 1
    return transforms.gaussian_blur(image, [kernel, kernel], [sigma, sigma])


def _pixelate(image: torch.Tensor, share: float) -> torch.Tensor:
    size = list(image.shape[-2:])
    fewer = [max(1, round(share * edge)) for edge in size]
    coarse = transforms.resize(image, fewer, antialias=True)
    return transforms.resize(coarse, size, interpolation=InterpolationMode.NEAREST)


_TRANSFORMS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "gaussian blur": _blur,
    "brightness": transforms.adjust_brightness,
    "contrast": transforms.adjust_contrast,
    "saturation": transforms.adjust_saturation,
    "jpeg": transforms.jpeg,
    "pixelate": _pixelate,
}
"""uint8 [3, H, W] and a strength to uint8 [3, H, W]."""


def robustness(accuracy: Callable[[Corruption], float], clean: float) -> dict[str, Any]:
    """What corruptions leave of an accuracy: `accuracy` measures in percent, `clean` is the whole.

    Returns corrupted_top1 (the mean over corruptions and severities) and corrupted_share (of
    `clean`) in percent, and the figures themselves: corruption -> five.
    """
    accuracies = {
        name: [accuracy(Corruption(name, severity)) for severity in range(1, len(strengths) + 1)]
        for name, strengths in SEVERITIES.items()
    }
    mean = float(np.mean(list(accuracies.values())))
    return {
        "corrupted_top1": round(mean, 2),
        "corrupted_share": round(100 * mean / clean, 2) if clean else None,
        "corruptions": {name: [round(v, 2) for v in values] for name, values in accuracies.items()},
    }
