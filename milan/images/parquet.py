"""Parquet files of images in the Hugging Face schema: opened, checked, and listed as rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from milan.core.paths import AnyPath, answered, check_unicode, is_local, open_below
from milan.errors import DataError
from milan.images.classes import class_name
from milan.images.formats import is_lfs_pointer, lfs_pointer
from milan.images.rows import SCHEMA
from milan.images.tars import joined_captions

T = TypeVar("T")

_PIECE_BYTES = 1 << 30  # of a row group's images, read at once


class NoParquetError(DataError):
    """A file that is damaged, or no Parquet file at all."""


class NoImagesError(DataError):
    """A whole Parquet file that holds something else than images."""


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


def of_parquet(root: AnyPath, name: str, do: Callable[[pq.ParquetFile], T]) -> T:
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


def check_schema(schema: pa.Schema, where: object) -> None:
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


def rows_by_group(
    reader: pq.ParquetFile, label: str, name: str
) -> tuple[list[tuple[int, pa.Table]], list[str] | None]:
    """(bytes, rows) of each row group, and the class names."""
    schema = reader.schema_arrow
    check_schema(schema, label)
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
