"""Bytes of an image by its row: from a file, or from a row group of a Parquet file."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pyarrow.parquet as pq

from milan.errors import ImageFault
from milan.manifest import Manifest

_HELD_BYTES = 512 << 20  # two of the manifest's shuffle windows


class ImageSource:
    """Reads the images of a manifest below `root`; safe to use from several threads."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.root = root
        columns = manifest.table
        self._paths = columns["path"].combine_chunks()
        self._groups = columns["group"].combine_chunks()
        self._indices = columns["index"].combine_chunks()
        self._held: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()
        self._lock = Lock()

    def read(self, row: int) -> bytes:
        """The encoded bytes of the image in `row`. Raises ImageFault: missing or unreadable."""
        path = self._paths[row].as_py()
        group = self._groups[row].as_py()
        try:
            if group is None:
                return (self.root / path).read_bytes()
            return self._group(path, group)[self._indices[row].as_py()].as_py() or b""
        except (FileNotFoundError, NotADirectoryError):
            raise ImageFault("missing", path) from None
        except (OSError, pa.ArrowInvalid, IndexError, KeyError) as error:
            raise ImageFault("unreadable", f"{path}: {type(error).__name__}") from None

    def _group(self, path: str, group: int) -> pa.Array:
        """The `bytes` column of a row group; the latest ones are held, up to _HELD_BYTES."""
        with self._lock:
            if (path, group) in self._held:
                self._held.move_to_end((path, group))
                return self._held[path, group]
            table = pq.ParquetFile(self.root / path).read_row_group(group, columns=["image.bytes"])
            column = table["image"].combine_chunks().field("bytes")
            self._held[path, group] = column
            while len(self._held) > 1 and sum(c.nbytes for c in self._held.values()) > _HELD_BYTES:
                self._held.popitem(last=False)
            return column
