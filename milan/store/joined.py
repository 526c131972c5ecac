"""Targets of several teachers for the same views: layers of one store, or of stores joined by key.

A layer is spelled NAME, of the store that is trained on, or STORE::NAME, of another; STORE:: is its
first one. The first layer leads: its rows, pixels and texts are those of all. Images that a layer
lacks are left out; that its views are the same is compared wherever they are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from milan.core.config_fields import names_in
from milan.core.paths import AnyPath, as_path
from milan.core.size import same_shape, size_in_words
from milan.errors import CacheError, ConfigError, DataError, nearest
from milan.store.cache import TargetCache, Targets
from milan.store.format import canonical
from milan.store.generation import Generation

BETWEEN = "::"
_SAMPLE = 32  # views that are compared when layers are joined, spread over all rows


class JoinedCache(TargetCache):
    """The layers `parts` as one: rows and views count as in the first, `views` is the least of all.

    `lead` draws the masks: the place of a layer among them. Raises CacheError for layers of other
    views, and DataError where they have no image in common.
    """

    def __init__(self, parts: Sequence[TargetCache], *, lead: int = 0) -> None:
        vars(self).update(vars(parts[0]))  # all that is said of images and texts is the first's
        self._joined, self._lead = list(parts), lead
        self.views = min(part.views for part in parts)
        self.digest = hashlib.sha256(canonical([part.digest for part in parts])).hexdigest()
        for part in parts:
            if not part.spec.has_targets:
                raise part.no_targets()
        for part in parts[1:]:
            self._check_law(part)
        self.places = [_places(parts[0], part) for part in parts]
        """Of each layer [rows] int64: the row that an image of the first has there, or -1."""
        gone = [
            np.flatnonzero(np.isin(place, part.dropped))
            for part, place in zip(parts, self.places, strict=True)
        ]
        self.dropped = np.unique(np.concatenate([parts[0].dropped, *gone[1:]]))
        self._check_sample()

    @property
    def parts(self) -> list[TargetCache]:
        return self._joined

    @property
    def masking(self) -> TargetCache:
        return self._joined[self._lead]

    @property
    def identity(self) -> dict[str, object]:
        return {"cache": self.digest, "masked_by": short_names(self)[self._lead]}

    def good_rows(self, *, with_dropped: bool = False) -> np.ndarray:
        """Rows that have targets in every layer, and an image unless `with_dropped`; int64.

        Raises DataError if there are none.
        """
        good = super().good_rows(with_dropped=with_dropped)
        for place in self.places:
            good = good[place[good] >= 0]
        if not len(good):
            raise DataError(
                f"{self._name(0)} and {self._name(len(self.parts) - 1)} have no image in common",
                expected="targets of the same images, by their keys (milan inspect)",
            )
        return good

    def lacking(self) -> list[tuple[str, int]]:
        """(layer, how many images of the first it has no targets of), of those that lack some."""
        own = super().good_rows(with_dropped=True)
        counts = [int((place[own] < 0).sum()) for place in self.places]
        return [(self._name(i), count) for i, count in enumerate(counts) if count]

    def read(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        *,
        features: bool = True,
        attention: bool = True,
    ) -> Targets:
        """Those of the first layer with the others' beside them, and the attention that masks.

        Raises CacheError, also for views that are not the first layer's.
        """
        targets = []
        for number, (part, place) in enumerate(zip(self.parts, self.places, strict=True)):
            masks = attention and number == self._lead
            if features or masks:
                self._check_views(number, rows, views)
                targets.append(part.read(place[rows], views, features=features, attention=masks))
        first, *others = targets
        masking = next((f for f in targets if f.attention.shape[1]), first)
        return Targets(masking.attention, first.codes, first.scale, tuple(others))

    def use_local(self, folder: Path, limit: int) -> None:
        for part in self.parts:
            part.use_local(folder, limit)

    def shards_at(self, rows: np.ndarray, views: np.ndarray) -> list[tuple[Generation, int, int]]:
        """Of every layer, with the rows that the images have there."""
        return [
            shard
            for part, place in zip(self.parts, self.places, strict=True)
            for shard in TargetCache.shards_at(part, place[rows], views)
        ]

    def check_files(self) -> None:
        for part in self.parts:
            part.check_files()

    def _name(self, number: int) -> str:
        """A layer and its store, in words."""
        return f"{self.parts[number].path} ({self.parts[number].layer})"

    def _check_law(self, part: TargetCache) -> None:
        """Raises CacheError unless a layer's views are drawn as the first's, whatever their size
        in pixels, and of the same shape."""
        ours, theirs = self.spec.view_law, part.spec.view_law
        for name in sorted((ours.keys() | theirs.keys()) - {"size"}):
            if ours.get(name) != theirs.get(name):
                raise self._other_views(
                    part, f"{name} {theirs.get(name)} where {self.path} has {ours.get(name)}"
                )
        sizes = self.view_spec.size, part.view_spec.size
        if not same_shape(*sizes):
            mine, other = map(size_in_words, sizes)
            raise self._other_views(part, f"{other} where {self.path} has {mine}")

    def _check_sample(self) -> None:
        """Compare some views of all layers. Raises as `_check_views`."""
        rows = self.good_rows(with_dropped=True)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(int))]
        for number in range(1, len(self.parts)):
            self._check_views(number, rows, np.arange(len(rows)) % self.views)

    def _check_views(self, number: int, rows: np.ndarray, views: np.ndarray) -> None:
        """Raises CacheError unless a layer was computed from the views (rows[i], views[i]) of the
        first: the same pixels, or at another size the same crops of the same bytes."""
        if not number:
            return
        first, part, place = self.parts[0], self.parts[number], self.places[number][rows]
        if first.view_spec.size == part.view_spec.size:
            same = first.pixel_checksums(rows, views) == part.pixel_checksums(place, views)
        else:
            same = (first.crops(rows, views) == part.crops(place, views)).all(axis=1)
            same &= first.image_digests(rows, views) == part.image_digests(place, views)
        if not same.all():
            row, view = rows[~same][0], views[~same][0]
            key = first.manifest.key(int(row))
            raise self._other_views(part, f"other pixels for view {view} of {key!r}")

    def _other_views(self, part: TargetCache, what: str) -> CacheError:
        return CacheError(
            f"{part.path} ({part.layer}) has other views than {self.path}: {what}",
            expected="the same crops of the same images",
            fix=f"milan extract-targets … --extend --out {self.path}: it keeps the views",
        )


def _places(first: TargetCache, other: TargetCache) -> np.ndarray:
    """[rows of `first`] int64: the row of each image in `other`; -1 where it has no targets."""
    rows = np.full(first.rows, -1, np.int64)
    good = other.good_rows(with_dropped=True)
    if first.rows == other.rows and first.manifest_digests() == other.manifest_digests():
        rows[good] = good
        return rows
    ours, theirs = first.manifest.keys(), other.manifest.keys()
    row_of = {theirs[row]: row for row in good.tolist()}
    rows[:] = [row_of.get(key, -1) for key in ours]
    return rows


def layers_of(path: str | AnyPath, layers: str | None) -> list[tuple[AnyPath, str | None]]:
    """(store, layer or None: its first) of each of `layers`, as they are spelled, commas between.

    Raises ConfigError: the first is of another store than `path`, or one stands twice.
    """
    own = as_path(path)
    spelled = [name.rpartition(BETWEEN) for name in names_in(layers)] if layers else [("", "", "")]
    pairs = [(as_path(store) if store else own, name or None) for store, _, name in spelled]
    if pairs[0][0] != own:
        raise ConfigError(
            f"the first layer is of {pairs[0][0]}",
            expected=f"one of {own}, the store that is trained on",
            fix=f"--cache {pairs[0][0]}, or another layer first",
        )
    return pairs


def open_targets(
    path: str | AnyPath,
    layers: str | None = None,
    *,
    mask_layer: str | None = None,
    pinned: Sequence[int | None] = (),
) -> TargetCache:
    """The targets that `--cache`, `--layer` and `--mask-layer` name: a layer, or several joined.

    `pinned` has the generations of each that are read. Raises MilanError.
    """
    wanted = layers_of(path, layers)
    if layers and "," in layers and layers in TargetCache(path).layers:
        wanted = [(as_path(path), layers)]  # a file that the teacher was named by has a comma
    pins = pinned if len(pinned) == len(wanted) else [None] * len(wanted)
    parts = [
        TargetCache(store, layer=name, pinned=pin)
        for (store, name), pin in zip(wanted, pins, strict=True)
    ]
    for i, part in enumerate(parts):
        if any(part.digest == other.digest for other in parts[:i]):
            raise ConfigError(
                f"layer {part.layer} of {part.path} stands twice",
                expected="each teacher once",
                fix="--set layer_weights=2,1 weighs one more",
            )
    lead = _mask_layer(parts, mask_layer, layers)
    return parts[0] if len(parts) == 1 else JoinedCache(parts, lead=lead)


def _mask_layer(parts: Sequence[TargetCache], wanted: str | None, layers: str | None) -> int:
    """The place of the layer whose attention masks. Raises ConfigError."""
    if wanted is None:
        return 0
    spelled = names_in(layers) if layers else [parts[0].layer]
    names = [*spelled, *(part.layer for part in parts)]
    if wanted not in names or (wanted not in spelled and names.count(wanted) > 1):
        raise ConfigError(
            f"mask_layer {wanted!r}",
            expected="one of the layers that are read: " + ", ".join(spelled),
            fix=nearest(wanted, spelled),
        )
    return names.index(wanted) % len(parts)


def short_names(cache: TargetCache) -> list[str]:
    """What each teacher is called in logs and pictures: its layer without the codec where that
    tells them apart, in letters that every tracker takes."""
    layers = [part.layer for part in cache.parts]
    for names in ([name.rpartition("/")[0] for name in layers], layers):
        plain = [re.sub(r"[^\w.-]+", "-", name).strip("-") for name in names]
        if all(plain) and len(set(plain)) == len(plain):
            return plain
    return [f"{name}-{number}" for number, name in enumerate(plain, 1)]
