"""One committed generation of a store: its records and arrays, verified as they are read.

A shard is checked at its first use (the digest of its record, the sizes of its files), every chunk
by its crc32c, and every row by the crc32c in its record: a value that was damaged, shifted or
swapped is never returned. The only module that uses tensorstore.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property, singledispatch
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from milan.core.paths import (
    AnyPath,
    Url,
    answered,
    as_path,
    is_local,
    map_files,
    probe,
    read_file,
    read_parts,
    size_of,
)
from milan.core.retry import described
from milan.errors import CacheError, DataError
from milan.images.manifest import Manifest
from milan.store.format import (
    FIDELITY,
    MANIFEST,
    ORIGIN,
    PIXELS,
    SHARDS,
    Entry,
    parse_group,
    read_group_file,
    read_json,
    record_name,
)
from milan.store.local_cache import File, LocalCopies

_ORIGIN: dict[str, Any] = {
    "data": str, "data_root": str, "data_root_from_store": str | None, "teacher": dict,
    "batch_size": int,
}  # fmt: skip
_CACHED_CHECKSUMS = 256  # shards, in each loader worker: two windows, some 20 MB
_TRIES = 8  # another run may evict a local copy before it is read
_STATUS = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|ABORTED")
_PAUSE = 0.01  # seconds before the second try, doubled for each one more: 1.3 s in all


class ShardChecksums(NamedTuple):
    """The part of a record that reading needs: 72 KB for 1,024 rows; as parsed JSON 370 KB."""

    first: int
    """First row, inside the generation."""
    crc32c: dict[str, np.ndarray]
    """Array name -> [rows] int64; -1 where there is no target."""
    pixels: np.ndarray
    """[rows] int64: crc32c of the pixels that the teacher saw."""
    digests: np.ndarray
    """[rows] S32: digests of the images' bytes; empty for an image that could not be read."""
    files: tuple[File, ...]
    ends: np.ndarray
    """[rows] int64: the end of each row's picture, in bytes of the shard's file of stored views."""


def _numbers(values: list[int | None]) -> np.ndarray:
    return np.array([-1 if value is None else value for value in values], np.int64)


_reader: dict[str, int] = {}
"""`pid` of the process that uses tensorstore: if it is used after a fork, the child aborts."""


class Generation:
    """One committed group of a store; rows and views count through the whole store."""

    def __init__(self, store: AnyPath, entry: Entry) -> None:
        self.store, self.entry = store, entry
        self.root: AnyPath = store / entry.path
        data = read_group_file(self.root)
        self.spec, self.attributes = parse_group(self.root, data)
        if self.attributes["fingerprint"] != entry.fingerprint:
            raise CacheError(f"{store}: index and {entry.path} are of different stores")
        self._verify("zarr.json", data)
        self._open: dict[str, Any] = {}
        self._checksums: OrderedDict[tuple[int, int], ShardChecksums] = OrderedDict()
        self.local: LocalCopies | None = None
        """The local cache that its shards are read from; None: they are read from the store."""

    def __getstate__(self) -> dict:
        # Open arrays and tables are not sent to other processes.
        state = {k: v for k, v in self.__dict__.items() if k != "shards"}
        return state | {"_open": {}, "_checksums": OrderedDict()}

    def holds_rows(self, rows: np.ndarray) -> np.ndarray:
        """[B] bool"""
        return (rows >= self.entry.rows[0]) & (rows < self.entry.rows[1])

    def holds(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B] bool"""
        first, last = self.entry.views
        return self.holds_rows(rows) & (views >= first) & (views < last)

    def read_verified(self, name: str) -> bytes:
        """A small file of the generation, verified by its digest in the index."""
        path = self.root / name
        try:
            data = read_file(path)
        except OSError as error:
            raise CacheError(f"{path} is gone: {error.strerror or error}") from None
        self._verify(name, data)
        return data

    def _verify(self, name: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != self.entry.files.get(name):
            raise CacheError(
                f"{self.root / name} is damaged or of another store", expected="its digest"
            )

    @property
    def origin(self) -> dict:
        """The extraction: data, data_root, data_root_from_store, teacher, batch_size, versions.

        Raises CacheError if one of these is not there: it is in no digest.
        """
        origin = read_json(self.root / ORIGIN)
        if not isinstance(origin, dict) or any(
            not isinstance(origin.get(name), kind) for name, kind in _ORIGIN.items()
        ):
            raise CacheError(
                f"{self.root / ORIGIN} is damaged",
                expected="an object with " + ", ".join(_ORIGIN),
                fix="--data-root FOLDER (or a URL), or a copy of that file",
            )
        return origin

    def roots(self) -> list[AnyPath]:
        """Where the images were at extraction: relative to the store, which may have been moved
        together with them, then absolute. Raises CacheError if that is not recorded.
        """
        origin = self.origin
        roots = [as_path(origin["data_root"])]
        if origin["data_root_from_store"] and is_local(self.store):
            beside = self.store.resolve() / origin["data_root_from_store"]
            roots.insert(0, beside.resolve())
        return roots

    def find_data_root(self, sample: list[str], data_root: str | None = None) -> AnyPath:
        """The folder, or URL, that holds one of the files `sample` (paths of the manifest).

        Looked at: `data_root` if given; else those recorded at extraction. Raises DataError.
        """
        roots = [as_path(data_root)] if data_root else self.roots()
        root = first_with(roots, sample)
        if root is None:
            raise not_found(self.store, roots, sample)
        return root

    @property
    def fidelity(self) -> dict:
        """How closely decoded features match the teacher's own (pipeline.extraction.fidelity).

        Empty if no image of the sample could be decoded.
        """
        return json.loads(self.read_verified(FIDELITY))

    def manifest(self) -> Manifest:
        """The images of this generation's rows."""
        manifest = Manifest.read(pa.BufferReader(self.read_verified(MANIFEST)))
        if manifest.digest() != self.spec.manifest:
            raise CacheError(f"{self.root / MANIFEST} is damaged or of another store")
        return manifest

    @cached_property
    def shards(self) -> pa.Table:
        """The shard table, ordered by block and view: `record` (SHA-256), `sizes`, `bad`."""
        return pq.read_table(pa.BufferReader(self.read_verified(SHARDS)))

    def bad(self) -> Iterator[tuple[int, str]]:
        """(row, reason) of the images without targets."""
        if not self.entry.bad:
            return
        shards = np.flatnonzero(np.asarray(self.shards["bad"]))
        for shard in shards[shards % self.spec.views == 0].tolist():
            record = self.intact_record(shard // self.spec.views, 0)
            for row, why in record["bad"].items():
                yield self.spec.first_row + int(row), why

    def sizes(self) -> np.ndarray:
        """[shards, arrays by name] int64: bytes of each file; -1 where there is none."""
        sizes = self.shards["sizes"].combine_chunks().flatten().to_numpy()
        return sizes.reshape(self.spec.shards, -1)

    def files(self) -> Iterator[tuple[str, int]]:
        """(path inside the generation, bytes) of every shard file."""
        names = list(self.spec.files(0, 0))
        for shard, sizes in enumerate(self.sizes().tolist()):
            paths = self.spec.files(*divmod(shard, self.spec.views))
            for name, size in zip(names, sizes, strict=True):
                if size >= 0:
                    yield paths[name], size

    def record(self, block: int, view: int) -> dict:
        """The commit record of a shard (block and view count inside the generation), verified.

        Its digest is checked against the shard table and the sizes of its files against the record.
        Raises CacheError.
        """
        record = self.intact_record(block, view)
        for file in record["files"]:
            try:
                size = size_of(self.root / file["path"])
            except OSError:
                size = None
            if size != file["bytes"]:
                raise CacheError(
                    f"{self.root / file['path']} is damaged: "
                    + ("it is gone" if size is None else f"{size:,} bytes"),
                    expected=f"{file['bytes']:,} bytes",
                    fix=f"milan repair {self.store}",
                )
        return record

    def intact_record(self, block: int, view: int) -> dict:
        """The commit record of a shard whose files may be damaged. Raises CacheError."""
        name = record_name(block, view)
        expected = self.shards["record"][block * self.spec.views + view].as_py()
        try:
            data = read_file(self.root / "records" / name)
        except OSError as error:
            raise CacheError(
                f"record {name} of {self.root} is gone: {error.strerror or error}"
            ) from None
        if hashlib.sha256(data).digest() != expected:
            raise CacheError(f"record {name} of {self.root} is damaged", expected="its digest")
        return json.loads(data)

    def checksums(self, block: int, view: int) -> ShardChecksums:
        """Of a shard; those of the shards used last are cached. Raises CacheError."""
        if (block, view) not in self._checksums:
            record = self.record(block, view)
            self._checksums[block, view] = ShardChecksums(
                record["rows"][0],
                {name: _numbers(values) for name, values in record["crc32c"].items()},
                _numbers(record["pixels"]),
                np.array([digest or "" for digest in record["digests"]], "S32"),
                tuple(File(f["path"], f["bytes"], f["sha256"]) for f in record["files"]),
                _numbers(record.get("ends", [])),
            )
            if len(self._checksums) > _CACHED_CHECKSUMS:
                self._checksums.popitem(last=False)
        self._checksums.move_to_end((block, view))
        return self._checksums[block, view]

    def pixel_checksums(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B] int64: crc32c of the pixels that the teacher saw of (rows[i], views[i])."""
        sums = np.empty(len(rows), np.int64)
        for shard, at, inside in self._by_shard(rows, views):
            sums[at] = self.checksums(*shard).pixels[inside]
        return sums

    def image_digests(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B] S32: digests of the images' bytes at extraction."""
        digests = np.empty(len(rows), "S32")
        for shard, at, inside in self._by_shard(rows, views):
            digests[at] = self.checksums(*shard).digests[inside]
        return digests

    def content_digest(self, row: int, view: int) -> str:
        """Digest of the image's bytes at extraction; empty if they could not be read."""
        local = row - self.spec.first_row
        checksums = self.checksums(local // self.spec.shard_size, view - self.spec.first_view)
        return checksums.digests[local - checksums.first].decode()

    def _by_shard(
        self, rows: np.ndarray, views: np.ndarray
    ) -> Iterator[tuple[tuple[int, int], np.ndarray, np.ndarray]]:
        """((block, view) inside the generation, which i, their places inside the shard) of each
        shard with some of (rows[i], views[i])."""
        blocks, inside = np.divmod(rows - self.spec.first_row, self.spec.shard_size)
        shards = blocks * self.spec.views + views - self.spec.first_view
        order = np.argsort(shards, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(rows) else ():
            block, view = divmod(int(shards[at[0]]), self.spec.views)
            yield (block, view), at, inside[at]

    def use_local(self, folder: Path, limit: int) -> None:
        """Read from a local cache of at most `limit` bytes below `folder`."""
        local = LocalCopies(self.root, folder, self.entry.digest, limit)
        local.prepare(self.spec.view_arrays(), self.read_verified)
        self.local = local

    def fetch(self, block: int, view: int, *, protected: Collection[Path] | None = None) -> bool:
        """Have a shard (numbers inside the generation) in the local cache, if one is used.

        See LocalCopies.fetch.
        """
        if self.local is None or self.local.has(block, view):
            return True
        return self.local.fetch(block, view, self.checksums(block, view).files, protected=protected)

    def shards_of(self, rows: np.ndarray, views: np.ndarray) -> list[tuple[int, int]]:
        """(block, view) inside the generation of each shard with some of (rows[i], views[i])."""
        return [shard for shard, _, _ in self._by_shard(rows, views)]

    def packed(self, rows: np.ndarray, views: np.ndarray) -> list[bytes]:
        """The stored pictures of (rows[i], views[i]), as images.views.unpack takes them.

        Raises CacheError.
        """
        shards = list(self._by_shard(rows, views))
        wanted = []
        for shard, _, inside in shards:
            ends = self.checksums(*shard).ends
            starts = np.where(inside > 0, ends[inside - 1], 0)
            wanted.append((shard, inside, np.stack([starts, ends[inside] - starts], axis=1)))
        packed = [b""] * len(rows)
        read = map_files((self.local or self).root, lambda parts: self._pictures(*parts), wanted)
        for (_, at, _), pictures in zip(shards, read, strict=True):
            for i, picture in zip(at.tolist(), pictures, strict=True):
                packed[i] = picture
        return packed

    def _pictures(
        self, shard: tuple[int, int], inside: np.ndarray, parts: np.ndarray
    ) -> list[bytes]:
        """`parts` [n, 2] of the file of a shard's pictures: (first byte, bytes)."""
        path, why = self.spec.pictures_file(*shard), ""
        for _ in self._tries():
            self.fetch(*shard)
            try:
                return read_parts((self.local or self).root / path, parts.tolist())
            except OSError as error:
                why = described(error)
        raise self._damaged(PIXELS, shard[0] * self.spec.shard_size + int(inside[0]), shard[1], why)

    def read(self, names: list[str], rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """array name -> the values of (rows[i], views[i]), each row verified. Raises CacheError."""
        local, view = rows - self.spec.first_row, views - self.spec.first_view
        shards = list(self._by_shard(rows, views))
        checksums = [self.checksums(*shard) for shard, _, _ in shards]
        values = self._values(names, local, view, [shard for shard, _, _ in shards])
        for name in names:
            stored = np.empty(len(rows), np.int64)
            for (_, at, inside), sums in zip(shards, checksums, strict=True):
                stored[at] = sums.crc32c[name][inside]
            wrong = np.flatnonzero([google_crc32c.value(value) for value in values[name]] != stored)
            if len(wrong):
                row, v = int(local[wrong[0]]), int(view[wrong[0]])
                raise self._damaged(name, row, v, "it is intact, but of another row, view or run")
        return values

    def _tries(self) -> Iterator[None]:
        """Twice; of local copies more often, with pauses in which another run may be done.

        A file that changes while it is read fails a reader that takes the next bytes of it; the
        second time it is whole, or the damage stays. Pauses are random: two runs that evict each
        other's shards must not do so in step.
        """
        yield
        yield
        for attempt in range(_TRIES - 1 if self.local else 0):
            time.sleep(_PAUSE * 2**attempt * random.uniform(0.5, 1.5))
            yield

    def _values(
        self, names: list[str], local: np.ndarray, views: np.ndarray, shards: list[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        for _ in self._tries():
            for shard in shards if self.local else ():
                self.fetch(*shard)
            with suppress(ValueError, RuntimeError, OSError):
                return self.read_arrays(names, local, views)
        probe(self.root)
        if self.local and not all(self.local.has(*shard) for shard in shards):
            raise CacheError(
                f"{len(shards)} shards of a batch do not fit below {self.local.folder} together",
                expected=f"a window of shards within the limit of {self.local.limit:,} bytes",
                fix="a larger --cache-limit",
            )
        raise self._blame(names, local, views)

    def read_arrays(self, names: list[str], *index: np.ndarray) -> dict[str, np.ndarray]:
        """array name -> its values at `index`, or all, whose rows are not verified.

        Raises ValueError, RuntimeError or OSError for damage, and DataError where the machine or
        the network fails.
        """

        def read() -> dict[str, np.ndarray]:
            try:
                with system_errors():
                    futures = {name: self.array(name)[index or ...].read() for name in names}
                    return {name: np.ascontiguousarray(f.result()) for name, f in futures.items()}
            except (ValueError, RuntimeError, OSError):
                # The cache pool also remembers chunks that were missing.
                self._open.clear()
                _context.cache_clear()
                raise

        return answered(self.root, read)

    def array(self, name: str) -> Any:
        """An array as a tensorstore, opened in this process. Raises CacheError after a fork."""
        _check_fork(self.root)
        if name not in self._open:
            local = self.local if name in self.spec.view_arrays() else None
            self._open[name] = open_array((local or self).root / name)
        return self._open[name]

    def _blame(self, names: list[str], local: np.ndarray, views: np.ndarray) -> CacheError:
        """The error for a batch that cannot be read: names the first row that cannot."""
        for i, (row, view) in enumerate(zip(local.tolist(), views.tolist(), strict=True)):
            for name in names:
                try:
                    self.read_arrays([name], local[i : i + 1], views[i : i + 1])
                except (ValueError, RuntimeError, OSError) as error:
                    return self._damaged(name, row, view, str(error))
        return CacheError(f"{self.root}: a batch could not be read, but each of its rows can")

    def _damaged(self, name: str, local: int, view: int, why: str) -> CacheError:
        shard = record_name(local // self.spec.shard_size, view)[:-5]
        return CacheError(
            f"{self.root}: {name} of row {local + self.spec.first_row}, view "
            f"{view + self.spec.first_view} (shard {shard}) cannot be used: {why}",
            expected="the checksums of its record",
            fix=(f"delete {self.local.root}, or " if self.local else "")
            + f"milan repair {self.store}",
        )


def first_with(roots: list[AnyPath], sample: list[str]) -> AnyPath | None:
    """The first of `roots` with one of the files `sample` below it."""
    return next((r for r in roots if any((r / path).exists() for path in sample)), None)


def not_found(store: AnyPath, roots: list[AnyPath], sample: list[str]) -> DataError:
    """The error for images, such as `sample`, that are below none of `roots`."""
    return DataError(
        f"the images of {store} are not below " + ", nor ".join(map(str, roots)),
        expected=f"{sample[0]} in the data root",
        fix="--data-root FOLDER (or a URL)",
    )


def _check_fork(path: AnyPath) -> None:
    if _reader.setdefault("pid", os.getpid()) != os.getpid():
        raise CacheError(
            f"{path}: a cache was read before this process was forked",
            expected="loader workers started by forkserver or spawn",
            fix='DataLoader(..., multiprocessing_context="forkserver")',
        )


def open_array(path: AnyPath) -> Any:
    """A Zarr array as a tensorstore. Raises CacheError if its metadata cannot be used."""
    import tensorstore

    _check_fork(path)

    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        # A missing chunk is an error, never a fill value.
        "fill_missing_data_reads": False,
        # A store does not change while it is open; but the cache pool may have chunks of
        # another store that was at this path before.
        "recheck_cached_metadata": "open",
        "recheck_cached_data": "open",
    }

    def opened() -> Any:
        with system_errors():
            return tensorstore.open(spec, read=True, open=True, context=_context()).result()

    try:
        return answered(path, opened)
    except (ValueError, OSError) as error:
        probe(path)
        raise CacheError(
            f"array {path} cannot be opened: {error}",
            expected="a Zarr array as the store's spec describes it",
        ) from None


def read_array(path: AnyPath) -> np.ndarray:
    """A small Zarr array. Raises CacheError if it is damaged or gone."""

    def read() -> np.ndarray:
        with system_errors():
            return np.asarray(open_array(path).read().result())

    try:
        return answered(path, read)
    except (ValueError, RuntimeError, OSError) as error:
        raise CacheError(f"array {path} is damaged: {error}") from None


@contextmanager
def system_errors() -> Iterator[None]:
    """What tensorstore raises because of the system or a server becomes an OSError with an errno.

    It states the number in its message, or a status: those of abseil, and a server's.
    """
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        text = str(error).partition(" [")[0]
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), text) from None
        status = re.search(r"http_response_code='(\d+)'", str(error))
        if _STATUS.match(text) or (status and status[1] not in ("404", "200", "206")):
            raise OSError(errno.EIO, text) from None
        raise


@singledispatch
def _kvstore(path: AnyPath) -> dict[str, Any]:
    """How tensorstore reaches a folder. Raises CacheError for a URL that it cannot read."""
    return {"driver": "file", "path": str(path.resolve()) + "/"}


@_kvstore.register
def _(path: Url) -> dict[str, Any]:
    fs, name = path.at()
    bucket, _, key = name.partition("/")
    if path.scheme in ("gs", "gcs"):
        return {"driver": "gcs", "bucket": bucket, "path": key + "/"}
    if path.scheme not in ("s3", "s3a"):
        raise CacheError(f"a store at {path}", expected="a path, or a URL of s3:// or gs://")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key + "/"}
    fs.connect()
    # As botocore found it in the environment or a profile: tensorstore reads neither.
    server = fs.s3.meta
    if not server.endpoint_url.endswith(".amazonaws.com"):
        spec |= {"endpoint": server.endpoint_url, "aws_region": server.region_name or "us-east-1"}
    if fs.anon:
        spec["aws_credentials"] = {"type": "anonymous"}
    elif "AWS_ACCESS_KEY_ID" in os.environ:  # the default looks for files first, and warns
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@cache
def _context() -> Any:
    """tensorstore's context, shared by all arrays of a process: one small cache pool.

    The pool is for shard indexes: 16 KB each, 6 MB for the three arrays of a window of shards.
    Chunks pass through it, but none is read twice in an epoch.
    """
    import tensorstore

    return tensorstore.Context(
        {
            "cache_pool": {"total_bytes_limit": 32 << 20},
            "data_copy_concurrency": {"limit": 2},
            # Half a minute in total. The default of 32 attempts waits a quarter of an hour.
            "s3_request_retries": {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"},
        }
    )
