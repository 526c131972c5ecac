"""Zarr: a generation's empty arrays, the files of a shard, an array of embeddings; only here.

Arrays are created by zarr. A shard is written by tensorstore to a local folder: zarr's bytes in a
quarter of the time (`python -m benchmarks.staging`). It is forced to the disk (fsync), read back
for its SHA-256, and brought to where the driver commits it from (Location.upload).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from milan.core.paths import AnyPath
from milan.store.format import PIXELS, CacheSpec
from milan.store.generation import system_errors
from pipeline.writing.backend import location_of

_CHUNK_BYTES, _SHARD_BYTES = 1 << 20, 64 << 20  # of an array of embeddings
_CONTEXT: Final[dict[str, Any]] = {
    # One core: the others decode images. Files are synced later, with all that is staged.
    "data_copy_concurrency": {"limit": 1},
    "file_io_concurrency": {"limit": 1},
    "file_io_sync": False,
}


def create_arrays(
    root: Path, spec: CacheSpec, attributes: dict, tables: dict[str, np.ndarray]
) -> None:
    """Create a generation at `root`: its group, its arrays without chunks, and small `tables`."""
    group = zarr.create_group(zarr.storage.LocalStore(root), zarr_format=3, attributes=attributes)
    for name, array in spec.arrays().items():
        group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=array.chunk,
            shards=array.shard,
            filters=None,
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            fill_value=array.fill,
            dimension_names=array.dimensions,
        )
    for name, values in tables.items():
        table = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            filters=None,
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        table[...] = values


def write_array(
    root: Path, name: str, shape: tuple[int, ...], dtype: str, pieces: Iterable[np.ndarray]
) -> None:
    """A new group at `root` with the array `name`, from pieces [b, *shape[1:]] in order.

    A shard is about 64 MB, a chunk 1 MB, each at least a row; one shard is in memory at a time.
    """
    row = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    chunk = max(1, min(shape[0], _CHUNK_BYTES // row))
    shard = chunk * max(1, min(-(-shape[0] // chunk), _SHARD_BYTES // (chunk * row)))
    group = zarr.create_group(zarr.storage.LocalStore(root), zarr_format=3)
    array = group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk, *shape[1:]),
        shards=(shard, *shape[1:]),
        filters=None,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        config={"write_empty_chunks": True},
    )
    at = 0
    for values in _regrouped(pieces, shard):
        array[at : at + len(values)] = values
        at += len(values)


def _regrouped(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows, `size` at a time; fewer at the end."""
    held: list[np.ndarray] = []
    for piece in pieces:
        held.append(piece)
        while sum(map(len, held)) >= size:
            rows = np.concatenate(held)
            held = [rows[size:]]
            yield rows[:size]
    if sum(map(len, held)):
        yield np.concatenate(held)


def stage_shard(
    folder: AnyPath,
    spec: CacheSpec,
    block: int,
    view: int,
    arrays: dict[str, np.ndarray],
    pictures: Sequence[bytes] = (),
) -> list[dict]:
    """Write one shard to a staging folder (Backend.staging_folder); returns its files.

    `arrays` has, for each array of the spec, the values of the block's rows, [rows, ...]; rows of
    fill values get no chunk. `pictures` are the encoded views of the rows, if the spec stores them.
    A file is {"path": below `folder`, "bytes": size, "sha256": hexadecimal}. The folder must have
    no file of this shard yet. Raises OSError, and what Location.upload raises.
    """
    location = location_of(folder)
    with location.shard_folder() as local:
        if not any(local.iterdir()):
            create_arrays(local, spec, {}, {})
        files = _write_shard(local, spec, block, view, arrays, pictures)
        location.upload(local, files)
    return files


def _write_shard(
    folder: Path,
    spec: CacheSpec,
    block: int,
    view: int,
    arrays: dict[str, np.ndarray],
    pictures: Sequence[bytes],
) -> list[dict]:
    _write_arrays(folder, spec, block, view, arrays)
    paths = spec.files(block, view)
    if PIXELS in paths and any(pictures):
        (folder / paths[PIXELS]).parent.mkdir(parents=True, exist_ok=True)
        (folder / paths[PIXELS]).write_bytes(b"".join(pictures))
    files = []
    for relative in paths.values():
        path = folder / relative
        if not path.exists():
            continue  # all images of the shard were rejected: there is nothing to store
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files.append({"path": relative, "bytes": path.stat().st_size, "sha256": digest})
    return files


def _write_arrays(
    folder: Path, spec: CacheSpec, block: int, view: int, arrays: dict[str, np.ndarray]
) -> None:
    """Write the values of a block's rows to arrays that have no such shard yet. Raises OSError."""
    import tensorstore

    start, stop = spec.block_rows(block)
    try:
        # One write a shard, not one a chunk.
        with system_errors(), tensorstore.Transaction() as transaction:
            for name, values in arrays.items():
                kvstore = {"driver": "file", "path": str((folder / name).resolve()) + "/"}
                array = tensorstore.open(
                    {"driver": "zarr3", "kvstore": kvstore, "context": _CONTEXT}, open=True
                ).result()
                rows = array.with_transaction(transaction)[start:stop]
                (rows[:, view] if spec.arrays()[name].of_views else rows).write(values).result()
    except OSError as error:
        error.filename = str(folder)
        raise
