"""Lists the images of a source as rows, in order of names; nothing is shuffled yet.

A source is a tree of class folders, a folder of images, one or many Parquet files, or one or many
WebDataset tars. Which of them it is shows in the names of its files: Parquet before images before
tars. Only names, sizes, footers, headers and small columns are read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from milan.core.paths import AnyPath, files_below, is_local, map_files, open_below
from milan.errors import DataError
from milan.images.classes import ClassTable
from milan.images.formats import extensions, kind_of_extension
from milan.images.tars import PACKED, packed, read_tar

SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # unique name of the image: its path below the root, as POSIX
        ("path", pa.string()),  # the file with the image, below the root
        ("group", pa.int32()),  # Parquet: row group; else null
        ("index", pa.int32()),  # Parquet: row in that group; else null
        ("offset", pa.int64()),  # tar: first byte of the image in the file; else null
        ("bytes", pa.int64()),  # size of the image; null where the listing does not say
        ("label", pa.int32()),  # class number, null if unknown
        ("caption", pa.string()),
    ]
)


@dataclass(frozen=True)
class Listing:
    """Rows of SCHEMA in order of names, in one or several tables."""

    tables: list[pa.Table]
    group_bytes: list[int] | None = None
    """Bytes of each table, where a table is a row group, read as a whole; None: each image is."""
    classes: list[str] | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    """Files without a row: extension, or what the file is -> count."""


def data_root(source: AnyPath) -> AnyPath:
    """The folder that manifest paths are relative to."""
    return source.parent if source.is_file() else source


def list_images(source: AnyPath) -> Listing:
    """The images of `source`. Raises DataError for a source that cannot be read or used."""
    alone = source.is_file()
    root = source.parent if alone else source
    files = [(source.name, 0)] if alone else sorted(files_below(root))
    names = [name for name, _ in files]
    parquet = [name for name in names if name.endswith(".parquet")]
    images = [(name, size) for name, size in files if name.lower().endswith(extensions())]
    tars = [name for name in names if name.lower().endswith(".tar")]
    if parquet:
        return _list_parquet(root, parquet, _others(names, parquet))
    if alone and images:
        raise DataError(f"{source} is one image", expected="a folder", fix=f"--data {root}")
    if images:
        return _list_folder(images, _others(names, [name for name, _ in images]))
    for name in names:
        if name.lower().endswith(PACKED):
            raise packed(str(root / name))
    if tars:
        return _list_tars(root, tars, _others(names, tars))
    if alone:
        raise DataError(
            f"{source} is a file", expected="a folder of images, a Parquet file or a tar"
        )
    return Listing([SCHEMA.empty_table()], ignored=_others(names, []))


def _others(names: list[str], taken: list[str]) -> dict[str, int]:
    others = set(names) - set(taken)
    kinds = (
        kind_of_extension(os.path.splitext(name)[1].lower()) for name in names if name in others
    )
    return dict(Counter(kind or "without extension" for kind in kinds))


def _check_names(paths: Iterable[str]) -> None:
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"file name {path!r} is not UTF-8", expected="UTF-8 names", fix="rename the file"
            ) from None


# --- folders ------------------------------------------------------------------------------------


def _list_folder(files: list[tuple[str, int | None]], ignored: dict[str, int]) -> Listing:
    paths = [path for path, _ in files]
    _check_names(paths)
    # An image directly in the root means a plain folder; otherwise its subfolders are the classes.
    flat = any("/" not in path for path in paths)
    classes = None if flat else sorted({path.split("/", 1)[0] for path in paths})
    number = {name: i for i, name in enumerate(classes or [])}
    nulls = [None] * len(paths)
    labels = [number[path.split("/", 1)[0]] for path in paths] if classes else nulls
    sizes = [size for _, size in files]
    table = pa.table([paths, paths, nulls, nulls, nulls, sizes, labels, nulls], schema=SCHEMA)
    return Listing([table], classes=classes, ignored=ignored)


# --- tars ---------------------------------------------------------------------------------------


def _list_tars(root: AnyPath, files: list[str], ignored: dict[str, int]) -> Listing:
    tables, counts = [], Counter(ignored)

    def rows(name: str) -> tuple[pa.Table, Counter[str]]:
        try:
            with open_below(root, name, skip=True) as file:
                tar = read_tar(file, str(root / name))
        except OSError as error:
            raise DataError(f"{root / name} cannot be read: {error}") from None
        _check_names(tar.names)
        nulls = [None] * len(tar.names)
        keys = [f"{name}/{member}" for member in tar.names]
        paths = [name] * len(keys)
        return pa.table(
            [keys, paths, nulls, nulls, tar.offsets, tar.sizes, tar.labels, tar.captions],
            schema=SCHEMA,
        ), tar.ignored

    _check_names(files)
    for table, more in map_files(root, rows, files):
        tables.append(table)
        counts.update(more)
    return Listing(tables, ignored=dict(counts))


# --- Parquet ------------------------------------------------------------------------------------


@contextmanager
def parquet_below(root: AnyPath, name: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file `name` below root, its footer read. Raises OSError or pa.ArrowInvalid."""
    if is_local(root):
        with pq.ParquetFile(root / name) as reader:  # faster than through a file of Python
            yield reader
        return
    with open_below(root, name) as file, pq.ParquetFile(file) as reader:
        yield reader


def _list_parquet(root: AnyPath, files: list[str], ignored: dict[str, int]) -> Listing:
    def groups(name: str) -> tuple[str, list[tuple[int, pa.Table]], list[str] | None]:
        try:
            with parquet_below(root, name) as reader:
                return name, *_row_groups(reader, str(root / name), name)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{root / name} cannot be read: {error}") from None

    classes = ClassTable()
    sizes: list[int] = []
    tables: list[pa.Table] = []
    for name, row_groups, names in map_files(root, groups, files):
        sizes += [size for size, _ in row_groups]
        tables += [classes.renumbered(t, names, str(root / name)) for _, t in row_groups]
    return Listing(tables, sizes, classes.names or None, ignored)


def _row_groups(
    reader: pq.ParquetFile, label: str, name: str
) -> tuple[list[tuple[int, pa.Table]], list[str] | None]:
    """(bytes, rows) of each row group, and the class names."""
    schema = reader.schema_arrow
    image = schema.field("image").type if "image" in schema.names else pa.null()
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise DataError(
            f"{label} has columns {', '.join(f'{f.name} {f.type}' for f in schema)}",
            expected="the Hugging Face image schema: a column image{bytes, path}",
        )
    has_path = image.get_field_index("path") >= 0
    columns = ["image.path"] if has_path else []
    columns += [c for c in ("label", "caption") if c in schema.names]
    groups = []
    for group in range(reader.metadata.num_row_groups):
        meta = reader.metadata.row_group(group)
        n = meta.num_rows
        part = reader.read_row_group(group, columns=columns)
        nulls = [None] * n
        paths = part["image"].combine_chunks().field("path").to_pylist() if has_path else nulls
        # After the file's name even where it is the only one: another may come beside it.
        keys = [f"{name}/{p if p else f'{group}.{i}'}" for i, p in enumerate(paths)]
        try:
            labels = part["label"].cast(pa.int32()) if "label" in columns else nulls
            captions = part["caption"].cast(pa.string()) if "caption" in columns else nulls
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"a column of {label} cannot be used: {error}",
                expected="`label` as class numbers, `caption` as text",
            ) from None
        table = pa.table(
            [keys, [name] * n, [group] * n, list(range(n)), nulls, nulls, labels, captions],
            schema=SCHEMA,
        )
        groups.append((meta.total_byte_size, table))
    return groups, _class_names(schema.metadata)


def _class_names(metadata: dict | None) -> list[str] | None:
    raw = (metadata or {}).get(b"huggingface")
    if not raw:
        return None
    try:
        names = json.loads(raw)["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if texts and names else None
