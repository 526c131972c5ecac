"""How a store grows: which generations it has, and which it needs for the images and views asked.

Rows keep their numbers: new images come after the old ones, and classes that are new after those
that have a number. Each stretch of rows that was added at once gets its further views in a
generation of its own, so that blocks stay aligned. A rejected image that can be read now gets a new
row, and the old one is superseded: what is committed stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from milan.core.paths import AnyPath, read_file
from milan.core.progress import Progress
from milan.errors import CacheError, ConfigError, DataError, ImageFault
from milan.images.classes import ClassTable
from milan.images.decode import content_digest, decode
from milan.images.manifest import Manifest
from milan.images.source import ImageSource
from milan.images.splits import ALL
from milan.store.format import (
    GENERATION,
    GENERATIONS,
    INDEX,
    MANIFEST,
    CacheSpec,
    Index,
    canonical,
    read_group,
)
from milan.store.generation import Generation
from pipeline.writing.store import settings_differ

_COMPARED = 8  # images whose bytes are compared, where names alone do not tell
_READERS = 16  # threads that try rejected images again


@dataclass(frozen=True)
class Part:
    """A generation that exists or is to be written."""

    name: str
    spec: CacheSpec
    manifest: Manifest
    first: Generation | None = None
    """The one with the first views of the same rows, whose images these must be."""
    rejected: dict[int, tuple[str | None, str]] = field(default_factory=dict)
    """Rows, counted inside it, that are not read: (digest of the bytes if known, why)."""

    def is_same(self, row: int, digest: str) -> bool:
        """Whether bytes of this digest are the image of a row's first views, as far as is known."""
        known = self.first and self.first.content_digest(self.spec.first_row + row, 0)
        return not known or known == digest


@dataclass(frozen=True)
class Data:
    """The images that the data has now."""

    manifest: Manifest
    """All of them, in their seeded order."""
    root: AnyPath
    """Where its paths begin."""
    drop_missing: bool = False
    """Whether stored images that are no longer there may be left out."""

    @property
    def of_one_split(self) -> bool:
        """Whether it has other splits too, which were not taken."""
        listing = self.manifest.listing
        return listing is not None and listing.split not in (None, ALL)


@dataclass(frozen=True)
class Growth:
    """What a store has of a layer, and is to have."""

    layer: str
    parts: list[Part]
    """Its generations; finished ones come first and unchanged."""
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Of each layer: the rows whose images are gone, as Index.dropped."""
    superseded: frozenset[int] = frozenset()
    """Rejected rows of the layer whose images have a later row."""
    notes: list[str] = field(default_factory=list)
    """What a person should know."""
    begun: bool = False
    """Whether it only goes on with what an earlier call began with fewer images."""


def parts_of(
    out: AnyPath, wanted: CacheSpec, data: Data, layer: str, *, extend: bool, progress: Progress
) -> Growth:
    """The generations for `wanted.rows` images and `wanted.views` views.

    Images that a finished store has rejected are tried again. An unfinished generation must be the
    next one wanted. Raises CacheError for a store of other targets, unless `extend` is set: then
    these become another layer; and for images that are not those of the store.
    """
    if not (out / INDEX).exists():
        images = data.manifest.head(wanted.rows)
        manifest = _as_begun(out, GENERATION, images, wanted.layer())
        spec = replace(wanted, manifest=manifest.digest(), rows=len(manifest))
        begun = len(manifest) < len(images)
        notes = [_goes_on(manifest, images)] if begun else []
        return Growth(layer, [Part(GENERATION, spec, manifest)], notes=notes, begun=begun)
    index = Index.read(out)
    existing = [Generation(out, entry) for entry in index.generations]
    same = [g for g in existing if g.spec.layer() == wanted.layer()]
    rows = [g for g in (same or existing) if g.spec.first_view == 0]
    if not same:
        if not extend:
            other = existing[0].spec
            raise settings_differ(
                out, other, _with_ranges(wanted, other), extends=_same_views(wanted, other)
            )
        names = {g.entry.layer for g in existing}
        layer = next(n for n in _numbered(layer) if n not in names)
        rows = [g for g in rows if g.entry.layer == existing[0].entry.layer]
        _check_views(wanted, existing[0].spec)
    else:
        layer = same[0].entry.layer
    manifests = [g.manifest() for g in rows]
    views = max((g.entry.views[1] for g in same), default=0)
    # Earlier versions published the views of one stretch of rows before those of the next.
    stored_views = [_views_of(g, same) for g in rows]
    if wanted.views < views:
        raise CacheError(
            f"{out} has {views} views of each image (views: {views} != {wanted.views})",
            expected=f"--views {views} or more: a store only grows",
            fix=f"--views {views}, or --out another.zarr",
        )
    stored = _Stored(out, rows, manifests, data, rejected_by=same or rows)
    stored.check_missing(index.dropped.get(rows[0].entry.layer, []))
    stored.check_images(more_views=min(stored_views) < wanted.views)
    parts = [Part(g.entry.path, g.spec, g.manifest()) for g in same]
    free_names = _free_names(index.count)
    short = [
        (next(free_names), g, manifest, has)
        for g, manifest, has in zip(rows, manifests, stored_views, strict=True)
        if has < wanted.views
    ]
    name = next(free_names)
    if same:
        stored.try_rejected(out / name, progress)
    for more_name, g, manifest, has in short:
        more = replace(
            wanted,
            manifest=manifest.digest(),
            rows=g.spec.rows,
            first_row=g.spec.first_row,
            views=wanted.views - has,
            first_view=has,
        )
        parts.append(Part(more_name, more, manifest, g, stored.superseded_in(g)))
    added, begun = stored.added(wanted.rows, existing), False
    if len(added):
        if same and wanted.has_targets and not same[0].fidelity:
            raise codec_fits_none(out)
        first_row = sum(len(manifest) for manifest in manifests)
        images, added = added, _as_begun(out, name, added, wanted.layer())
        if begun := len(added) < len(images):
            stored.notes.append(_goes_on(added, images))
        spec = replace(wanted, manifest=added.digest(), rows=len(added), first_row=first_row)
        parts.append(Part(name, spec, added))
    dropped = stored.dropped(layer, existing, index.dropped)
    return Growth(layer, parts, dropped, frozenset(stored.superseded), stored.notes, begun)


def _views_of(rows: Generation, layer: list[Generation]) -> int:
    """How many views a layer has of the rows that a generation began."""
    return max((g.entry.views[1] for g in layer if g.entry.rows == rows.entry.rows), default=0)


def _rejected(generation: Generation) -> dict[int, str]:
    """Its rows without targets, with the reason, as far as its records are whole."""
    rejected: dict[int, str] = {}
    with suppress(CacheError):  # a damaged record: its shard is written again
        rejected.update(generation.bad())
    return rejected


class _Stored:
    """The images that a layer has, and where the data has them now."""

    def __init__(
        self, out: AnyPath, rows: list[Generation], manifests: list[Manifest], data: Data,
        *, rejected_by: list[Generation],
    ) -> None:  # fmt: skip
        self.out, self.rows, self.data = out, rows, data
        self.notes: list[str] = []
        self.manifest = Manifest.join(manifests)
        self.keys, self.listed = self.manifest.keys(), data.manifest.keys()
        self.rejected = {row: why for g in rejected_by for row, why in _rejected(g).items()}
        """Row -> why it has no targets."""
        newest = {key: row for row, key in enumerate(self.keys)}
        self.superseded = {row for row, key in enumerate(self.keys) if newest[key] != row}
        """Rows whose images have a later row: they were rejected, and could be read later."""
        place = {key: i for i, key in enumerate(self.listed)}
        self.place = np.array([place.get(key, -1) for key in self.keys], np.int64)
        """[rows] positions in the data; -1: it is not there."""
        images = ~np.isin(np.arange(len(self.keys)), list(self.superseded))
        self.missing = np.flatnonzero(images & (self.place < 0))
        self.present = np.flatnonzero(images & (self.place >= 0))
        self.read = self.present[~np.isin(self.present, list(self.rejected))]
        """Rows with targets whose images are there."""
        self.again: list[int] = []
        """Rejected rows whose images can be read now."""

    def check_missing(self, dropped: list[int]) -> None:
        """Raises CacheError for images that are not in the data, unless they may be, or were.

        Nothing is lost with those that were rejected.
        """
        gone = self.missing[~np.isin(self.missing, [*dropped, *self.rejected])]
        allowed = self.data.drop_missing or not len(gone)
        if allowed and len(self.present):
            return
        first = min(self.keys[row] for row in (gone if len(gone) else self.missing).tolist())
        raise CacheError(
            f"{len(self.missing):,} of the {len(self.keys) - len(self.superseded):,} images of "
            f"{self.out} are not in the "
            f"data ({self.data.root}), the first is {first!r} (manifest)",
            expected=f"the same images ({self._recorded()}), and perhaps more",
            fix="restore them, or --out another.zarr"
            + (", or --drop-missing if they were deleted" if len(self.present) else "")
            + (", or --split all if they are of other splits" if self.data.of_one_split else ""),
        )

    def check_images(self, *, more_views: bool) -> None:
        """Raises CacheError if the data has other images under the names of the store's.

        Places inside files are compared for all. Of data at another place, also the sizes; and the
        bytes of a few images, as where a name is only a place in a file.
        """
        stored = self.manifest.table.take(pa.array(self.read))
        listed = self.data.manifest.table.take(pa.array(self.place[self.read]))
        moved = not self._same_root()
        for name, empty in (("path", ""), ("group", -1), ("index", -1), ("offset", -1)):
            differ = _differ(stored[name], listed[name], empty)
            if len(differ):
                raise self._other_images("lie elsewhere in their files than at extraction", differ)
        resized = _differ(stored["bytes"], listed["bytes"], -1)
        if moved and len(resized):
            raise self._other_images("have another size", resized)
        # Reading a few may take as many row groups: only if something is to be added.
        grows = more_views or len(self.listed) > len(self.present)
        inside = any(stored[name].null_count < len(stored) for name in ("group", "offset"))
        if grows and (moved or inside):
            different = [i for i in _spread(len(stored)) if self._is_other(int(self.read[i]))]
            if different:
                raise self._other_images("have other bytes", np.array(different))
        if len(resized):
            self.notes.append(
                f"changed since extraction: {len(resized):,} images have another size, the first "
                f"is {self.keys[self.read[resized[0]]]!r}; milan pretrain --on-changed drop "
                "leaves them out"
            )

    def _same_root(self) -> bool:
        """Whether the data is where the store found it, or the store does not say."""
        root = self.data.root.resolve()
        for g in self.rows:
            try:
                roots = g.roots()
            except CacheError:  # without origin.json
                return True
            if any(r.resolve() == root for r in roots):
                return True
        return False

    def _is_other(self, row: int) -> bool:
        """Whether the data has other bytes for an image than at extraction."""
        generation = next(g for g in self.rows if g.holds_rows(np.array([row]))[0])
        with suppress(CacheError, ImageFault):  # a damaged record, or an image that is: others tell
            digest = generation.content_digest(row, 0)
            listed = self.data.manifest.take(self.place[[row]])
            data = ImageSource(listed, self.data.root).read(0)
            return bool(digest) and content_digest(data) != digest
        return False

    def _other_images(self, what: str, differ: np.ndarray) -> CacheError:
        """The error for images, by their position among those read, that are not the store's."""
        where = self.data.root
        return CacheError(
            f"{len(differ):,} images of {self.out} {what} below {where}, the first is "
            f"{self.keys[self.read[differ[0]]]!r}",
            expected=f"the images of the store ({self._recorded()}), in files as they were",
            fix="restore the files and put new images into others, or --out another.zarr",
        )

    def _recorded(self) -> str:
        try:
            return f"they were in {self.rows[0].roots()[-1]}"
        except CacheError:
            return "its folder is not recorded"

    def try_rejected(self, begun: AnyPath, progress: Progress) -> None:
        """Look again at the images that were rejected: a file may have been restored since.

        What an earlier call has `begun` with them goes on as it is.
        """
        tried = [row for row in self.present.tolist() if row in self.rejected]
        if not tried:
            return
        if (begun / "zarr.json").exists():
            keys = set(Manifest.read(pa.BufferReader(read_file(begun / MANIFEST))).keys())
            self.again = [row for row in tried if self.keys[row] in keys]
        else:
            images = ImageSource(
                self.data.manifest.take(self.place[np.array(tried)]), self.data.root
            )
            digests = readable(images, range(len(tried)), progress)
            self.again = [tried[i] for i in digests]
        self.superseded |= {*self.again}
        left = Counter(
            self.rejected[row].split(":")[0] for row in tried if row not in self.superseded
        )
        counts = ", ".join(f"{n:,} {reason}" for reason, n in left.most_common())
        self.notes.append(
            f"tried again: {len(self.again):,} of {len(tried):,} rejected images can be read now"
            + (" and become new rows" if self.again else "")
            + (f"; still rejected: {counts}" if counts else "")
        )

    def superseded_in(self, generation: Generation) -> dict[int, tuple[str | None, str]]:
        """The superseded rows of a generation, as Part.rejected."""
        first, end = generation.entry.rows
        why = (None, "superseded: a later row has this image")
        return {row - first: why for row in sorted(self.superseded) if first <= row < end}

    def added(self, rows: int, existing: list[Generation]) -> Manifest:
        """The images that come after those stored, up to `rows` that are in the data: those that
        were rejected and can be read now, and new ones.

        Their labels are numbers of the store's table of classes, over the generations `existing`.
        """
        count = len(self.present)
        if rows < count:
            raise CacheError(
                f"{self.out} has {count:,} images (rows: {count} != {rows})",
                expected=f"--limit {count} or more: a store only grows",
                fix=f"--limit {count}, or --out another.zarr",
            )
        old, listing = set(self.keys), self.data.manifest
        new = [i for i, key in enumerate(self.listed) if key not in old][: rows - count]
        new = sorted([*new, *self.place[self.again].tolist()]) if self.again else new
        if not new:
            return listing.head(0)
        table, before = ClassTable(), 0
        manifests = {g.entry.files[MANIFEST]: g for g in existing if g.spec.first_view == 0}
        for g in manifests.values():
            with suppress(DataError):  # of an older store: unknown labels, see Manifest.join
                part = g.manifest()
                table.add(part.table["label"], part.classes, str(self.out))
        before = len(table.names)
        labelled = table.renumbered(listing.table, listing.classes, str(self.data.root))
        self._check_numbers(labelled, table.names)
        if table.names[before:] and before:
            numbers = [f"{name!r} {before + i}" for i, name in enumerate(table.names[before:])]
            some = ", ".join(numbers[:5]) + (", ..." if len(numbers) > 5 else "")
            self.notes.append(f"new classes come after the {before} of the store: {some}")
        return Manifest(labelled.take(pa.array(new)), table.names or None)

    def _check_numbers(self, labelled: pa.Table, names: list[str]) -> None:
        """Raises CacheError if numbers without names mean other classes than in the store."""
        mine = Manifest.join([self.manifest], names or None).labels()[self.present]
        theirs = Manifest(labelled).labels()[self.place[self.present]]
        differ = np.flatnonzero((mine != theirs) & (mine >= 0) & (theirs >= 0))
        if not len(differ):
            return
        first = differ[0]
        found = f"{len(differ):,} images have another label than in {self.out}, the first is "
        found += f"{self.keys[self.present[first]]!r}: "
        if names:  # corrected labels: a name means what it meant
            self.notes.append(
                found
                + f"{names[theirs[first]]!r}, was {names[mine[first]]!r}; the store keeps its own"
            )
            return
        raise CacheError(
            found + f"class {theirs[first]}, was {mine[first]}",
            expected="the class numbers that the store has: without names nothing else tells "
            "which class a number means",
            fix="number new classes after the old ones, or give the data class names, or "
            "--out another.zarr",
        )

    def dropped(
        self, layer: str, existing: list[Generation], before: dict[str, list[int]]
    ) -> dict[str, list[int]]:
        """Of each layer the rows whose images are gone: those missing here, wherever they are.

        An image that is back is read again, unless it was missed when views were added.
        """
        if not len(self.missing) and not before:
            return {}
        gone = {self.keys[row] for row in self.missing.tolist()}
        back = set(self.listed)
        dropped: dict[str, list[int]] = {}
        for name in dict.fromkeys([layer, *(g.entry.layer for g in existing)]):
            parts = [g for g in existing if g.entry.layer == name]
            rows = set(before.get(name, []))
            bad = {row for g in parts for row in _rejected(g)}
            # A layer that is only begun has the rows of the one that it is made from.
            for g in [g for g in parts if g.spec.first_view == 0] or self.rows:
                for row, key in enumerate(g.manifest().keys(), g.spec.first_row):
                    if row in bad:
                        continue
                    if key in gone:
                        rows.add(row)
                    elif key in back:
                        rows.discard(row)
            dropped[name] = sorted(rows)
        returned = len(set(before.get(layer, [])).difference(dropped[layer]))
        if dropped[layer] or returned:
            self.notes.append(
                f"dropped: {len(dropped[layer]):,} images of the store are not in the data; they "
                "keep their targets, and training leaves them out"
                + (f"; {returned:,} are back" if returned else "")
            )
        return dropped


def readable(images: ImageSource, rows: Sequence[int], progress: Progress) -> dict[int, str]:
    """Which of some rejected images can be read by now: row -> digest of the bytes.

    Raises MachineError where the machine or the network fails.
    """

    def read(row: int) -> str | None:
        try:
            data = images.read(row)
            decode(data)
        except ImageFault:
            return None
        return content_digest(data)

    progress.begin("try rejected images again", len(rows), "images")
    digests: dict[int, str] = {}
    with ThreadPoolExecutor(_READERS, thread_name_prefix="retry") as pool:
        for i, (row, digest) in enumerate(zip(rows, pool.map(read, rows), strict=True), 1):
            if digest:
                digests[row] = digest
            progress.advance(i)
    progress.end()
    return digests


def codec_fits_none(out: AnyPath) -> CacheError:
    """Why a store whose images were all rejected takes no others."""
    return CacheError(
        f"{out} was begun when no image could be read: its codec fits none",
        fix=f"delete {out}, then the same line",
    )


def _as_begun(out: AnyPath, name: str, images: Manifest, layer: bytes) -> Manifest:
    """`images`, or those with which an earlier call has begun the generation of this name.

    They are the same in older keys; or some of them, in the places where they were.
    """
    if not (out / name / "zarr.json").exists():
        return images
    spec, older = read_group(out / name)[0], images.without_file_name()
    if spec.manifest == older.digest():
        return older
    if spec.layer() != layer or not spec.rows < len(images):
        return images
    begun = Manifest.read(pa.BufferReader(read_file(out / name / MANIFEST)))
    place = {key: i for i, key in enumerate(images.table["key"].to_pylist())}
    rows = [place.get(key, -1) for key in begun.table["key"].to_pylist()]
    if min(rows) < 0 or begun.digest() != spec.manifest:
        return images
    now = images.table.take(pa.array(rows))
    columns = (("path", ""), ("group", -1), ("index", -1), ("offset", -1))
    same = all(not len(_differ(begun.table[column], now[column], no)) for column, no in columns)
    return begun if same else images


def _goes_on(begun: Manifest, images: Manifest) -> str:
    return (
        f"goes on with the {len(begun):,} images that an earlier call began with; the "
        f"{len(images) - len(begun):,} that came since follow"
    )


def _differ(stored: pa.ChunkedArray, listed: pa.ChunkedArray, empty: str | int) -> np.ndarray:
    """Positions at which two columns differ; null is `empty`."""
    pair = (pc.fill_null(column, empty) for column in (stored, listed))
    return np.flatnonzero(np.asarray(pc.not_equal(*pair)))


def _spread(count: int) -> list[int]:
    """_COMPARED of `count` positions, or all, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, _COMPARED)).astype(int)).tolist()


def _check_views(wanted: CacheSpec, existing: CacheSpec) -> None:
    """Raises ConfigError unless both have the same views: layers share their crops."""
    if not _same_views(wanted, existing):
        view_law = {name: part for name, part in existing.view_law.items() if name != "size"}
        raise ConfigError(
            "another view spec or shard size than the store's",
            expected=f"the store's: {view_law}, --shard-size {existing.shard_size}",
            fix="--out another.zarr",
        )


def _same_views(one: CacheSpec, other: CacheSpec) -> bool:
    """Whether two specs have the same crops, whatever their size in pixels, and blocks."""
    view_laws = [canonical({**spec.view_law, "size": None}) for spec in (one, other)]
    return view_laws[0] == view_laws[1] and one.shard_size == other.shard_size


def _with_ranges(wanted: CacheSpec, existing: CacheSpec) -> CacheSpec:
    """`wanted` with the other's rows and views: the differences that remain separate layers."""
    ranges = ("manifest", "rows", "views", "first_row", "first_view")
    return replace(wanted, **{name: getattr(existing, name) for name in ranges})


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}#{number}"
        number += 1


def _free_names(count: int) -> Iterator[str]:
    while True:
        yield f"{GENERATIONS}/{count:03d}"
        count += 1
