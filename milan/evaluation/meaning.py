"""What a figure of few images or few classes means, said beside it."""

from __future__ import annotations

import numpy as np

from milan.core import rng

_ENOUGH = 400  # validation images: two standard errors are then 5 points at most


def chance(train: np.ndarray, val: np.ndarray) -> float:
    """Top-1 in percent of naming the most frequent class of `train` always; labels [n], [m].

    Of several that are as frequent any may be named: the mean over them, for `val` may lack some.
    """
    classes, counts = np.unique(train, return_counts=True)
    frequent = classes[counts == counts.max()]
    return 100 * float(np.isin(val, frequent).mean()) / len(frequent)


def accuracy_interval(correct: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of an accuracy, in percent: bootstrap over images; `correct` [m] bool.

    A resampled accuracy is a binomial draw, for images are right or wrong. Where all are right, or
    none is, every sample is alike: then it is the exact interval (Clopper and Pearson).
    """
    if correct.all() or not correct.any():
        least = round(100 * 0.025 ** (1 / len(correct)), 2)
        return (least, 100.0) if correct.all() else (0.0, round(100 - least, 2))
    draws = rng.generator(seed).binomial(len(correct), correct.mean(), size=10_000)
    low, high = np.percentile(100 * draws / len(correct), [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def doubts(train: np.ndarray, val: np.ndarray, *, neighbours: int = 0) -> list[str]:
    """Why top-1 of classes says little: a sentence each, none if it does not.

    `train` and `val` are the labels, int [n] and [m], of images to learn from and to measure on;
    `neighbours` vote in a k-NN probe.
    """
    sentences = []
    if len(val) < _ENOUGH:
        sentences.append(
            f"{len(val)} validation images of {len(np.unique(val))} classes: chance is "
            f"{chance(train, val):.0f} %, and figures that differ by less than "
            f"{100 / np.sqrt(len(val)):.0f} points mean the same"
        )
    return sentences + (few_neighbours(len(train), neighbours) if neighbours else [])


def few_neighbours(images: int, neighbours: int) -> list[str]:
    """Why a k-NN probe on so many images says little: a sentence, or none if it does not."""
    if images >= 10 * neighbours:
        return []
    return [
        f"{neighbours} neighbours vote of {images} images in all: k-NN says little, "
        f"with less than {10 * neighbours} images it is mostly how frequent classes are"
    ]
