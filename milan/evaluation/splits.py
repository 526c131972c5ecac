"""Labelled images to fit on and to measure on: the same for every protocol."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from milan.core import rng
from milan.core.paths import AnyPath
from milan.core.progress import NoProgress, Progress
from milan.errors import DataError
from milan.evaluation.protocols import EvaluationConfig
from milan.images.manifest import Manifest, build_manifest, describe_source, resolve_data
from milan.images.source import ImageSource
from milan.images.splits import TEST, VALIDATION, WantedSplit


@dataclass(frozen=True)
class Split:
    """Labelled images: some rows of a manifest."""

    source: AnyPath
    images: ImageSource
    rows: np.ndarray
    """int64 [n], ascending; the manifest's order is a permuted one, so any part is a sample."""
    labels: np.ndarray
    """int64 [n], classes as the training images number them."""


def open_splits(config: EvaluationConfig, progress: Progress | None = None) -> tuple[Split, Split]:
    """The images to fit on and those to measure on: `val_data`, or a fifth of `data`, by seed.

    `progress` is told which images these are. Raises DataError for data that is not there, images
    without a label, and classes to measure on that training does not know.
    """
    progress = progress or NoProgress()
    wanted = WantedSplit(config.split)
    source, manifest, labels = _labelled(config.data, wanted, config, progress)
    images = ImageSource(manifest, source)
    if config.val_data is None:
        count = len(manifest)
        shuffled = rng.permutation(config.seed, rng.SAMPLE, (0,), count)
        val, train = np.split(shuffled, [max(1, count // 5)])
        parts = [Split(source, images, rows, labels[rows]) for rows in map(np.sort, (train, val))]
        return parts[0], parts[1]
    wanted = WantedSplit(config.val_split, (VALIDATION, TEST), "--val-split")
    val_source, val_manifest, val_labels = _labelled(config.val_data, wanted, config, progress)
    val_images = ImageSource(val_manifest, val_source)
    val_labels = _same_classes(manifest, val_manifest, val_labels)
    return (
        Split(source, images, np.arange(len(manifest)), labels),
        Split(val_source, val_images, np.arange(len(val_manifest)), val_labels),
    )


def _labelled(
    name: str, wanted: WantedSplit, config: EvaluationConfig, progress: Progress
) -> tuple[AnyPath, Manifest, np.ndarray]:
    """(root, images, labels) of a data set."""
    source = resolve_data(name, config.data_root)
    manifest = build_manifest(source, seed=config.seed, limit=config.limit, split=wanted)
    for line in describe_source(manifest, wanted.flag):
        progress.note(line)
    labels = manifest.labels()
    if (labels < 0).any():
        first = manifest.key(int(np.flatnonzero(labels < 0)[0]))
        raise DataError(
            f"{source} has {int((labels < 0).sum())} images without a label, such as {first!r}",
            expected="class folders, a `label` column, or .cls members of tars",
        )
    return manifest.root, manifest, labels


def _same_classes(train: Manifest, val: Manifest, labels: np.ndarray) -> np.ndarray:
    """Labels of `val` as numbers of `train`, matched by class name where both have names."""
    if train.classes is None or val.classes is None or train.classes == val.classes:
        return labels
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in number]
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of --val-data are not in --data, the first is {unknown[0]!r}",
            expected="the same class names in both",
        )
    return np.array([number[name] for name in val.classes])[labels]
