"""Lists the images of a source as rows, in order of names; nothing is shuffled yet.

A source is a tree of class folders, a folder of images, one or many Parquet files, or one or many
WebDataset tars. Which of them it is shows in its files: Parquet files of images before images
before tars. Only names, sizes, footers, headers and small columns are read. Every file and every
member of a tar is counted, as used or as left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from milan.core.paths import (
    AnyPath,
    answered,
    as_data_error,
    check_unicode,
    files_below,
    map_files,
    open_below,
)
from milan.errors import DataError
from milan.images.classes import ClassTable, class_name
from milan.images.formats import extensions
from milan.images.parquet import (
    NoImagesError,
    NoParquetError,
    check_schema,
    of_parquet,
    rows_by_group,
)
from milan.images.rows import SCHEMA
from milan.images.splits import Splits, WantedSplit, find_splits, of_split, take_split
from milan.images.tars import (
    PACKED,
    Tar,
    file_kind,
    packed,
    read_tar,
)

_MADE_HERE = {  # a folder that has one of the first files and one of the second, and what it is
    "a store": ({"zarr.json"}, {"zarr.json"}),
    "a run": ({"run.json"}, {"log.jsonl", "curves.csv", "metrics.json"}),
    "a report": ({"metrics.json"}, {"report.txt", "sheet.png"}),
    "mlflow": ({"mlflow.db"}, {"mlflow.db"}),
    "an mlflow run": ({"meta.yaml"}, {"meta.yaml"}),
}
_PARTS = {
    "a report": ("sheet.png", "curves.png", "evaluation"),
    "mlflow": ("mlartifacts",),
    "an mlflow run": ("artifacts",),
}
"""What in such a folder was made here; else all of it."""
_STATS = "_stats.json"
_NO_IMAGES = ".parquet without images"
_MARKERS = tuple({name for sets in _MADE_HERE.values() for names in sets for name in names})


@dataclass(frozen=True)
class Listing:
    """Rows of SCHEMA in order of names, in one or several tables."""

    root: AnyPath
    """The folder that paths are relative to."""
    file: str | None
    """The file that was named, if it is all; else None."""
    tables: list[pa.Table]
    used: dict[str, int]
    """Files and members of tars that give rows, labels or captions: what they are -> count."""
    ignored: dict[str, int]
    """All others: extension, or why they are left out -> count."""
    split: str | None = None
    """The split that was taken; None if there is nothing to choose from."""
    splits: dict[str, int] = field(default_factory=dict)
    """All splits that there are: name -> files, or images of tars."""
    group_bytes: list[int] | None = None
    """Bytes of each table, where a table is a row group, read as a whole; None: each image is."""
    classes: list[str] | None = None


@dataclass
class _Files:
    """The files below a folder that may be used; the others are counted in `ignored`."""

    root: AnyPath
    sizes: dict[str, int | None]
    """By name, in order of names."""
    ignored: Counter[str]
    alone: bool = False
    """The source is one file: whoever names it has chosen it."""
    split: str | None = None
    splits: dict[str, int] = field(default_factory=dict)
    no_classes: frozenset[str] = frozenset()
    """Folders whose names are not those of classes."""

    def ending(self, *ends: str) -> list[str]:
        """The names that end so."""
        return [name for name in self.sizes if name.lower().endswith(ends)]

    def leave_out(self, names: Iterable[str], why: str | None = None) -> None:
        """Count files as ignored, each by its extension if no reason is given, and forget them."""
        for name in names:
            self.ignored[why or file_kind(name)] += 1
            del self.sizes[name]

    def take(self, names: list[str], wanted: WantedSplit, *, pictures: bool = False) -> None:
        """Keep those of `names` that are of the wanted split, and no other file.

        If they all lie in one folder that is a split, this is the root from then on.
        """
        # Of its download of a folder 00000, img2dataset tells in 00000_stats.json.
        downloads = {n.removesuffix(_STATS) for n in self.sizes if n.endswith(_STATS)}
        kept = set(names)
        self.leave_out([name for name in self.sizes if name not in kept])
        splits = Splits([None] * len(names))
        if not self.alone or wanted.name:
            splits = find_splits(names, pictures=pictures)
        self.split, taken = take_split(splits, wanted, self.root)
        self.splits = splits.counts
        kept = {names[i] for i in taken}
        for name, split in zip(names, splits.of_files, strict=True):
            if name not in kept:
                self.leave_out([name], of_split(split))
        for name in self.sizes:
            check_unicode(name, "the file name")
        self.no_classes = splits.folders | downloads
        tops = {name.partition("/")[0] for name in self.sizes}
        if len(tops) == 1 and (top := tops.pop()) in splits.folders:
            cut = len(top) + 1
            self.root = self.root / top
            self.sizes = {name[cut:]: size for name, size in self.sizes.items()}
            self.no_classes = frozenset(folder[cut:] for folder in self.no_classes)

    def listed(
        self,
        tables: list[pa.Table],
        used: dict[str, int],
        *,
        group_bytes: list[int] | None = None,
        classes: list[str] | None = None,
    ) -> Listing:
        """The listing, when the rows are known."""
        return Listing(
            self.root, next(iter(self.sizes)) if self.alone else None, tables, used,
            dict(+self.ignored), self.split, self.splits, group_bytes, classes,
        )  # fmt: skip


def list_images(source: AnyPath, wanted: WantedSplit | None = None) -> Listing:
    """The images of `source` that are of the wanted split (default: train, if there are splits).

    Raises DataError for a source that cannot be read or used.
    """
    wanted = wanted or WantedSplit()
    alone = source.is_file()
    files = _files_of(source, alone)
    parquet, images, tars = (
        files.ending(".parquet"),
        files.ending(*extensions()),
        files.ending(".tar"),
    )
    if parquet and (images or tars):  # perhaps they only describe the others
        described = {place for name in images for place in _places(name)}
        described |= {name.removesuffix(".tar") for name in tars}
        for name, why in map_files(files.root, partial(_no_images, files.root, described), parquet):
            files.leave_out([name] if why else [], why)
        parquet = files.ending(".parquet")
    if parquet:
        files.take(parquet, wanted)
        return _list_parquet(files)
    if alone and images:
        raise DataError(f"{source} is one image", expected="a folder", fix=f"--data {files.root}")
    if images:
        files.take(images, wanted, pictures=True)
        return _list_folder(files)
    if archives := files.ending(*PACKED):
        raise packed(str(files.root / archives[0]))
    if tars:
        cut = not alone and find_splits(tars, pictures=False).counts  # else their members may be
        files.take(tars, wanted if cut else WantedSplit())
        return _list_tars(files, wanted)
    if alone:
        raise DataError(
            f"{source} is a file",
            expected="a folder of images, a Parquet file or a tar",
            fix=f"--data {source.parent}, its folder",
        )
    files.leave_out(list(files.sizes))
    return files.listed([SCHEMA.empty_table()], {})


def _files_of(source: AnyPath, alone: bool) -> _Files:
    """The files of a source, but those that milan itself has made there."""
    if alone:
        return _Files(source.parent, {source.name: 0}, Counter(), alone=True)
    if not source.is_dir():
        raise DataError(
            f"{source} is neither a file nor a folder",
            expected="a folder of images, or a file",
            fix="--data a folder",
        )
    ignored: Counter[str] = Counter()
    files = _Files(source, dict(sorted(files_below(source, ignored))), ignored)
    made = _made_here(files.sizes)
    if "" in made:
        raise DataError(
            f"{source} is {made['']}: it holds no images to extract",
            expected="a folder of images, Parquet files or tars",
            fix="milan inspect, if you meant a store",
        )
    if made:
        for name in list(files.sizes):
            for place in _places(name):
                if place in made:
                    files.leave_out([name], f"in {made[place]}, {place}")
                    break
    return files


def _made_here(names: Iterable[str]) -> dict[str, str]:
    """Which files and folders milan has made, or its trackers: path -> what it belongs to."""
    markers = defaultdict(set)
    for name in names:
        if name.endswith(_MARKERS):
            folder, _, last = name.rpartition("/")
            markers[folder].add(last)
    made = {}
    for folder, present in markers.items():
        for what, (first, second) in _MADE_HERE.items():
            if present & first and present & second:
                below = f"{folder}/" if folder else ""
                parts = [below + part for part in _PARTS.get(what, ())] or [folder]
                made.update(dict.fromkeys(parts, what))
    return made


def _places(name: str) -> Iterator[str]:
    """The folders that a file lies in, the outermost first, then the file itself."""
    at = name.find("/")
    while at >= 0:
        yield name[:at]
        at = name.find("/", at + 1)
    yield name


# --- folders ------------------------------------------------------------------------------------


def _list_folder(files: _Files) -> Listing:
    paths = list(files.sizes)
    # The class is the first folder that is none of a split; an image right in the root has none.
    class_of: dict[str, str | None] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        names = (place for place in _places(folder) if place not in files.no_classes)
        class_of[folder] = class_name(next(names, "").rpartition("/")[2]) or None
    classes = sorted({name for name in class_of.values() if name})
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(class_of[path.rpartition("/")[0]] or "") for path in paths]
    nulls = [None] * len(paths)
    table = pa.table(
        [paths, paths, nulls, nulls, nulls, list(files.sizes.values()), labels, nulls],
        schema=SCHEMA,
    )
    return files.listed([table], {"images": len(paths)}, classes=classes or None)


# --- tars ---------------------------------------------------------------------------------------


def _list_tars(files: _Files, wanted: WantedSplit) -> Listing:
    root, in_splits = files.root, files.split is not None

    def rows(name: str) -> tuple[pa.Table, Tar, Splits]:
        def read() -> Tar:
            with open_below(root, name, skip=True) as file:
                return read_tar(file, str(root / name))

        with as_data_error(root / name):
            tar = answered(root / name, read)
        for member in tar.names:
            check_unicode(member, f"member of {root / name}:", fix="write the tar again")
        nulls = [None] * len(tar.names)
        keys = [f"{name}/{member}" for member in tar.names]
        paths = [name] * len(keys)
        table = pa.table(
            [keys, paths, nulls, nulls, tar.offsets, tar.sizes, tar.labels, tar.captions],
            schema=SCHEMA,
        )
        splits = Splits([]) if in_splits else find_splits(tar.names, pictures=True)
        return table, tar, splits

    tables, of_members = [], list[Splits]()
    used, ignored = Counter({".tar": len(files.sizes)}), files.ignored
    for table, tar, splits in map_files(root, rows, files.sizes):
        tables.append(table)
        of_members.append(splits)
        used.update({"images": len(table), "labels and captions": tar.annotations})
        ignored.update(tar.ignored)
    if not in_splits and (wanted.name or any(splits.counts for splits in of_members)):
        together = Splits([split for splits in of_members for split in splits.of_files])
        files.split, taken = take_split(together, wanted, root)
        files.splits = together.counts
        keep = np.zeros(len(together.of_files), bool)
        keep[taken] = True
        for split in (s for s, kept in zip(together.of_files, keep, strict=True) if not kept):
            ignored[of_split(split)] += 1
        used["images"] = len(taken)
        pieces = np.split(keep, np.cumsum([len(table) for table in tables])[:-1])
        tables = [table.filter(kept) for table, kept in zip(tables, pieces, strict=True)]
    return files.listed(tables, dict(+used))


# --- Parquet ------------------------------------------------------------------------------------


def _no_images(root: AnyPath, described: set[str], name: str) -> tuple[str, str | None]:
    """(name, why it is no Parquet file of images; None if it is one).

    Raises DataError if it cannot be read. One that is damaged is left out where it only describes a
    folder or tar of its name, one of `described`.
    """
    check_unicode(name, "the file name")
    try:
        of_parquet(root, name, lambda reader: check_schema(reader.schema_arrow, root / name))
    except NoImagesError:
        return name, _NO_IMAGES
    except NoParquetError:
        if name.removesuffix(".parquet") not in described:
            raise
        return name, "damaged .parquet beside its images"
    return name, None


def _list_parquet(files: _Files) -> Listing:
    root = files.root

    def groups(name: str) -> tuple[str, list[tuple[int, pa.Table]], list[str] | DataError | None]:
        try:
            return name, *of_parquet(root, name, lambda r: rows_by_group(r, str(root / name), name))
        except NoImagesError as error:
            return name, [], error

    classes = ClassTable()
    sizes: list[int] = []
    tables: list[pa.Table] = []
    others: list[DataError] = []
    for name, row_groups, names in map_files(root, groups, list(files.sizes)):
        if isinstance(names, DataError):
            others.append(names)
            files.leave_out([name], _NO_IMAGES)
            continue
        sizes += [size for size, _ in row_groups]
        tables += [classes.renumbered(t, names, str(root / name)) for _, t in row_groups]
    if others and not files.sizes:
        raise others[0]
    used = {".parquet": len(files.sizes)}
    return files.listed(tables, used, group_bytes=sizes, classes=classes.names or None)
