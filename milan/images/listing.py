"""Lists the images of a source as rows, in order of names; nothing is shuffled yet.

A source is a tree of class folders, a folder of images, one or many Parquet files, or one or many
WebDataset tars. Which of them it is shows in its files: Parquet files of images before images
before tars. Only names, sizes, footers, headers and small columns are read. Every file and every
member of a tar is counted, as used or as left out.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from milan.core.paths import (
    AnyPath,
    answered,
    as_data_error,
    check_unicode,
    files_below,
    is_local,
    map_files,
    open_below,
)
from milan.errors import DataError
from milan.images.classes import ClassTable, class_name
from milan.images.formats import extensions, is_lfs_pointer, lfs_pointer
from milan.images.splits import Splits, WantedSplit, find_splits, of_split, take_split
from milan.images.tars import (
    PACKED,
    Tar,
    file_kind,
    joined_captions,
    packed,
    read_tar,
)

T = TypeVar("T")

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique name of the image: its path below the root, as POSIX
        ("path", pa.string()),  # the file with the image, below the root
        ("group", pa.int32()),  # Parquet: row group; else null
        ("index", pa.int32()),  # Parquet: row in that group; else null
        ("offset", pa.int64()),  # tar: first byte of the image in the file; else null
        ("bytes", pa.int64()),  # size of the image; null where the listing does not say
        ("label", pa.int32()),  # class number, null if unknown
        ("caption", pa.string()),  # several of an image have BETWEEN_CAPTIONS in between
    ]
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
_PIECE_BYTES = 1 << 30  # of a row group's images, read at once
_NO_IMAGES = ".parquet without images"
_MARKERS = tuple({name for sets in _MADE_HERE.values() for names in sets for name in names})


class NoParquetError(DataError):
    """A file that is damaged, or no Parquet file at all."""


class NoImagesError(DataError):
    """A whole Parquet file that holds something else than images."""


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
            f"{source} is a file", expected="a folder of images, a Parquet file or a tar"
        )
    files.leave_out(list(files.sizes))
    return files.listed([SCHEMA.empty_table()], {})


def _files_of(source: AnyPath, alone: bool) -> _Files:
    """The files of a source, but those that milan itself has made there."""
    if alone:
        return _Files(source.parent, {source.name: 0}, Counter(), alone=True)
    if not source.is_dir():
        raise DataError(
            f"{source} is neither a file nor a folder", expected="a folder of images, or a file"
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


@contextmanager
def parquet_below(root: AnyPath, name: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file `name` below root, its footer read. Raises OSError or pa.ArrowInvalid."""
    if is_local(root):
        with open_below(root, name):
            pass  # raises for a pipe, which Arrow would wait for
        with pq.ParquetFile(root / name) as reader:  # faster than through a file of Python
            yield reader
        return
    with open_below(root, name) as file:
        try:
            with pq.ParquetFile(file) as reader:
                yield reader
        except (pa.ArrowException, UnicodeError) as error:  # of the content, not the connection's
            raise OSError(f"{type(error).__name__}: {error}") from error


def read_bytes(reader: pq.ParquetFile, group: int, column: str = "image") -> pa.ChunkedArray:
    """`image.bytes` of a row group, in pieces: Arrow reads no struct of 2 GiB at once."""
    meta = reader.metadata.row_group(group)
    rows = max(1, meta.num_rows * _PIECE_BYTES // max(1, meta.total_byte_size))
    batches = reader.iter_batches(rows, row_groups=[group], columns=[f"{column}.bytes"])
    pieces = [batch.column(0).field("bytes") for batch in batches]
    return pa.chunked_array(pieces, pieces[0].type if pieces else pa.binary())


def _no_images(root: AnyPath, described: set[str], name: str) -> tuple[str, str | None]:
    """(name, why it is no Parquet file of images; None if it is one).

    Raises DataError if it cannot be read. One that is damaged is left out where it only describes a
    folder or tar of its name, one of `described`.
    """
    check_unicode(name, "the file name")
    try:
        _of_parquet(root, name, lambda reader: _check_schema(reader.schema_arrow, root / name))
    except NoImagesError:
        return name, _NO_IMAGES
    except NoParquetError:
        if name.removesuffix(".parquet") not in described:
            raise
        return name, "damaged .parquet beside its images"
    return name, None


def _of_parquet(root: AnyPath, name: str, do: Callable[[pq.ParquetFile], T]) -> T:
    """`do` of an opened Parquet file. Raises DataError if it cannot be read: NoParquetError if its
    content is the reason.
    """

    def read() -> T:
        with parquet_below(root, name) as reader:
            return do(reader)

    try:
        return answered(root / name, read)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        if is_lfs_pointer(root, name):
            raise lfs_pointer(root / name) from None
        whole = isinstance(error, OSError) and not isinstance(error.__cause__, pa.ArrowException)
        raise (DataError if whole else NoParquetError)(
            f"{root / name} cannot be read: {error}",
            expected="a whole Parquet file",
            fix="fetch or write it again",
        ) from None


def _list_parquet(files: _Files) -> Listing:
    root = files.root

    def groups(name: str) -> tuple[str, list[tuple[int, pa.Table]], list[str] | DataError | None]:
        try:
            return name, *_of_parquet(root, name, lambda r: _row_groups(r, str(root / name), name))
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


def _check_schema(schema: pa.Schema, where: object) -> None:
    """Raises NoImagesError for other columns than those of the Hugging Face image schema.

    Raises DataError for columns of its names that are of other types, or twice there.
    """
    names = schema.names
    image = schema.field("image").type if names.count("image") == 1 else pa.null()
    fields = [field.name for field in image] if pa.types.is_struct(image) else []
    for column, among in (("image", names), ("label", names), ("caption", names),
                          ("bytes", fields), ("path", fields)):  # fmt: skip
        if among.count(column) > 1:
            raise DataError(
                f"{where} has {among.count(column)} columns called {column!r}",
                expected="each name once",
                fix="write it again without the others",
            )
    if "bytes" not in fields:
        raise NoImagesError(
            f"{where} has columns {', '.join(f'{f.name} {f.type}' for f in schema)}",
            expected="the Hugging Face image schema: a column image{bytes, path}",
        )
    types = {f"image.{field.name}": field.type for field in image}
    types |= {field.name: field.type for field in schema}
    for column, (expected, fits) in _TYPES.items():
        if column in types and not (fits(types[column]) or pa.types.is_null(types[column])):
            raise DataError(
                f"{column} of {where} is {types[column]}", expected=expected, fix=_CAST[column]
            )


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
        pa.types.is_large_binary,
    ))  # fmt: skip


def _inside_list(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a list; another type as it is."""
    return kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (
        pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    ))  # fmt: skip


def _is_number(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in (
        pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string,
        pa.types.is_large_string, pa.types.is_string_view,
    ))  # fmt: skip


_TYPES = {
    "image.bytes": ("binary: the file of each image", _is_bytes),
    "image.path": ("text", _is_text),
    "label": ("class numbers, or class names as text", _is_number),
    "caption": ("text, or lists of text", lambda kind: _is_text(_inside_list(kind))),
}
_CAST = {
    "image.bytes": "datasets: ds.cast_column('image', datasets.Image()), then ds.to_parquet(...)",
    "image.path": "pyarrow: cast it to pa.string(), or leave it out",
    "label": "datasets: ds.class_encode_column('label'), then ds.to_parquet(...)",
    "caption": "pyarrow: cast it to pa.string(), or leave it out",
}


def _as_text(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """A column as text. Raises DataError if some of it is not UTF-8."""
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(
            f"{what} is not all text: {error}",
            expected="UTF-8",
            fix="write it again in UTF-8, or leave the column out",
        ) from None
    return text


def _joined(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """Lists of captions as one text each (Manifest.captions). Raises as `_as_text`."""
    lists = column.combine_chunks()
    values = _as_text(pa.chunked_array([lists.flatten()]), what).to_pylist()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
    texts = [joined_captions(some) for some in np.split(np.array(values, object), ends[:-1])]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _row_groups(
    reader: pq.ParquetFile, label: str, name: str
) -> tuple[list[tuple[int, pa.Table]], list[str] | None]:
    """(bytes, rows) of each row group, and the class names."""
    schema = reader.schema_arrow
    _check_schema(schema, label)
    image = schema.field("image").type
    has_path = image.get_field_index("path") >= 0
    image_path = image.field("path").type if has_path else None
    columns = ["image.path"] if has_path else []
    columns += [c for c in ("label", "caption") if c in schema.names]
    classes = _class_names(schema.metadata, label)
    named = _names_in_labels(reader, label, classes) if "label" in columns else None
    classes = named or classes
    groups = []
    for group in range(reader.metadata.num_row_groups):
        meta = reader.metadata.row_group(group)
        n = meta.num_rows
        part = reader.read_row_group(group, columns=columns)
        nulls = [None] * n
        of_file = f"of {label}, row group {group},"
        paths = nulls
        if has_path:
            column = pa.chunked_array([c.field("path") for c in part["image"].chunks], image_path)
            paths = _as_text(column, f"image.path {of_file}").to_pylist()
        # After the file's name even where it is the only one: another may come beside it.
        keys = [f"{name}/{p if p else f'{group}.{i}'}" for i, p in enumerate(paths)]
        labels: Any = nulls
        captions: Any = nulls
        if "caption" in columns:
            captions = part["caption"]
            if _inside_list(captions.type) != captions.type:
                captions = _joined(captions, f"caption {of_file}")
            captions = _as_text(captions, f"caption {of_file}")
        if named:
            number = {text: i for i, text in enumerate(named)}
            texts = _as_text(part["label"], f"label {of_file}").to_pylist()
            labels = [number.get(class_name(text or "")) for text in texts]
        elif "label" in columns:
            try:
                labels = part["label"].cast(pa.int32())
            except pa.ArrowException as error:
                raise DataError(
                    f"label {of_file} is not all class numbers: {error}",
                    expected=_TYPES["label"][0],
                    fix=_CAST["label"],
                ) from None
        table = pa.table(
            [keys, [name] * n, [group] * n, list(range(n)), nulls, nulls, labels, captions],
            schema=SCHEMA,
        )
        groups.append((meta.total_byte_size, table))
    return groups, classes


def _names_in_labels(
    reader: pq.ParquetFile, where: str, classes: list[str] | None
) -> list[str] | None:
    """The classes where labels are their names, as text: `classes` if all are among them, else
    those in the file, in order; None where labels are numbers.
    """
    kind = reader.schema_arrow.field("label").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(kind) and _is_number(kind)):
        return None
    column = reader.read(columns=["label"])["label"]
    texts = pc.unique(_as_text(column, f"label of {where}")).drop_null()
    try:
        texts.cast(pa.int32())
        return None
    except pa.ArrowException:
        own = sorted({class_name(text) for text in texts.to_pylist()} - {""})
        return classes if {*own} <= {*(classes or ())} else own


def _class_names(metadata: dict | None, where: str) -> list[str] | None:
    raw = (metadata or {}).get(b"huggingface")
    if not raw:
        return None
    try:
        names = json.loads(raw)["info"]["features"]["label"]["names"]
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    except UnicodeError as error:
        raise DataError(
            f"the class names in {where} are not UTF-8: {error}",
            expected="names in UTF-8",
            fix="write the file again",
        ) from None
    except (ValueError, KeyError, TypeError):
        return None
    for text in names if texts else []:
        check_unicode(text, f"class name in {where}:", fix="write the file again")
    return [class_name(name) for name in names] if texts and names else None
