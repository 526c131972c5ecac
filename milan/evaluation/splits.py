"""Labelled images to fit on and to measure on: the same for every protocol."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from milan.core import rng
from milan.core.paths import AnyPath
from milan.core.progress import NoProgress, Progress
from milan.errors import DataError, nearest
from milan.evaluation.protocols import EvaluationConfig
from milan.images.classes import ClassTable
from milan.images.manifest import Manifest, build_manifest, describe_source, resolve_data
from milan.images.source import ImageSource
from milan.images.splits import TEST, VALIDATION, WantedSplit


@dataclass
class Split:
    """Labelled images: some rows of a manifest."""

    source: AnyPath
    images: ImageSource
    rows: np.ndarray
    """int64 [n], ascending; the manifest's order is a permuted one, so any part is a sample."""
    labels: np.ndarray
    """int64 [n], classes as the training images number them."""
    training: Split | None = None
    """Of images to measure on: those to fit on."""
    digests: set[str] = field(default_factory=set)
    """Content digests of its images, as far as split_features has read them."""
    repeated: int = 0
    """How many of its images are training images too, as far as split_features has read them."""


def open_splits(config: EvaluationConfig, progress: Progress | None = None) -> tuple[Split, Split]:
    """The images to fit on and those to measure on: `val_data`, or a fifth of `data`, by seed.

    Classes are matched by name; by number where neither has names, or the names are numbers.
    `progress` is told which images these are. Raises DataError for data that is not there, images
    without a label, classes that cannot be matched or that training does not have, and the same
    images in both.
    """
    progress = progress or NoProgress()
    wanted = WantedSplit(config.split)
    source, manifest, labels = _labelled(config.data, wanted, config, progress)
    images, names = ImageSource(manifest, source), manifest.classes
    if config.val_data is None:
        count = len(manifest)
        shuffled = rng.permutation(config.seed, rng.SAMPLE, (0,), count)
        val_rows, rows = map(np.sort, np.split(shuffled, [max(1, count // 5)]))
        train = Split(source, images, rows, labels[rows])
        val = Split(source, images, val_rows, labels[val_rows], training=train)
    else:
        wanted = WantedSplit(config.val_split, (VALIDATION, TEST), "--val-split")
        val_source, val_manifest, _ = _labelled(config.val_data, wanted, config, progress)
        if _all_among(val_manifest, manifest):
            raise DataError(
                f"all {len(val_manifest):,} images of --val-data are training images",
                expected="other images to measure on",
                fix="without --val-data: a fifth of --data is then left for measuring",
            )
        labels, val_labels, names = _matched(manifest, val_manifest)
        val_images = ImageSource(val_manifest, val_source)
        train = Split(source, images, np.arange(len(manifest)), labels)
        rows = np.arange(len(val_manifest))
        val = Split(val_source, val_images, rows, val_labels, training=train)
    _check_classes(train, val, names, config, progress)
    return train, val


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
            fix="move them elsewhere" if manifest.classes else "",
        )
    return manifest.root, manifest, labels


def _all_among(val: Manifest, train: Manifest) -> bool:
    """Whether all images of `val` are at places of images of `train`."""
    roots = [manifest.root.resolve() for manifest in (val, train)]
    inside = [str(root).rstrip("/") + "/" for root in roots]
    if not (inside[0].startswith(inside[1]) or inside[1].startswith(inside[0])):
        return False
    columns = ("path", "group", "index", "offset")
    places = [
        {
            (prefix + path, *place)
            for path, *place in zip(*(m.table[c].to_pylist() for c in columns), strict=True)
        }
        for m, prefix in zip((val, train), inside, strict=True)
    ]
    return places[0] <= places[1]


def _matched(train: Manifest, val: Manifest) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """Labels of both, [n] and [m], in one numbering, and its names. Raises DataError."""
    if (train.classes is None) == (val.classes is None):
        table = ClassTable()
        labels, val_labels = (
            Manifest(table.renumbered(manifest.table, manifest.classes, flag)).labels()
            for manifest, flag in ((train, "--data"), (val, "--val-data"))
        )
        return labels, val_labels, table.names or None
    names = train.classes or val.classes or []
    if len({_number(name) for name in names} - {None}) < len(names):
        named, numbered = ("--data", "--val-data") if train.classes else ("--val-data", "--data")
        odd = next(name for name in names if _number(name) is None or names.count(name) > 1)
        raise DataError(
            f"{named} has class names, such as {odd!r}, and {numbered} has class numbers",
            expected="names in both, or numbers in both: which class a number means is not known",
            fix="class folders, or Parquet files with the names of `label`, for both",
        )
    numbers = np.array([_number(name) for name in names], np.int64)
    labels, val_labels = (
        numbers[m.labels()] if m.classes is not None else m.labels() for m in (train, val)
    )
    return labels, val_labels, None


def _number(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else None


def _check_classes(
    train: Split,
    val: Split,
    names: list[str] | None,
    config: EvaluationConfig,
    progress: Progress,
) -> None:
    """Raises DataError if classes to measure on have no image to fit on.

    Of a sample they may lack some: then `progress` is told.
    """
    unknown = ~np.isin(val.labels, train.labels)
    if not unknown.any() or len(train.rows) < 2:
        return
    lacking = np.unique(val.labels[unknown]).tolist()
    first = names[lacking[0]] if names else lacking[0]
    found = f"{len(lacking):,} classes of --val-data are not in --data, the first is {first!r}"
    if config.val_data is None:
        found = f"{len(lacking):,} classes have images to measure on and none to fit on"
    found += f": {int(unknown.sum()):,} of {len(unknown):,} images could never be right"
    sampled = config.val_data is None or config.limit is not None
    if sampled and not unknown.all():
        progress.note(found)
        return
    known = [names[label] for label in np.unique(train.labels)] if names else []
    raise DataError(
        found,
        expected="classes that there are images of to fit on",
        fix=nearest(first, known) if isinstance(first, str) else "",
    )
