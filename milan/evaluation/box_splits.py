"""Images with boxes to train on and to measure on: which annotations, and which classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from milan.core import rng
from milan.core.paths import AnyPath, as_data_error, as_path, folders_in, names_in
from milan.core.progress import Progress
from milan.errors import DataError, nearest
from milan.evaluation.coco import COCO, BoxSet, check_dense, read_coco
from milan.evaluation.config import DetectConfig
from milan.images.channels import Channels
from milan.images.manifest import resolve_data
from milan.images.pairing import FilesOfImages
from milan.images.splits import TEST, VALIDATION, WantedSplit, find_splits, take_split

_BESIDE = "_annotations.coco.json"  # among the images, as Roboflow exports


def open_boxes(
    config: DetectConfig, progress: Progress, channels: Channels | None = None
) -> tuple[BoxSet, BoxSet]:
    """Images to train on, and to measure on: of val_data, of --data's own validation, or a fifth.

    `channels`: what is seen of them in place of RGB. Classes are those with a box, in the order of
    their ids. Raises DataError for data that are not there, are not COCO's, or cannot be learnt
    from; ConfigError if nobody says where the files beside the images are.
    """
    check_dense()
    if config.annotations and config.data == DetectConfig.data:  # they alone were given
        source = as_path(config.annotations).parent
    else:
        source = resolve_data(config.data, config.data_root)
    wanted = WantedSplit(config.split)
    file = _annotation_file(source, config.annotations, wanted)
    whole = read_coco(file, source, progress, with_masks=config.masks == "auto")
    val_wanted = WantedSplit(config.val_split, (VALIDATION, TEST), "--val-split")
    val_file, val_source = None, source
    if config.val_data:
        val_source = resolve_data(config.val_data, config.data_root)
        val_file = _annotation_file(val_source, config.val_annotations, val_wanted)
    elif config.val_annotations:
        val_file = _annotation_file(source, config.val_annotations, val_wanted)
    else:
        val_file = _own_validation(source, file, val_wanted)
        val_source = val_file.parent if val_file else source
    if val_file is None:
        count = len(whole)
        order = rng.permutation(config.seed, rng.SAMPLE, (0,), count)
        val_rows, rows = map(np.sort, np.split(order, [max(1, count // 5)]))
        train, val = whole.take(rows), whole.take(val_rows)
        progress.note(f"validated on a fifth of {file}: {len(val):,} images")
    else:
        train = whole
        val = read_coco(val_file, val_source, progress, with_masks=whole.masks is not None)
    train, val = (_limited(part, config) for part in (train, val))
    train, val = _of_same_classes(train, val, sampled=val_file is None or config.limit is not None)
    _check(train, val, progress)
    # Images to measure on that nobody named are beside those to train on.
    folder = config.val_student_data or (None if config.val_data else config.student_data)
    return _seen_by(channels, train, config.student_data), _seen_by(channels, val, folder)


def _seen_by(channels: Channels | None, boxes: BoxSet, folder: str | None) -> BoxSet:
    """The set for a network of `channels`. Raises ConfigError, and DataError for bad files."""
    beside = FilesOfImages(folder, boxes.names, of=boxes.root)
    beside.check(channels)
    return replace(boxes, channels=channels, beside=beside)


def _limited(boxes: BoxSet, config: DetectConfig) -> BoxSet:
    if config.limit is None or config.limit >= len(boxes):
        return boxes
    order = rng.permutation(config.seed, rng.SAMPLE, (1,), len(boxes))
    return boxes.take(np.sort(order[: config.limit]))


def _of_same_classes(train: BoxSet, val: BoxSet, *, sampled: bool) -> tuple[BoxSet, BoxSet]:
    """Both in one numbering: classes with a box to train on, or in a part of the same images.

    Raises DataError for boxes to measure on of a class that cannot be learnt; in a part of the
    images only if that is true of all.
    """
    used, there = (
        {part.classes[label] for label in np.unique(part.labels[~part.crowd])}
        for part in (train, val)
    )
    untrained = sorted(there - used)
    if untrained and (not sampled or not used & there):
        boxes = int(np.isin(val.labels, [val.classes.index(name) for name in untrained]).sum())
        raise DataError(
            f"{len(untrained):,} classes of {val.annotations} have no box in {train.annotations}, "
            f"the first is {untrained[0]!r}: {boxes:,} of {len(val.labels):,} boxes could never be "
            "found",
            expected="classes that there are boxes of to train on",
            fix=nearest(untrained[0], sorted(used)),
        )
    every = dict.fromkeys((*train.classes, *val.classes))
    names = tuple(name for name in every if name in used | there)
    return _renumbered(train, names), _renumbered(val, names)


def _renumbered(boxes: BoxSet, names: tuple[str, ...]) -> BoxSet:
    number = np.array([names.index(c) if c in names else -1 for c in boxes.classes], np.int64)
    return replace(boxes, labels=number[boxes.labels], classes=names)


def _check(train: BoxSet, val: BoxSet, progress: Progress) -> None:
    """Raises DataError if nothing can be learnt or measured."""
    for part, what, flag in (
        (train, "train on", "--annotations"), (val, "measure on", "--val-annotations")
    ):  # fmt: skip
        if not (~part.crowd).any():
            raise DataError(
                f"{part.annotations} has no box to {what} in {len(part):,} images",
                expected="boxes of single objects",
                fix=f"other annotations: {flag} FILE; or more images, if there is a --limit",
            )
    paths = [{str(part.root / name) for name in part.names} for part in (train, val)]
    if common := len(paths[0] & paths[1]):
        found = f"{common:,} of {len(val):,} images to measure on are training images too"
        if common == len(val):
            raise DataError(
                found, expected="other images to measure on",
                fix="without --val-data and --val-annotations: a fifth is then left for measuring",
            )  # fmt: skip
        progress.note(f"{found}: figures are better than on new images")
    if train.masks is not None and val.masks is None:
        raise DataError(
            f"{train.annotations} has masks, and {val.annotations} has none",
            expected="masks in both", fix="--masks none, to detect boxes alone",
        )  # fmt: skip
    untrained = set(range(len(train.classes))) - set(train.labels[~train.crowd].tolist())
    if untrained:
        names = ", ".join(train.classes[label] for label in sorted(untrained))
        progress.note(f"classes without a box to train on, which could never be found: {names}")


# --- files ----------------------------------------------------------------------------------------


def _annotation_file(source: AnyPath, given: str | None, wanted: WantedSplit) -> AnyPath:
    """The JSON of a data set. Raises DataError if there is none, or several."""
    if given is not None:
        for file in (as_path(given), source / given):
            if file.is_file():
                return file
        raise DataError(f"no annotations at {given}", expected=COCO, fix="--annotations FILE")
    if source.is_file():
        return source
    files = _json_files(source)
    if not files and (beside := source.parent / f"{source.name}.json").is_file():
        return beside
    if not files:
        raise DataError(
            f"no annotations in {source}",
            expected=f"a file of {COCO}, in it or in its folder annotations",
            fix="--annotations FILE",
        )
    _, taken = take_split(find_splits(files, pictures=False), wanted, source)
    if len(taken) > 1:
        names = ", ".join(files[i] for i in taken[:3]) + (", …" if len(taken) > 3 else "")
        raise DataError(
            f"{source} has {len(taken)} files of annotations: {names}",
            expected="one of them", fix=f"--annotations {source / files[taken[0]]}",
        )  # fmt: skip
    return source / files[taken[0]]


def _own_validation(source: AnyPath, file: AnyPath, wanted: WantedSplit) -> AnyPath | None:
    """The JSON of the images to measure on beside that of the training images, if there is one."""
    folder = source
    if source.is_file() or not _json_files(source):
        folder = file.parent
    others = [name for name in _json_files(folder) if folder / name != file]
    splits = find_splits([*others, _below(file, folder)], pictures=False).of_files[: len(others)]
    asked = [wanted.name] if wanted.name else list(wanted.defaults)
    for name in asked:
        of_split = [file for file, split in zip(others, splits, strict=True) if split == name]
        if len(of_split) == 1:
            return folder / of_split[0]
    if wanted.name:
        return _annotation_file(folder, None, wanted)
    return None


def _below(file: AnyPath, folder: AnyPath) -> str:
    return str(file).removeprefix(str(folder)).lstrip("/")


def _json_files(folder: AnyPath) -> list[str]:
    """Names below a folder of what may be annotations: COCO's of objects, if such are there."""
    with as_data_error(folder):
        names = [n for n in names_in(folder) if n.endswith(".json") and not n.startswith(".")]
        for below in sorted(folders_in(folder)):
            inside = list(names_in(folder / below)) if below == "annotations" else []
            names += [f"{below}/{n}" for n in inside if n.endswith(".json")]
            if (folder / below / _BESIDE).is_file():
                names.append(f"{below}/{_BESIDE}")
    objects = [name for name in names if name.rpartition("/")[2].startswith("instances_")]
    return sorted(objects or names)
