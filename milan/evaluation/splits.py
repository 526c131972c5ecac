"""Labelled images to fit on and to measure on: the same for every protocol."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from milan.core import rng
from milan.core.paths import AnyPath, is_local, sizes_below
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError, DataError, nearest
from milan.evaluation.config import ClassificationConfig, LabelledConfig
from milan.evaluation.draws import draw_rows
from milan.images.channels import Channels
from milan.images.classes import ClassTable
from milan.images.manifest import Manifest, build_manifest, describe_source, resolve_data
from milan.images.pairing import FilesOfImages, size_and_time
from milan.images.source import ImageSource
from milan.images.splits import TEST, VALIDATION, WantedSplit

_PLACES = ["key", "path", "group", "index", "offset"]
_PIECE = 1 << 18  # rows looked at at once


@dataclass(frozen=True)
class LabelledSet:
    """The labelled images of one place: a manifest's rows."""

    source: AnyPath
    images: ImageSource
    labels: np.ndarray
    """int64 [rows], as the training images number their classes."""
    identity: str
    """Changes with the images, their order, and the size or time of any file."""
    keys: pa.ChunkedArray
    """Name of each image."""
    names: list[str] | None
    """Of the classes, where they have names."""
    beside: FilesOfImages
    """Files of channels that belong to the images."""

    def identity_for(self, channels: Channels | None) -> str:
        """`identity`, and that of the files beside the images, for a network that sees these."""
        return self.beside.identity_for(self.identity, channels)


@dataclass(frozen=True)
class Split:
    """Some rows of a labelled set: images to fit on, or to measure on."""

    of: LabelledSet
    rows: np.ndarray
    """int64 [n], ascending; the manifest's order is a permuted one, so any part is a sample."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]."""
        return self.of.labels[self.rows]

    def key(self, position: int) -> str:
        """Name of one of its images."""
        return self.of.keys[int(self.rows[position])].as_py()


def open_splits(
    config: ClassificationConfig, progress: Progress | None = None
) -> tuple[Split, Split]:
    """As open_draws, of one draw. Raises ConfigError for settings of several."""
    draws = config.each_draw()
    if len(draws) > 1:
        raise ConfigError(
            f"{len(draws)} draws of training images in one training",
            expected="one draw",
            fix="milan.evaluate, which trains on one after the other",
        )
    (train,), val = open_draws(config, progress)
    return train, val


def open_draws(
    config: ClassificationConfig, progress: Progress | None = None
) -> tuple[list[Split], Split]:
    """The images to fit on, of each draw, and those to measure on.

    Measured is on `val_data`, or on a fifth of `data`, by seed. Classes are matched by name; by
    number where neither has names, or the names are numbers. Where less than all images are learnt
    from, the sets hold only the images of some draw. `progress` is told which images these are.
    Raises DataError for data that is not there, images without a label, classes that cannot be
    matched or that training does not have, the same images in both, and lists that name others.
    """
    progress = progress or NoProgress()
    wanted = WantedSplit(config.split)
    manifest = _labelled(config.data, wanted, config, progress)
    labels, names = manifest.labels(), manifest.classes
    if config.val_data is None:
        count = len(manifest)
        shuffled = rng.permutation(config.seed, rng.SAMPLE, (0,), count)
        val_rows, rows = map(np.sort, np.split(shuffled, [max(1, count // 5)]))
        val_manifest, val_labels = manifest, labels
    else:
        wanted = WantedSplit(config.val_split, (VALIDATION, TEST), "--val-split")
        val_manifest = _labelled(config.val_data, wanted, config, progress)
        if all_among(val_manifest, manifest):
            raise DataError(
                f"all {len(val_manifest):,} images of --val-data are training images",
                expected="other images to measure on",
                fix="without --val-data: a fifth of --data is then left for measuring",
            )
        labels, val_labels, names = _matched(manifest, val_manifest)
        rows, val_rows = np.arange(len(manifest)), np.arange(len(val_manifest))
    drawn = draw_rows(config, manifest, labels, rows, class_names=names, progress=progress)
    beside = config.student_data
    val_beside = beside if val_manifest is manifest else config.val_student_data
    if drawn is None:
        whole = _labelled_set(manifest, labels, names, beside)
        trains = [Split(whole, rows)]
        val = Split(
            whole
            if val_manifest is manifest
            else _labelled_set(val_manifest, val_labels, names, val_beside),
            val_rows,
        )
    else:
        trains = _subsets(manifest, labels, names, drawn, beside)
        (val,) = _subsets(val_manifest, val_labels, names, [val_rows], val_beside)
    for train in trains:
        _check_classes(train, val, names, config, progress)
    return trains, val


def _subsets(
    manifest: Manifest,
    labels: np.ndarray,
    names: list[str] | None,
    parts: list[np.ndarray],
    beside: str | None,
) -> list[Split]:
    """Splits with these rows of a manifest, of a set that holds no others."""
    rows = np.unique(np.concatenate(parts))
    if len(rows) < len(manifest):
        manifest, labels = manifest.take(rows), labels[rows]
    whole = _labelled_set(manifest, labels, names, beside)
    return [Split(whole, np.searchsorted(rows, part)) for part in parts]


def open_images(config: LabelledConfig, progress: Progress) -> LabelledSet:
    """All images of `config.data`, labelled or not: -1 is the label of one without. Raises
    DataError for data that are not there."""
    manifest = _manifest(config.data, WantedSplit(config.split), config, progress)
    return _labelled_set(manifest, manifest.labels(), manifest.classes, config.student_data)


def _labelled_set(
    manifest: Manifest, labels: np.ndarray, names: list[str] | None, beside: str | None
) -> LabelledSet:
    root, keys = manifest.root, manifest.table["key"]
    images = ImageSource(manifest, root)
    files = FilesOfImages(beside, manifest.keys(), of=root)
    return LabelledSet(root, images, labels, identity_of(manifest), keys, names, files)


def identity_of(manifest: Manifest) -> str:
    """SHA-256 of where the images lie, in order, and of size and time of each file.

    Of a file at a URL the size alone is known.
    """
    root, sha, columns = manifest.root, hashlib.sha256(), manifest.table.select(_PLACES)
    for first in range(0, len(manifest), _PIECE):
        for column in columns.slice(first, _PIECE).columns:
            sha.update(repr(column.to_pylist()).encode(errors="surrogatepass"))
    remote = None if is_local(root) else sizes_below(root)
    for path in pc.unique(columns["path"]).to_pylist():
        sha.update(repr(remote(path) if remote else size_and_time(root / path)).encode())
    return sha.hexdigest()


def _labelled(
    name: str, wanted: WantedSplit, config: ClassificationConfig, progress: Progress
) -> Manifest:
    """The images of a data set, each with a label. Raises DataError."""
    manifest = _manifest(name, wanted, config, progress)
    labels = manifest.labels()
    if (labels < 0).any():
        first = manifest.key(int(np.flatnonzero(labels < 0)[0]))
        raise DataError(
            f"{resolve_data(name, config.data_root)} has {int((labels < 0).sum())} images without "
            f"a label, such as {first!r}",
            expected="class folders, a `label` column, or .cls members of tars",
            fix="move them elsewhere"
            if manifest.classes
            else "a folder for each class, with its images",
        )
    return manifest


def _manifest(
    name: str, wanted: WantedSplit, config: LabelledConfig, progress: Progress
) -> Manifest:
    """The images of a data set; `progress` is told which they are. Raises DataError."""
    source = resolve_data(name, config.data_root)
    # The seed draws a sample, else the fifth; the order stays, and with it the features.
    seed = config.seed if config.limit else 0
    manifest = build_manifest(source, seed=seed, limit=config.limit, split=wanted)
    for line in describe_source(manifest, wanted.flag):
        progress.note(line)
    return manifest


def all_among(val: Manifest, train: Manifest) -> bool:
    """Whether all images of `val` are at places of images of `train`."""
    roots = [manifest.root.resolve() for manifest in (val, train)]
    inside = [str(root).rstrip("/") + "/" for root in roots]
    if not (inside[0].startswith(inside[1]) or inside[1].startswith(inside[0])):
        return False
    columns = ("path", "group", "index", "offset")
    images = [
        {
            (prefix + path, *place)
            for path, *place in zip(*(m.table[c].to_pylist() for c in columns), strict=True)
        }
        for m, prefix in zip((val, train), inside, strict=True)
    ]
    return images[0] <= images[1]


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
    config: ClassificationConfig,
    progress: Progress,
) -> None:
    """Raises DataError if classes to measure on have no image to fit on.

    Of a sample they may lack some: then `progress` is told.
    """
    unknown = ~np.isin(val.labels, train.labels)
    if not unknown.any() or len(train.rows) < 2:
        return
    unlearnt = np.unique(val.labels[unknown]).tolist()
    first = names[unlearnt[0]] if names else unlearnt[0]
    found = f"{len(unlearnt):,} classes of --val-data are not in --data, the first is {first!r}"
    if config.val_data is None:
        found = f"{len(unlearnt):,} classes have images to measure on and none to fit on"
    found += f": {int(unknown.sum()):,} of {len(unknown):,} images could never be right"
    sampled = config.val_data is None or config.limit is not None
    if sampled and not unknown.all():
        progress.note(found)
        return
    known = [names[label] for label in np.unique(train.labels)] if names else []
    fix = nearest(first, known) if isinstance(first, str) else ""
    fix = f"the names of --data in --val-data, {fix}" if fix else "--val-data without them"
    if config.val_data is None:
        fix = "more images of each class, or --val-data with images of its own"
    raise DataError(found, expected="classes that there are images of to fit on", fix=fix)
