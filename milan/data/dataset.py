"""Cached targets and the pixels they belong to, joined: a torch Dataset for one's own loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from milan.core.paths import AnyPath
from milan.errors import CacheError, DataError, ImageFault
from milan.images.channels import Channels
from milan.images.decode import content_digest
from milan.images.source import ImageSource, JoinedSource
from milan.images.views import View, checksum, render, unpack
from milan.store.cache import TargetCache


class OwnChannels(Protocol):
    """What a student sees in place of the pixels (milan.data.channels)."""

    law: Channels

    def load(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the teacher's pixels uint8 [B, H, W, 3], channels float32 [B, C, H, W])."""


class CachedDataset(Dataset):
    """Every stored view of every good image: item i is view i mod K of the (i div K)-th image.

    An item is a dict of

    - `image`: uint8 [3, H, W] in 0..255, RGB, the pixels that the teacher saw; or what `transform`
      made of it
    - `features`: float32 [T, C], decoded. Row 0 is the class token (of a teacher without one, what
      the store says in its place), rows 1 to N are the patches in raster order. Only directions
      count: tokens are not normalised
    - `attention`: float32 [N], the class token's to each patch, > 0
    - `row`, `view`: int; the image's row in the manifest, and which of its views
    - `label`: int, an index into `classes`; -1 if unknown

    Made for one's own loop; start loader workers with `multiprocessing_context="forkserver"`.
    """

    def __init__(
        self,
        cache: TargetCache,
        *,
        data_root: str | None = None,
        transform: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self.cache, self.transform = cache, transform
        self.stored = cache.spec.stored_views != "none"
        self.channels: OwnChannels | None = None
        """What the batches of `training_loader` have for a student that sees other channels."""
        # A store that keeps its views needs no originals.
        self.roots = None if self.stored and not data_root else cache.find_data_roots(data_root)

    def __getstate__(self) -> dict:
        # What grows with the rows is made again where it is needed.
        return {k: v for k, v in self.__dict__.items() if k not in ("source", "labels", "good")}

    @cached_property
    def good(self) -> np.ndarray:
        """Rows that have targets and an image, ascending; int64."""
        return self.cache.good_rows()

    @cached_property
    def source(self) -> ImageSource | JoinedSource:
        """The images; opened in the process that reads them."""
        if self.roots is None:
            self.roots = self.cache.find_data_roots()
        if len(self.roots) > 1:
            return JoinedSource(self.cache.manifest, self.roots)
        return ImageSource(self.cache.manifest, self.roots[0][1])

    @cached_property
    def labels(self) -> np.ndarray:
        """[rows] int64, -1 where unknown."""
        return self.cache.manifest.labels()

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, which labels count; None in a store without classes."""
        return self.cache.manifest.classes

    def __len__(self) -> int:
        return len(self.good) * self.cache.views

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if any(not -len(self) <= i < len(self) for i in indices):
            raise IndexError(f"index out of range for {len(self)} views")
        at = np.asarray(indices) % len(self)
        rows, views = self.good[at // self.cache.views], at % self.cache.views
        targets = self.cache.read(rows, views)
        codes = torch.from_numpy(targets.codes)
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        features = self.cache.codec.decode(codes, scale)
        pixels = torch.from_numpy(self.pixels(rows, views)).permute(0, 3, 1, 2)
        shown = pixels if self.transform is None else [self.transform(image) for image in pixels]
        return [
            {
                "image": shown[i],
                "features": features[i],
                "attention": torch.from_numpy(targets.attention[i]),
                "row": int(row),
                "view": int(views[i]),
                "label": int(self.labels[row]),
            }
            for i, row in enumerate(rows)
        ]

    def pixels(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        seen: Callable[[int, bytes, np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """The pixels the teacher saw of (rows[i], views[i]); uint8 [B, H, W, 3].

        Where they are rendered from originals, `seen` is called with i, the image's bytes and its
        pixels. Raises DataError if an image is gone, has changed, or renders to other pixels than
        it did.
        """
        rows, views = np.asarray(rows), np.asarray(views)
        spec = self.cache.view_spec
        out = np.empty((len(rows), *spec.shape, 3), np.uint8)
        checksums = self.cache.pixel_checksums(rows, views).tolist()
        entries = zip(rows.tolist(), views.tolist(), checksums, strict=True)
        if self.stored:
            pictures = self.cache.packed(rows, views)
            for pixels, picture, entry in zip(out, pictures, entries, strict=True):
                self._unpack(pixels, picture, *entry)
            return out
        crops = self.cache.crops(rows, views)
        for i, (pixels, crop, entry) in enumerate(zip(out, crops, entries, strict=True)):
            row, view, expected = entry
            data = b""
            try:
                data = self.source.read(row)
                pixels[:] = render(spec.decode(data), View.of(crop), size=spec.size)
            except ImageFault as fault:
                raise self._changed(row, view, data, str(fault)) from None
            if checksum(pixels) != expected:
                raise self._changed(row, view, data, "it renders to other pixels")
            if seen:
                seen(i, data, pixels)
        return out

    def _unpack(self, out: np.ndarray, picture: bytes, row: int, view: int, expected: int) -> None:
        """A view as the store keeps it: the picture that the teacher was shown."""
        try:
            pixels = unpack(picture, out)
        except ValueError as error:
            raise CacheError(
                f"{self.cache.path}: row {row}, view {view}: {error}",
                fix=f"milan repair {self.cache.path}",
            ) from None
        if pixels.shape != out.shape or checksum(pixels) != expected:
            raise CacheError(
                f"{self.cache.path}: the stored view of row {row}, view {view} has other pixels",
                expected="those that the teacher saw; or this machine decodes pictures differently",
                fix=f"milan verify --deep {self.cache.path}",
            )
        if not np.may_share_memory(pixels, out):
            out[:] = pixels

    def _changed(self, row: int, view: int, data: bytes, what: str) -> DataError:
        """What happened to an image since extraction, told apart by its content checksum."""
        key = self.cache.manifest.key(row)
        if content_digest(data) == self.cache.content_digest(row, view):
            return DataError(
                f"image {key!r} (row {row}, view {view}) is unchanged, but {what}",
                expected="the pixels that the teacher saw: this machine decodes images differently",
                fix="the Pillow version of the extraction, as the store's zarr.json records it",
            )
        return DataError(
            f"image {key!r} (row {row}) has changed since extraction: {what}",
            expected=f"the same bytes below {' or '.join(str(r) for _, r in self.roots or [])}",
            fix="restore the image, or milan pretrain … --on-changed drop, or extract anew",
        )


def open_cache(
    path: str | AnyPath,
    *,
    layer: str | None = None,
    data_root: str | None = None,
    transform: Callable[[torch.Tensor], Any] | None = None,
) -> CachedDataset:
    """A finished store as a torch Dataset; CachedDataset says what an item is.

    `data_root` is where the images lie, if they moved. Of a store that holds the targets of several
    teachers or codecs, `layer` names one. `transform` is called with each `image`, uint8 [3, H, W].
    It may change its colours and type, but must leave patches where they are: the targets belong
    to them. Loader workers need one that can be pickled. Raises CacheError for a store that is
    absent, incomplete, foreign or damaged, and DataError if the images are not found.
    """
    cache = TargetCache(path, layer=layer)
    return CachedDataset(cache, data_root=data_root, transform=transform)
