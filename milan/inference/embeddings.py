"""Files of embeddings: a vector an image (or one for each of its patches), and what it belongs to.

    name.parquet                     key, label, class, embedding: a row an image
    name.npy, name.rows.parquet      [m, F] or [m, N, F]; key, label, class: a row an image
    name.zarr/embedding, rows.parquet inside it       the same, as a Zarr array

Rows are in the order of the manifest, which is a shuffled one. What they were made by is in the
metadata of the Parquet file. Nothing here holds more than some thousand vectors in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milan.errors import DataError
from milan.inference.tables import replaced
from milan.store.generation import open_array, system_errors

ENDINGS = (".parquet", ".npy", ".zarr")
COLUMN = "embedding"
"""The name of the column, and of the Zarr array."""
_ABOUT = b"milan_embedding"
_ANEW = "the milan embed line that made it: it writes it anew"
_PIECE = 8192  # vectors read at once
_IDENTITY = pa.schema([("key", pa.string()), ("label", pa.int64()), ("class", pa.string())])


@dataclass(frozen=True)
class Piece:
    """Some rows of a file that is written."""

    keys: list[str]
    labels: list[int | None]
    classes: list[str | None]
    values: np.ndarray
    """[b, F] or [b, N, F]"""

    def identity(self) -> pa.Table:
        """The columns beside the embedding."""
        return pa.table([self.keys, self.labels, self.classes], schema=_IDENTITY)


def rows_file(path: Path) -> Path:
    """Where keys and labels of a file of embeddings are."""
    beside = {".npy": path.with_suffix(".rows.parquet"), ".zarr": path / "rows.parquet"}
    return beside.get(path.suffix.lower(), path)


def read_about(path: Path) -> dict[str, Any] | None:
    """What a file says it was made by; None if it is no file of embeddings."""
    file = rows_file(path)
    if not file.is_file():  # a pipe might never answer
        return None
    try:
        metadata = pq.read_schema(file).metadata or {}
        return json.loads(metadata[_ABOUT])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def write_parquet(path: Path, pieces: Iterator[Piece], about: dict[str, Any]) -> None:
    """Write `name.parquet`. Raises DataError if it cannot be."""
    shape, dtype = tuple(about["shape"][1:]), pa.from_numpy_dtype(about["dtype"])
    for edge in reversed(shape):
        dtype = pa.list_(dtype, edge)
    schema = _with_about(_IDENTITY.append(pa.field(COLUMN, dtype)), about)
    with replaced(path) as part, pq.ParquetWriter(part, schema) as table:
        for piece in pieces:
            nested = pa.array(piece.values.reshape(-1))
            for edge in reversed(shape):
                nested = pa.FixedSizeListArray.from_arrays(nested, edge)
            columns = [*piece.identity().columns, nested]
            table.write_table(pa.table(columns, schema=schema))


def write_rows(path: Path, pieces: Iterator[Piece], about: dict[str, Any]) -> Iterator[np.ndarray]:
    """The values of the pieces; at the end keys and labels of all are in the Parquet file `path`.

    Raises DataError if it cannot be written.
    """
    with (
        replaced(path) as part,
        pq.ParquetWriter(part, _with_about(_IDENTITY, about)) as table,
    ):
        for piece in pieces:
            table.write_table(piece.identity().replace_schema_metadata(table.schema.metadata))
            yield piece.values


def write_npy(path: Path, pieces: Iterator[Piece], about: dict[str, Any]) -> None:
    """Write `name.npy`, and `name.rows.parquet`. Raises DataError if they cannot be."""
    kind = np.lib.format.dtype_to_descr(np.dtype(about["dtype"]))
    header = {"descr": kind, "fortran_order": False, "shape": tuple(about["shape"])}
    with replaced(path) as part, open(part, "wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for values in write_rows(rows_file(path), pieces, about):
            file.write(np.ascontiguousarray(values).data)


def _with_about(schema: pa.Schema, about: dict[str, Any]) -> pa.Schema:
    return schema.with_metadata({_ABOUT: json.dumps(about)})


class Embeddings:
    """A finished file of embeddings, opened for reading piece by piece."""

    def __init__(self, path: str | Path) -> None:
        """Raises DataError for what is none, or is not whole."""
        self.path = Path(path)
        about = read_about(self.path)
        if about is None:
            raise DataError(
                f"{path} is no file of embeddings",
                expected="a finished store, or what milan embed wrote: " + ", ".join(ENDINGS),
                fix=f"milan embed --out {Path(path).stem or 'embeddings'}.parquet",
            )
        self.about, self.rows = about, pq.read_metadata(rows_file(self.path)).num_rows
        values = self._values if self.path.suffix.lower() != ".parquet" else None
        shape = tuple(values.shape) if values is not None else (self.rows, *about["shape"][1:])
        if shape != tuple(about["shape"]) or shape[0] != self.rows:
            raise DataError(
                f"{path} has embeddings {shape}, and {rows_file(self.path).name} says "
                f"{tuple(about['shape'])}",
                expected="both as milan embed wrote them",
                fix=_ANEW,
            )

    @cached_property
    def identity(self) -> pa.Table:
        """key, label (null if unknown), class: a row an image."""
        return pq.read_table(rows_file(self.path), columns=_IDENTITY.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """[m, F] or [m, N, F]"""
        return tuple(self.about["shape"])

    @cached_property
    def _values(self) -> Any:
        try:
            if self.path.suffix.lower() == ".npy":
                return np.load(self.path, mmap_mode="r", allow_pickle=False)
            with system_errors():
                return open_array(self.path / COLUMN)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.path} is damaged: {str(error)[:200]}",
                expected="the file as milan embed wrote it",
                fix=_ANEW,
            ) from None

    def pieces(self) -> Iterator[np.ndarray]:
        """The embeddings [b, ...] in float32, in order, some thousand at once."""
        step = max(1, _PIECE // int(np.prod(self.shape[1:-1], initial=1)))
        if self.path.suffix.lower() == ".parquet":
            for batch in pq.ParquetFile(self.path).iter_batches(step, columns=[COLUMN]):
                column = batch.column(0)
                while isinstance(column, pa.FixedSizeListArray):
                    column = column.flatten()
                flat = column.to_numpy(zero_copy_only=False)
                yield flat.reshape(batch.num_rows, *self.shape[1:]).astype(np.float32)
            return
        for at in range(0, self.rows, step):
            part = self._values[at : min(at + step, self.rows)]
            yield np.asarray(part if isinstance(part, np.ndarray) else part.read().result(),
                             np.float32)  # fmt: skip

    def vector(self, row: int) -> np.ndarray:
        """One image's embedding, float32."""
        before = 0
        if self.path.suffix.lower() != ".parquet":
            part = self._values[row : row + 1]
            values = part if isinstance(part, np.ndarray) else part.read().result()
            return np.asarray(values, np.float32)[0]
        for piece in self.pieces():
            if row < before + len(piece):
                return piece[row - before]
            before += len(piece)
        raise IndexError(row)
