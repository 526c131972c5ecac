"""Images with masks to fit on and to measure on: every mask is checked before training begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from milan.core import rng
from milan.core.machine import cpu_count
from milan.core.progress import NoProgress, Progress
from milan.errors import DataError, ImageFault, none_readable
from milan.evaluation.config import SegmentConfig
from milan.evaluation.splits import all_among, identity_of
from milan.images.channels import Channels, whole_image
from milan.images.manifest import resolve_data
from milan.images.masks import (
    IGNORED,
    MOST_CLASSES,
    UNKNOWN,
    MaskCoding,
    MaskedImages,
    Palette,
    list_masked,
    read_names,
    upright_size,
)
from milan.images.pairing import FilesOfImages
from milan.images.source import ImageSource
from milan.images.splits import TEST, VALIDATION, WantedSplit
from milan.models.segmenter import fitted_size


@dataclass(frozen=True)
class MaskedSplit:
    """Images with masks to fit on, or to measure on."""

    name: str
    """Where they are."""
    keys: list[str]
    """Name of each image."""
    images: ImageSource
    masks: ImageSource
    rows: np.ndarray
    """int64 [n], places in the sources."""
    coding: MaskCoding
    classes: int
    identity: str
    """Changes with images and masks, their order, and the size or time of any file."""
    beside: FilesOfImages
    """Files of channels that belong to the images."""
    channels: Channels | None = None
    """What is seen of the images in place of RGB."""

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, position: int) -> np.ndarray:
        """An image, uint8 [H, W, 3]; of channels float32 [H, W, C]. Raises ImageFault."""
        return self.seen(int(self.rows[position]))

    def seen(self, row: int) -> np.ndarray:
        """The same by its place in the sources."""
        beside = self.beside.read(row, self.channels)
        return whole_image(self.channels, self.images.read(row), beside)

    def mask(self, position: int) -> np.ndarray:
        """The classes of its pixels, int16 [H, W]; IGNORED where none counts. Raises ImageFault."""
        numbers = self.coding.decode(self.masks.read(int(self.rows[position])))
        if numbers.min(initial=0) == UNKNOWN or numbers.max(initial=0) >= self.classes:
            raise ImageFault("unknown-class", "the mask has changed since it was checked")
        return numbers.astype(np.int16)


@dataclass(frozen=True)
class MaskedData:
    """Both splits, whose classes are numbered alike."""

    train: MaskedSplit
    val: MaskedSplit
    names: list[str]
    """Of the classes."""
    train_pixels: np.ndarray
    """int64 [classes], to train on."""
    rejected: int
    """Pairs that are left out because the mask or the image cannot be read."""
    colours: list[list[int]]
    """Of the classes, as a palette file has them; empty without one."""

    def key(self, position: int) -> str:
        """Name of an image of a batch: training images are counted first."""
        train = len(self.train)
        return self.train.keys[position] if position < train else self.val.keys[position - train]

    @property
    def identity(self) -> str:
        """Changes with images, masks, their order, and what masks mean."""
        sha = hashlib.sha256(repr((self.names, self.train.coding)).encode())
        for split in (self.train, self.val):
            sha.update(split.identity.encode() + split.rows.tobytes())
        return sha.hexdigest()


class _Seen(NamedTuple):
    """What a look at an image's header and its mask has found."""

    counts: np.ndarray
    """int64 [highest class + 1]"""
    ignored: int
    fault: str = ""
    """Why the pair is left out."""
    wrong: tuple[str, str] = ("", "")
    """Why no pair may be used: a key of _ADVICE, and words. The data are not what they seemed."""


def open_masked(
    config: SegmentConfig,
    progress: Progress | None = None,
    channels: Channels | None = None,
    *,
    window: tuple[int, int] | None = None,
) -> MaskedData:
    """The images to fit on and those to measure on (`val_data`, or a fifth of `data` by seed).

    `channels`: what is seen of them in place of RGB. `window` (H, W): strips that it does not fit
    are left out (milan.models.segmenter.fitted_size). Every mask is read once: sizes are compared,
    classes counted. `progress` is told what was found. Raises DataError for images without a mask,
    masks of another size or with numbers that are no class, classes that only images to measure on
    have, and splits without an image; ConfigError if nobody says where the files beside the images
    are.
    """
    progress = progress or NoProgress()
    palette = Palette.read(config.palette) if config.palette else None
    names, colours = _names(config, palette)
    coding = MaskCoding(config.ignore, config.reduce_zero_label, palette)
    wanted = WantedSplit(config.split)
    train = _listed(config.data, wanted, config, progress)
    if config.val_data is None:
        count = len(train)
        shuffled = rng.permutation(config.seed, rng.SAMPLE, (0,), count)
        val_rows, rows = map(np.sort, np.split(shuffled, [max(1, count // 5)]))
        val = train
    else:
        wanted = WantedSplit(config.val_split, (VALIDATION, TEST), "--val-split")
        val = _listed(config.val_data, wanted, config, progress)
        rows, val_rows = np.arange(len(train)), np.arange(len(val))
        if all_among(val.images, train.images):
            raise DataError(
                f"all {len(val):,} images of --val-data are training images",
                expected="other images to measure on",
                fix="without --val-data: a fifth of --data is then left for measuring",
            )
    if not len(rows) or not len(val_rows):
        raise DataError(
            f"{len(rows)} images to fit on and {len(val_rows)} to measure on",
            expected="some of both",
            fix="more images, or --val-data with images of its own",
        )
    splits, pixels, rejected = [], [], 0
    folders = config.student_data, config.student_data if val is train else config.val_student_data
    for listed, chosen, flag, folder in zip(
        (train, val), (rows, val_rows), ("--data", "--val-data"), folders, strict=True
    ):
        split = _split(listed, chosen, coding, len(names) or MOST_CLASSES, folder, channels)
        kept, counts, left_out = _checked(split, bool(names), window, flag, progress)
        splits.append(kept)
        pixels.append(counts)
        rejected += left_out
    if not names:
        names = [str(number) for number in range(len(np.trim_zeros(pixels[0], "b")))]
    _check_classes(pixels[0], pixels[1], names, config, progress)
    train_split, val_split = (replace(split, classes=len(names)) for split in splits)
    return MaskedData(train_split, val_split, names, pixels[0][: len(names)], rejected, colours)


def _names(config: SegmentConfig, palette: Palette | None) -> tuple[list[str], list[list[int]]]:
    """Names and colours of the classes, by number; empty if nobody gave any. Raises DataError."""
    names = list(palette.names) if palette else []
    colours = [list(colour) for colour in palette.colours] if palette else []
    if names and config.ignore == len(names) - 1:  # the last line says what does not count
        names, colours = names[:-1], colours[:-1]
    if names and config.reduce_zero_label:
        names, colours = names[1:], colours[1:]
    if config.classes:
        given = list(read_names(config.classes))
        if names and len(given) != len(names):
            raise DataError(
                f"{config.classes} has {len(given)} classes and {config.palette} {len(names)}",
                expected="as many",
                fix="--palette alone, which names the classes too",
            )
        names = given
    return names, colours


def _listed(
    name: str, wanted: WantedSplit, config: SegmentConfig, progress: Progress
) -> MaskedImages:
    source = resolve_data(name, config.data_root)
    # The seed draws a sample, else the fifth; the order stays.
    seed = config.seed if config.limit else 0
    listed, lines = list_masked(
        source, folder=config.masks, column=config.mask_column, wanted=wanted, seed=seed
    )
    for line in lines:
        progress.note(line)
    return listed.head(config.limit) if config.limit else listed


def _split(
    listed: MaskedImages, rows: np.ndarray, coding: MaskCoding, classes: int, folder: str | None,
    channels: Channels | None,
) -> MaskedSplit:  # fmt: skip
    images, masks = listed.sources()
    every, root = listed.images.keys(), listed.images.root
    beside = FilesOfImages(folder, every, of=root)
    beside.check(channels)
    sha = "".join(identity_of(manifest) for manifest in (listed.images, listed.masks))
    sha = beside.identity_for(sha, channels)
    keys = [every[row] for row in rows.tolist()]
    return MaskedSplit(str(root), keys, images, masks, rows, coding, classes, sha, beside, channels)


def _checked(
    split: MaskedSplit,
    named: bool,
    window: tuple[int, int] | None,
    flag: str,
    progress: Progress,
) -> tuple[MaskedSplit, np.ndarray, int]:
    """The split without pairs that cannot be read, pixels of each class, and how many those are.

    Raises DataError for masks that are not what they were taken for.
    """
    counts, ignored = np.zeros(split.classes, np.int64), 0
    wrong, faults, kept = list[tuple[str, str]](), list[str](), list[int]()
    progress.begin(f"masks of {flag}", len(split), "masks")
    for position, seen in enumerate(_looked_at(split, named, window)):
        if seen.wrong[0]:
            wrong.append((seen.wrong[0], f"{split.keys[position]}: {seen.wrong[1]}"))
        elif seen.fault:
            faults.append(f"{split.keys[position]}: {seen.fault}")
        else:
            kept.append(position)
            counts[: len(seen.counts)] += seen.counts
            ignored += seen.ignored
        progress.advance(position + 1)
    progress.end()
    if wrong:
        raise DataError(
            f"{len(wrong):,} of {len(split):,} masks of {split.name} cannot be used, the first: "
            f"{wrong[0][1]}",
            **_ADVICE[wrong[0][0]],
        )
    if faults:
        progress.note(f"rejected files: {len(faults):,} images or masks, the first is {faults[0]}")
    if not kept:
        raise none_readable(f"{split.name} with its mask", faults[0])
    total = int(counts.sum()) + ignored
    present = int((counts > 0).sum())
    progress.note(
        f"pixels of {flag}: {total:,} in {len(kept):,} masks: {int(counts.sum()):,} of "
        f"{present:,} classes, {ignored:,} ignored ({100 * ignored / max(1, total):.1f} %)"
    )
    positions = np.array(kept)
    keys = [split.keys[position] for position in kept]
    return replace(split, rows=split.rows[positions], keys=keys), counts, len(faults)


_ADVICE = {
    "size": {
        "expected": "a mask with the pixels of its image, as it is shown upright",
        "fix": "scale masks to their images by the nearest pixel, or leave these pairs out",
    },
    "none": {"expected": "a mask for every image", "fix": "leave out what has none"},
    "lossy-mask": {
        "expected": "masks in a format without loss: PNG, TIFF, BMP, GIF or PGM",
        "fix": "the masks from which these were made",
    },
    "mask-of-colours": {
        "expected": "class numbers in grey, or in indices of a palette",
        "fix": "--palette FILE, with a line `red green blue name` for every class",
    },
    "class": {
        "expected": "numbers of classes, from 0, or that of --ignore",
        "fix": "--ignore NUMBER for pixels that do not count, --reduce-zero-label if classes begin "
        "at 1, --classes FILE with all names",
    },
}


def _looked_at(split: MaskedSplit, named: bool, window: tuple[int, int] | None) -> Iterator[_Seen]:
    """What is found in each pair, in order; by a thread a core."""
    threads = cpu_count()
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(split), 16 * threads):  # no more than this is read ahead
            rows = split.rows[first : first + 16 * threads].tolist()
            yield from pool.map(partial(_look, split, named, window), rows)


def _look(split: MaskedSplit, named: bool, window: tuple[int, int] | None, row: int) -> _Seen:
    nothing = np.zeros(0, np.int64)
    try:
        if split.channels:  # whether all are there is known once they are read
            height, width = split.seen(row).shape[:2]
        else:
            height, width = upright_size(split.images.read(row))
        if window:
            fitted_size(height, width, window)
    except ImageFault as fault:
        return _Seen(nothing, 0, str(fault))
    try:
        numbers = split.coding.decode(split.masks.read(row))
    except ImageFault as fault:
        if fault.reason in ("lossy-mask", "mask-of-colours"):
            return _Seen(nothing, 0, wrong=(fault.reason, str(fault)))
        if fault.reason == "missing":
            return _Seen(nothing, 0, wrong=("none", str(fault)))
        return _Seen(nothing, 0, f"its mask: {fault}")
    if numbers.shape != (height, width):
        there = f"{numbers.shape[1]} x {numbers.shape[0]}"
        return _Seen(
            nothing, 0, wrong=("size", f"{there} pixels, and its image has {width} x {height}")
        )
    highest = int(numbers.max(initial=0))
    if (numbers == UNKNOWN).any() or highest >= split.classes:
        unknown = split.coding.first_unknown(split.masks.read(row), split.classes)
        known = f"{split.classes} classes are named" if named else f"{split.classes} are allowed"
        return _Seen(nothing, 0, wrong=("class", f"{unknown} is no class ({known})"))
    counts = np.bincount(numbers[numbers >= 0].ravel(), minlength=highest + 1)
    return _Seen(counts, int((numbers == IGNORED).sum()))


def _check_classes(
    train: np.ndarray, val: np.ndarray, names: list[str], config: SegmentConfig, progress: Progress
) -> None:
    """Raises DataError if nothing can be learnt, or classes to measure on are not among `names`."""
    seen = np.flatnonzero(train)
    if len(seen) < 2:
        raise DataError(
            f"all pixels of the masks to fit on that count are of "
            f"{'no class' if not len(seen) else f'one class, {names[seen[0]]}'}",
            expected="at least two classes",
            fix=f"--ignore NUMBER, if pixels of number {config.ignore} are a class; for masks of "
            "black and white --palette FILE",
        )
    if (unknown := np.flatnonzero(val[len(names) :])).size:
        raise DataError(
            f"masks of --val-data have classes that --data has not, the first is number "
            f"{int(unknown[0]) + len(names)}",
            expected=f"classes 0 to {len(names) - 1}, as in --data",
            fix="--classes FILE with all names, if they are classes; --ignore NUMBER, if not",
        )
    for numbers, said in (
        (np.flatnonzero(train[: len(names)] == 0), "have no pixel to train on"),
        (
            np.flatnonzero((train[: len(names)] > 0) & (val[: len(names)] == 0)),
            "have no pixel to measure on",
        ),
    ):
        if len(numbers):
            progress.note(f"{len(numbers)} of {len(names)} classes {said}: {_some(numbers, names)}")
    measured_only = np.flatnonzero((train[: len(names)] == 0) & (val[: len(names)] > 0))
    if len(measured_only) and len(measured_only) == int((val[: len(names)] > 0).sum()):
        raise DataError(
            f"no class to measure on has a pixel to train on: {_some(measured_only, names)}",
            expected="images of the same classes in both",
            fix="other --val-data, or more images if there is a --limit",
        )


def _some(numbers: np.ndarray, names: list[str]) -> str:
    shown = [names[number] for number in numbers[:5].tolist()]
    return ", ".join(shown) + (", …" if len(numbers) > 5 else "")
