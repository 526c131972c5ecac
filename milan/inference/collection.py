"""Images that can be compared: a unit vector of each, its name and class, and its picture.

Of a store: the class token that is cached for view 0, the first view of each image, decoded. Of a
file of embeddings: the image's embedding. So a store can be searched before anything was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from milan.core.paths import AnyPath, as_path, is_local
from milan.data.dataset import CachedDataset
from milan.errors import DataError, ImageFault
from milan.images.decode import content_digest, decode_pixels
from milan.images.manifest import build_manifest, resolve_data
from milan.images.source import ImageSource
from milan.images.splits import WantedSplit
from milan.inference.config import NeighboursConfig
from milan.inference.embeddings import ENDINGS, Embeddings, rows_file
from milan.reporting.panels import class_tokens
from milan.store.cache import TargetCache
from milan.store.format import INDEX

_ROWS = 512  # of a store, read at once: 100 MB of ViT-B's targets in float16


class Collection(Protocol):
    """Images with vectors. A position counts those that have one, from 0."""

    what: str
    """What is compared, in words."""
    rows: np.ndarray
    """int64 [m]: the row of each image in the store or file, ascending."""
    keys: list[str]
    """[m]"""
    classes: list[str | None]
    """[m]: the class of each image, where it has one."""

    @property
    def places(self) -> list[AnyPath]:
        """What is read: folders and files in which and over which nothing is written."""

    def pieces(self) -> Iterator[torch.Tensor]:
        """The vectors [b, F], of length 1, float32 on the CPU, in order; some at once."""

    def vector(self, position: int) -> torch.Tensor:
        """One of them, [F]."""

    def digests(self) -> list[str] | None:
        """[m]: equal for images of the same bytes; None if that is not known."""

    def pictures(self, positions: list[int]) -> list[np.ndarray | None]:
        """The images, uint8 [H, W, 3]; None for one that cannot be read now. Raises DataError."""

    def find_file(self, path: Path) -> int | None:
        """The position of the image that is this file, if there is one."""


def open_collection(config: NeighboursConfig) -> Collection:
    """The store or file that `config.where` names. Raises MilanError."""
    where = as_path(config.where)
    if is_local(where) and not where.exists():
        raise DataError(
            f"nothing is at {where}",
            expected="a finished store, or a file of milan embed",
            fix="milan embed --out embeddings.parquet, which leaves one",
        )
    if is_local(where) and where.suffix.lower() in ENDINGS and not (where / INDEX).exists():
        return _OfFile(where, config)
    return _OfStore(where, config)  # what is none says what it lacks


def _named(labels: list[int | None], names: list[str] | None) -> list[str | None]:
    return [
        None if label is None or label < 0 else names[label] if names else str(label)
        for label in labels
    ]


def _picture(
    source: Any, row: int, decode: Callable[[bytes], np.ndarray] = decode_pixels
) -> np.ndarray | None:
    try:
        return decode(source.read(row))
    except ImageFault:
        return None


class _OfStore:
    """The images of a store that have targets."""

    def __init__(self, path: AnyPath, config: NeighboursConfig) -> None:
        self.cache, self.data_root = TargetCache(path, layer=config.layer), config.data_root
        teacher = self.cache.attributes["about"]
        random = ", RANDOM WEIGHTS" if teacher["random_weights"] else ""
        self.what = f"class token of view 0 by {teacher['name']}{random}"
        self.rows = self.cache.good_rows()
        keys, labels = self.cache.manifest.keys(), self.cache.manifest.labels()
        self.keys = [keys[row] for row in self.rows.tolist()]
        self.classes = _named(labels[self.rows].tolist(), self.cache.manifest.classes)

    @property
    def places(self) -> list[AnyPath]:
        images = list[AnyPath]()
        with suppress(DataError):  # pairs are found without the images
            images = self.cache.image_places(self.data_root)
        return [self.cache.path, *images]

    def pieces(self) -> Iterator[torch.Tensor]:
        for at in range(0, len(self.rows), _ROWS):
            yield self._class_tokens(self.rows[at : at + _ROWS])

    def vector(self, position: int) -> torch.Tensor:
        return self._class_tokens(self.rows[position : position + 1])[0]

    def _class_tokens(self, rows: np.ndarray) -> torch.Tensor:
        return F.normalize(torch.from_numpy(class_tokens(self.cache, rows)), dim=1)

    def digests(self) -> list[str] | None:
        return self.cache.content_digests(self.rows)

    def find_file(self, path: Path) -> int | None:
        digests = self.cache.content_digests(self.rows)
        digest = content_digest(path.read_bytes())
        return digests.index(digest) if digest in digests else None

    def pictures(self, positions: list[int]) -> list[np.ndarray | None]:
        rows = self.rows[positions]
        dataset = CachedDataset(self.cache, data_root=self.data_root)
        if dataset.roots is None:  # the store keeps its views
            return list(dataset.pixels(rows, np.zeros_like(rows)))
        decode = self.cache.view_spec.decode
        return [_picture(dataset.source, row, decode) for row in rows.tolist()]


class _OfFile:
    """The images of a file of embeddings."""

    def __init__(self, path: Path, config: NeighboursConfig) -> None:
        self.file, self.data_root = Embeddings(path), config.data_root
        about = self.file.about
        if len(self.file.shape) > 2:
            raise DataError(
                f"{path} holds {self.file.shape[1]} vectors of each image, its patches",
                expected="one vector an image",
                fix="milan embed --pooling mean --out another.parquet",
            )
        self.what = f"{about['pooling']} of {about['checkpoint']}"
        self.rows = np.arange(self.file.rows)
        columns = self.file.identity.to_pydict()
        self.keys, names = columns["key"], columns["class"]
        numbers = [None if label is None else str(label) for label in columns["label"]]
        self.classes = [a or b for a, b in zip(names, numbers, strict=True)]

    @property
    def places(self) -> list[AnyPath]:
        images = list[AnyPath]()
        with suppress(DataError):  # pairs are found without the images
            images = [resolve_data(self.data_root or self.file.about["data"])]
        return [self.file.path, rows_file(self.file.path), *images]

    def pieces(self) -> Iterator[torch.Tensor]:
        for values in self.file.pieces():
            yield F.normalize(torch.from_numpy(np.array(values)), dim=1)

    def vector(self, position: int) -> torch.Tensor:
        return F.normalize(torch.from_numpy(self.file.vector(position).copy()), dim=0)

    def digests(self) -> list[str] | None:
        return None

    def find_file(self, path: Path) -> int | None:
        root, path = Path(self.data_root or self.file.about["data"]).resolve(), path.resolve()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        return self.keys.index(name) if name in self.keys else None

    @cached_property
    def _images(self) -> tuple[ImageSource, dict[str, int]]:
        about = self.file.about
        manifest = build_manifest(
            resolve_data(self.data_root or about["data"]), seed=0, split=WantedSplit(about["split"])
        )
        rows = {key: row for row, key in enumerate(manifest.table["key"].to_pylist())}
        return ImageSource(manifest, manifest.root), rows

    def pictures(self, positions: list[int]) -> list[np.ndarray | None]:
        source, rows = self._images
        keys = [self.keys[position] for position in positions]
        return [_picture(source, rows[key]) if key in rows else None for key in keys]
