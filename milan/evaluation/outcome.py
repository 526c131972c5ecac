"""What a classifier says of the images to measure on: its figures and its tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core.atomic import write_text
from milan.core.distributed import SINGLE, Ranks
from milan.errors import none_readable
from milan.evaluation.meaning import accuracy_interval

TOP = 5
"""Guesses of top-5; with so many classes and less it means nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a classifier said of m images."""

    labels: np.ndarray
    """[m] int64; -1: a class that it does not know"""
    predicted: np.ndarray
    """[m] int64; -1: the image cannot be read"""
    in_top5: np.ndarray
    """[m] bool: the label is among its five best guesses"""
    names: Sequence[str]
    """Of the classes that it knows."""

    @property
    def read(self) -> np.ndarray:
        """[m] bool: which images count."""
        return self.predicted >= 0

    def figures(self) -> dict[str, Any]:
        """top1, top5 in percent, each with its 95 % interval over images.

        top5 is None with 5 classes and less.
        """
        top1, top5 = ((self.predicted == self.labels)[self.read], self.in_top5[self.read])
        few = len(self.names) <= TOP
        return {
            **percent("top1", top1),
            **(dict.fromkeys(("top5", "top5_interval")) if few else percent("top5", top5)),
        }

    def write_tables(self, folder: Path) -> None:
        """classes.csv, a line a class; confusion.csv, a line for each two that were confused."""
        folder.mkdir(parents=True, exist_ok=True)
        count, known = len(self.names), self.read & (self.labels >= 0)
        # Not as a matrix: of 22,000 classes it would be 4 GB.
        pairs, times = np.unique(
            self.labels[known] * count + self.predicted[known], return_counts=True
        )
        images = np.bincount(self.labels[known], minlength=count).tolist()
        correct, confused = [0] * count, []
        for pair, number in zip(pairs.tolist(), times.tolist(), strict=True):
            label, predicted = divmod(pair, count)
            if label == predicted:
                correct[label] = number
            else:
                confused.append((self.names[label], self.names[predicted], number))
        share = [f"{100 * c / n:.2f}" if n else "" for c, n in zip(correct, images, strict=True)]
        classes = zip(self.names, images, correct, share, strict=True)
        _write(folder / "classes.csv", ("class", "images", "correct", "top1"), classes)
        _write(folder / "confusion.csv", ("is", "taken for", "images"), confused)


class Answers:
    """Collects what a classifier says, a few images after the other."""

    def __init__(self, labels: np.ndarray, names: Sequence[str]) -> None:
        """`labels` [m] int64 of all images to measure on, -1 for a class without a name."""
        self.labels, self.names = labels, names
        self._predicted = np.full(len(labels), -1)
        self._in_top5 = np.zeros(len(labels), bool)

    def see(self, positions: np.ndarray | int, best: torch.Tensor) -> None:
        """`best` [b, up to 5] are classes, the best guess first, of the images at `positions` [b];
        or of b images from that position on."""
        guesses = best.cpu().numpy()
        if isinstance(positions, int):
            positions = np.arange(positions, positions + len(guesses))
        self._predicted[positions] = guesses[:, 0]
        self._in_top5[positions] = (guesses == self.labels[positions][:, None]).any(axis=1)

    def of_all(self, ranks: Ranks = SINGLE) -> Outcome:
        """What `ranks`, each for images of its own, have seen together; all must call it.

        Raises DataError if no image could be read.
        """
        together = torch.from_numpy(np.stack([self._predicted + 1, self._in_top5]))
        ranks.add_up(together)
        predicted, in_top5 = together.numpy()
        outcome = Outcome(self.labels, predicted - 1, in_top5 > 0, self.names)
        if not outcome.read.any():
            raise none_readable("those to measure on")
        return outcome


def percent(name: str, right: np.ndarray) -> dict[str, Any]:
    """The share of `right` [m] bool in percent as figure `name`, and its interval beside it."""
    share = round(100 * float(right.mean()), 2)
    return {name: share, f"{name}_interval": list(accuracy_interval(right))}


def _write(path: Path, head: Sequence[str], rows: Any) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, text.getvalue())
