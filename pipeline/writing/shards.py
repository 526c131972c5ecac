"""Zarr: a generation's empty arrays, the files of a shard, an array of embeddings; only here.

Arrays are created by zarr. A shard is written in zarr's bytes, in a fraction of zarr's time
(`python -m benchmarks.staging`). It is forced to the disk (fsync), and brought to where the driver
commits it from (Location.upload). Its SHA-256 is that of what was to be written: a file with other
bytes is found out when it is verified.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from milan.core.paths import AnyPath
from milan.store.format import PIXELS, ArraySpec, CacheSpec
from pipeline.writing.backend import location_of

_CHUNK_BYTES, _SHARD_BYTES = 1 << 20, 64 << 20  # of an array of embeddings


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
    pending: list[np.ndarray] = []
    for piece in pieces:
        pending.append(piece)
        while sum(map(len, pending)) >= size:
            rows = np.concatenate(pending)
            pending = [rows[size:]]
            yield rows[:size]
    if sum(map(len, pending)):
        yield np.concatenate(pending)


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
        files = []
        for name, path in spec.files(block, view).items():
            encoded = pictures if name == PIXELS else _encoded(spec.arrays()[name], arrays[name])
            if file := _write(local, path, encoded):
                files.append(file)
        location.upload(local, files)
    return files


def _encoded(array: ArraySpec, values: np.ndarray) -> Iterator[bytes | memoryview]:
    """The file of one shard of an array, in parts; no part where all `values` are fill.

    Zarr's codecs `bytes` and `crc32c`, and `sharding_indexed` where the array has shards: a chunk
    for each row, then where each begins and its size, twice 2^64 - 1 where there is none.
    """
    kind = np.dtype(array.dtype).newbyteorder("<")
    rows, per_chunk = (array.shard or array.chunk)[0], array.chunk[0]
    values = np.ascontiguousarray(values, kind).reshape(len(values), -1)
    if per_chunk > 1:  # a chunk is whole also where there are fewer rows
        whole = np.full((rows, values.shape[1]), array.fill, kind)
        whole[: len(values)], values = values, whole
    chunks = values.view(np.uint8).reshape(len(values) // per_chunk, -1)
    fill = np.full(values.shape[1] * per_chunk, array.fill, kind).tobytes()
    index, end = np.full((rows // per_chunk, 2), -1, "<i8"), 0
    for number, chunk in enumerate(chunks):
        if chunk.data != fill:
            yield chunk.data
            yield google_crc32c.value(chunk).to_bytes(4, "little")
            index[number] = end, len(chunk) + 4
            end += len(chunk) + 4
    if array.shard and end:
        yield index.tobytes()
        yield google_crc32c.value(index.tobytes()).to_bytes(4, "little")


def _write(folder: Path, path: str, parts: Iterable[bytes | memoryview]) -> dict | None:
    """Write and sync a file; None, and no file, where all parts are empty. Raises OSError."""
    digest, size, file = hashlib.sha256(), 0, None
    try:
        with ExitStack() as stack:
            for part in filter(len, parts):
                if file is None:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(open(folder / path, "wb"))
                file.write(part)
                digest.update(part)
                size += len(part)
            if file is None:
                return None
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(folder)
        raise
    return {"path": path, "bytes": size, "sha256": digest.hexdigest()}
