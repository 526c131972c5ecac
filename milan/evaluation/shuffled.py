"""Batches of frozen features in an order that changes in every epoch, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from milan.core import rng
from milan.core.device import copy_to
from milan.evaluation.features import Context, Labelled


class Batch(NamedTuple):
    """A rank's part of a step's images, on the device."""

    x: torch.Tensor
    """[b, ...]; b may be 0"""
    y: torch.Tensor
    """[b] int64"""
    images: int
    """Of the step, over all ranks."""


class Shuffled:
    """A split's images in steps: files in a random order, and the images within each.

    Images lie in files in a random order already, so a file is a sample. The order depends on the
    seed and the epoch alone: how many ranks there are changes no step. Of each step a rank has
    every r-th image of the split. Its images of a file are kept on the device up to `memory` bytes;
    others are read again.
    """

    def __init__(
        self,
        labelled: Labelled,
        context: Context,
        *,
        step_images: int,
        seed: int,
        memory: int = 0,
        wanted: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """`wanted` says which positions [n] of the split are taken, [n] bool; default: all."""
        self.labelled, self.context = labelled, context
        self.seed, self.room = seed, memory
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows = labelled.features.rows[labelled.places]
        self._positions: dict[int, np.ndarray] = {}
        for number, rows in enumerate(labelled.features.files.ranges):
            positions = np.arange(*np.searchsorted(self._rows, (rows[0], rows[-1] + 1)))
            positions = positions[wanted(positions)] if wanted else positions
            if len(positions):
                self._positions[number] = positions
        self.images = sum(map(len, self._positions.values()))
        self.steps = max(1, -(-self.images // step_images))
        """Of an epoch: with as many images each as can be."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The steps of an epoch; all ranks have as many."""
        files = np.array(list(self._positions))
        order = files[rng.permutation(self.seed, rng.ORDER, (number,), len(files))].tolist()
        fresh = self.labelled.features.pieces([f for f in order if f not in self._kept])
        ends = np.linspace(0, self.images, self.steps + 1).round().astype(int)
        step, seen, parts = 1, 0, list[tuple[torch.Tensor, torch.Tensor]]()
        for file in order:
            positions = self._positions[file]
            own = self._own(positions)
            x, y = self._kept.get(file) or self._read(file, own, *next(fresh))
            rest = positions[
                rng.permutation(self.seed, rng.ORDER, (number, 1 + file), len(positions))
            ]
            while len(rest):
                taken, rest = np.split(rest, [ends[step] - seen])
                index = torch.from_numpy(np.searchsorted(own, self._own(taken))).to(x.device)
                parts.append((x[index], y[index]))
                seen += len(taken)
                if seen == ends[step]:
                    xs, ys = zip(*parts, strict=True)
                    yield Batch(torch.cat(xs), torch.cat(ys), int(ends[step] - ends[step - 1]))
                    step, parts = step + 1, []

    def _own(self, positions: np.ndarray) -> np.ndarray:
        ranks = self.context.ranks
        return positions[positions % ranks.size == ranks.rank]

    def _read(
        self, file: int, own: np.ndarray, features: torch.Tensor, rows: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's images of a file, [n, ...] and [n], in the order of `own`, their places."""
        if len(own) < len(rows):
            features = features[torch.from_numpy(np.searchsorted(rows, self._rows[own]))]
        x = copy_to(features, self.context.device)
        y = copy_to(torch.from_numpy(self.labelled.labels[own]), self.context.device)
        # On a CPU the file is mapped, and the system keeps it.
        if x.device.type != "cpu" and x.nbytes <= self.room:
            self.room -= x.nbytes
            self._kept[file] = x, y
        return x, y
