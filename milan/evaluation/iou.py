"""Intersection over union of masks, by torchmetrics; its interval by a bootstrap over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from milan.core import rng
from milan.errors import ConfigError
from milan.images.masks import IGNORED

_DRAWS = 1000
_CELLS = 4_000_000  # of resampled areas, at once


class Areas(NamedTuple):
    """Pixels of an image by class, [C] int64 each: all that its part in an IoU is."""

    both: np.ndarray
    """Named rightly."""
    truth: np.ndarray
    named: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How well masks agree over all images: percent, and None for a class that nothing is of."""

    miou: float
    """Mean of the classes that are in a mask or are named."""
    interval: tuple[float, float]
    """95 % of miou, over images."""
    pixel_accuracy: float
    class_accuracy: float
    """Mean over the classes that are in a mask, of the share of their pixels named rightly."""
    iou: list[float | None]
    accuracy: list[float | None]


def require_torchmetrics() -> Any:
    """torchmetrics' classification metrics. Raises ConfigError where it is not installed."""
    try:
        import torchmetrics.classification as metrics
    except ImportError as error:
        raise ConfigError(
            f"segmentation is measured by torchmetrics: {error}",
            fix="pip install 'milan-pretrain[dense]'",
        ) from None
    return metrics


def confusion(named: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """[C, C] int64: pixels of the class (row) that were named (column); truth -1 does not count.

    `named` and `truth` [H, W] int64 on one device.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(
        named.flatten(), truth.flatten(), classes, ignore_index=IGNORED, validate_args=False
    )


def areas(counts: np.ndarray) -> Areas:
    """The areas that a confusion matrix [C, C] has."""
    return Areas(counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0))


def agreement(counts: np.ndarray, images: Areas, *, seed: int = 0) -> Agreement:
    """The figures of a confusion matrix [C, C] over m images, whose areas are [m, C] each."""
    metrics, classes = require_torchmetrics(), len(counts)
    matrix = torch.from_numpy(counts)

    def figure(kind: Any, **how: Any) -> Any:
        metric = kind(classes, sync_on_compute=False, **how)  # the matrix is of all ranks
        metric.update(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        metric.confmat = matrix
        return metric.compute()

    iou = figure(metrics.MulticlassJaccardIndex, average="none").tolist()
    miou = float(figure(metrics.MulticlassJaccardIndex, average="macro"))
    both, truth, named = areas(counts)
    there, seen = truth > 0, truth + named > 0
    shares = both / np.maximum(truth, 1)
    return Agreement(
        miou=100 * miou,
        interval=_interval(images, seed=seed),
        pixel_accuracy=100 * float(both.sum() / max(1, truth.sum())),
        class_accuracy=100 * float(shares[there].mean()) if there.any() else 0.0,
        iou=[100 * value if known else None for value, known in zip(iou, seen, strict=True)],
        accuracy=[
            100 * float(value) if known else None
            for value, known in zip(shares, there, strict=True)
        ],
    )


def _interval(images: Areas, *, seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean IoU, in percent: images are drawn again and again."""
    count, classes = images.both.shape
    generator = rng.generator(seed)
    both, union = (
        images.both.astype(float),
        (images.truth + images.named - images.both).astype(float),
    )
    means = []
    at_once = max(1, _CELLS // max(1, count + 2 * classes))
    for first in range(0, _DRAWS, at_once):
        draws = min(at_once, _DRAWS - first)
        times = generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)
        hit, all_ = times @ both, times @ union
        seen = all_ > 0
        iou = np.divide(hit, all_, out=np.zeros_like(hit), where=seen)
        means.append(iou.sum(axis=1) / np.maximum(1, seen.sum(axis=1)))
    low, high = np.percentile(100 * np.concatenate(means), [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)
