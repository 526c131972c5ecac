"""Reads the bytes of an image by its row: a file, a row of a Parquet row group, a part of a tar."""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from milan.core.paths import AnyPath, answered, as_path, probe, read_below
from milan.core.retry import described
from milan.errors import ImageFault
from milan.images.manifest import Manifest
from milan.images.parquet import parquet_below, read_bytes

_CACHE_BYTES = 512 << 20  # two of the manifest's shuffle windows


class JoinedSource:
    """Images of several sources, one after the other; as ImageSource."""

    def __init__(self, manifest: Manifest, roots: list[tuple[int, AnyPath]]) -> None:
        """`roots`: (first row, where the paths of it and the next rows begin), in order of rows."""
        self._first = [first for first, _ in roots]
        ends = [*self._first[1:], len(manifest)]
        self._parts = [
            ImageSource(manifest.take(np.arange(first, end)), root)
            for (first, root), end in zip(roots, ends, strict=True)
        ]

    def read(self, row: int) -> bytes:
        """The encoded bytes of the image in `row`. Raises as ImageSource.read does."""
        part = bisect(self._first, row) - 1
        return self._parts[part].read(row - self._first[part])


class ImageSource:
    """Reads the images of a manifest below `root`, a path or URL. Safe to use from several threads.

    Sent to another process, it opens files and connections there again.
    """

    def __init__(self, manifest: Manifest, root: str | AnyPath, *, column: str = "image") -> None:
        """`column`: of Parquet files, the one with the pictures."""
        self.root, self.column = as_path(root), column
        columns = manifest.table
        self._paths = columns["path"].combine_chunks()
        self._groups = columns["group"].combine_chunks()
        self._indices = columns["index"].combine_chunks()
        self._offsets = columns["offset"].combine_chunks()
        self._sizes = columns["bytes"].combine_chunks()
        self._groups_read: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups_read": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_groups_read": OrderedDict(), "_lock": Lock()})

    def read(self, row: int) -> bytes:
        """The encoded bytes of the image in `row`.

        Raises ImageFault, missing or unreadable; MachineError for an error of the machine or the
        network that does not pass, which says nothing about the image.
        """
        path = self._paths[row].as_py()
        try:
            if self._groups[row].is_valid:
                return self._of_group(path, self._groups[row].as_py(), self._indices[row].as_py())
            size = self._sizes[row].as_py()
            if self._offsets[row].is_valid:
                return self._of_tar(path, self._offsets[row].as_py(), size)
            return read_below(self.root, path, size=size)
        except (FileNotFoundError, NotADirectoryError):
            probe(self.root)
            raise ImageFault("missing", path) from None
        except OSError as error:
            raise ImageFault("unreadable", f"{path}: {described(error)}") from None
        except (pa.ArrowException, IndexError, KeyError) as error:
            raise ImageFault("unreadable", f"{path}: {type(error).__name__}") from None

    def _of_tar(self, path: str, offset: int, size: int) -> bytes:
        data = read_below(self.root, path, offset=offset, size=size)
        if len(data) < size:
            raise ImageFault("unreadable", f"{path} ends within the image at byte {offset}")
        return data

    def _of_group(self, path: str, group: int, index: int) -> bytes:
        data = self._group(path, group)[index].as_py()
        if data is None:
            raise ImageFault(
                "missing", f"{path}, group {group}, row {index}: {self.column}.bytes is null; "
                f"{self.column}.path alone is not followed"
            )  # fmt: skip
        return data

    def _group(self, path: str, group: int) -> pa.ChunkedArray:
        """The `bytes` column of a row group; the latest ones are cached, up to _CACHE_BYTES."""
        with self._lock:
            if (path, group) in self._groups_read:
                self._groups_read.move_to_end((path, group))
                return self._groups_read[path, group]
            column = answered(self.root / path, lambda: self._read_group(path, group))
            self._groups_read[path, group] = column
            groups = self._groups_read
            while len(groups) > 1 and sum(c.nbytes for c in groups.values()) > _CACHE_BYTES:
                groups.popitem(last=False)
            return column

    def _read_group(self, path: str, group: int) -> pa.ChunkedArray:
        with parquet_below(self.root, path) as reader:
            return read_bytes(reader, group, self.column)
