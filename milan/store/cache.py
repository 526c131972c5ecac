"""Reading a target cache: the teacher's targets of any (row, view), verified as they are read.

Opening reads the index and the attributes of each generation, whatever the store's size. Values are
verified by milan.store.generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from milan.core.paths import AnyPath, as_path, map_files, sizes_below
from milan.core.size import grid_of
from milan.errors import CacheError, DataError, nearest
from milan.images.manifest import Manifest
from milan.images.views import ViewSpec
from milan.store.codecs import Codec, codec_of
from milan.store.format import MANIFEST, TEXT, TEXT_IDS, Index, content_digest
from milan.store.generation import Generation, first_with, not_found, read_array
from milan.store.texts import Prototypes, Texts, read_prototypes, read_texts


@dataclass
class Targets:
    """The teacher's targets of B views, features still encoded; numpy arrays."""

    attention: np.ndarray
    """[B, N] float32, > 0; [B, 0] if not requested; in a store without targets all alike."""
    codes: np.ndarray | None = None
    """[B, T, width] in the codec's dtype; None if not requested."""
    scale: np.ndarray | None = field(default=None)
    """[B, T] float32, for codecs that scale."""
    others: tuple[Targets, ...] = ()
    """Those of the other teachers, where several are read (milan.store.joined)."""


class TargetCache:
    """A finished store, opened for reading; safe to send to another process, not to fork.

    If the store has targets of several teachers or codecs, one `layer` is read. `pinned` opens only
    so many of its generations: a run continues with those it started with. Arrays are opened in the
    process that first reads them.
    """

    def __init__(
        self, path: str | AnyPath, *, layer: str | None = None, pinned: int | None = None
    ) -> None:
        self.path = as_path(path)
        index = Index.read(self.path)
        if pinned is not None and pinned > index.count:
            raise CacheError(
                f"{self.path} has {index.count} generations",
                expected=f"the {pinned} that it had",
                fix="restore the store, or start anew with another --out",
            )
        self.pinned = pinned or index.count
        """How many of the generations that were ever begun are visible."""
        entries = index.first(self.pinned)
        self.layers = list(dict.fromkeys(entry.layer for entry in entries))
        if not entries:
            raise CacheError(
                f"{self.path}: the first {pinned} generations were pruned",
                fix="a copy of the store that has them, or start anew with another --out",
            )
        self.layer = layer or self.layers[0]
        if self.layer not in self.layers:
            raise CacheError(
                f"{self.path} has no targets called {self.layer!r}",
                expected="one of " + ", ".join(self.layers),
                fix=nearest(self.layer, self.layers),
            )
        chosen = [entry for entry in entries if entry.layer == self.layer]
        self.generations = [Generation(self.path, entry) for entry in chosen]
        self.spec = self.generations[0].spec
        self.attributes = self.generations[0].attributes
        self.root = self.generations[0].root
        self.rows = max(g.entry.rows[1] for g in self.generations)
        """Rows of the manifest, the bad ones included."""
        self.views = max(g.entry.views[1] for g in self.generations)
        """K, stored views of each image."""
        dropped = np.array(index.dropped.get(self.layer, []), np.int64)
        self.dropped = dropped[dropped < self.rows]
        """Rows whose images are gone (extract-targets --drop-missing), ascending; int64."""
        self._check_tiling()
        self.digest = content_digest(chosen)
        """SHA-256 over the generations' digests: the content's identity, which runs refer to."""
        self.view_spec = ViewSpec.from_law(self.spec.view_law)
        self.codec: Codec = codec_of(self.spec.codec).restored(self._tables())

    def __getstate__(self) -> dict:
        # The manifest is not sent to other processes; they read it again if they need it.
        return {k: v for k, v in self.__dict__.items() if k != "manifest"}

    @property
    def parts(self) -> list[TargetCache]:
        """The layers that are read together, a teacher each: this one (JoinedCache has several)."""
        return [self]

    @property
    def masking(self) -> TargetCache:
        """The layer whose attention draws the masks."""
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What a run on these targets depends on."""
        return {"cache": self.digest}

    @property
    def view_bytes(self) -> int:
        """Bytes of one stored view, of all layers that are read."""
        return sum(part.spec.view_bytes() for part in self.parts)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the teacher's patches in a view."""
        return grid_of(self.spec.tokens - 1, self.view_spec.size)

    @cached_property
    def manifest(self) -> Manifest:
        """The images of the store, in row order; its classes are numbered alike in all layers."""
        others = class_names(self.path, self.pinned) if len(self.layers) > 1 else None
        return Manifest.join([g.manifest() for g in self._row_generations()], others)

    @cached_property
    def bad(self) -> dict[int, str]:
        """Rows without targets -> the reason, by row."""
        reasons = {row: why for g in self.generations for row, why in g.bad()}
        return dict(sorted(reasons.items()))

    @cached_property
    def superseded(self) -> list[int]:
        """Rows without targets whose images have a later row, for they could be read then."""
        if not self.bad or len(self._row_generations()) == 1:
            return []
        newest = {key: row for row, key in enumerate(self.manifest.keys())}
        return [row for row in self.bad if newest[self.manifest.key(row)] != row]

    @property
    def images(self) -> int:
        """How many images the rows stand for."""
        return self.rows - len(self.superseded)

    def good_rows(self, *, with_dropped: bool = False) -> np.ndarray:
        """Rows that have targets, and an image unless `with_dropped`; ascending, int64.

        Raises DataError if there are none.
        """
        good = np.ones(self.rows, bool)
        good[list(self.bad)] = False
        if not good.any():
            raise DataError(f"{self.path} has targets of no image: all {self.rows} are bad")
        if not with_dropped:
            good[self.dropped] = False
            if not good.any():
                raise DataError(f"{self.path} has no image left: {len(self.dropped)} were dropped")
        return np.flatnonzero(good)

    def find_data_roots(self, data_root: str | None = None) -> list[tuple[int, AnyPath]]:
        """Where the images are: (first row, folder or URL that paths of the manifest begin at).

        Each range of rows that was added at once has the root it was extracted from, or another
        range's, if the images were moved there. Looked at: `data_root`, for all ranges that are
        there, at least one; then the recorded roots. Raises DataError if images are not found.
        """
        given = [as_path(data_root)] if data_root else []
        parts, good, paths = self._row_generations(), self.good_rows(), self.manifest.table["path"]
        recorded = [self._recorded_roots(g, needed=not given) for g in parts]
        others = [root for candidates in recorded for root in candidates]
        roots: list[tuple[int, AnyPath]] = []
        for g, own in zip(parts, recorded, strict=True):
            # Several, because some may have been deleted since.
            sample = paths.take(good[g.holds_rows(good)][:16]).to_pylist()
            candidates = list(dict.fromkeys([*given, *own, *others]))
            root = first_with(candidates, sample)
            if sample and root is None:
                raise not_found(self.path, given or candidates, sample)
            if root is not None and (not roots or roots[-1][1] != root):
                roots.append((g.spec.first_row if roots else 0, root))
        if given and given[0] not in [root for _, root in roots]:
            raise not_found(self.path, given, paths.take(good[:1]).to_pylist())
        return roots

    def image_places(self, data_root: str | None = None) -> list[AnyPath]:
        """What the images are read from: their folders, or the one file that holds all of them.

        Raises DataError as find_data_roots.
        """
        roots, table = self.find_data_roots(data_root), self.manifest.table
        ends = [first for first, _ in roots[1:]] + [len(table)]
        paths: list[AnyPath] = []
        for (first, root), end in zip(roots, ends, strict=True):
            part = table.slice(first, end - first)
            files = pc.unique(part["path"]).to_pylist()
            inside = part["group"].null_count + part["offset"].null_count < 2 * len(part)
            paths.append(root / files[0] if inside and len(files) == 1 else root)
        return paths

    @staticmethod
    def _recorded_roots(generation: Generation, *, needed: bool) -> list[AnyPath]:
        try:
            return generation.roots()
        except CacheError:  # origin.json names folders, and may be left out of a published store
            if needed:
                raise
            return []

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """The shard of each row, counted through the blocks of all generations; int64."""
        shards, before = np.zeros(len(rows), np.int64), 0
        for g in self.generations:
            if g.spec.first_view == 0:
                inside = g.holds_rows(rows)
                shards[inside] = before + (rows[inside] - g.spec.first_row) // g.spec.shard_size
                before += g.spec.blocks
        return shards

    def read(
        self,
        rows: np.ndarray,
        views: np.ndarray,
        *,
        features: bool = True,
        attention: bool = True,
    ) -> Targets:
        """Targets of (rows[i], views[i]), each an int array [B]. CacheError names the shard."""
        if not self.spec.has_targets:
            if features:
                raise self.no_targets()
            return Targets(np.ones((len(rows), self.spec.tokens - 1), np.float32))
        names = (["attention"] if attention else []) + (["features"] if features else [])
        names += ["scale"] if features and self.codec.scaled else []
        values = self._read(names, rows, views)
        weights = values.get("attention", np.ones((len(rows), 0), np.float32))
        if not (weights > 0).all():
            worst = int(np.argmin((weights > 0).all(axis=1)))
            raise CacheError(
                f"{self.path}: row {rows[worst]}, view {views[worst]} has attention that is not > 0"
            )
        return Targets(weights, values.get("features"), values.get("scale"))

    def crops(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B, 5] int32: top, left, height, width, flip of each stored view."""
        return self._read(["crop"], rows, views)["crop"]

    def packed(self, rows: np.ndarray, views: np.ndarray) -> list[bytes]:
        """The stored pictures of (rows[i], views[i]) (spec.stored_views), for images.views.unpack.

        Raises CacheError.
        """
        packed = [b""] * len(rows)
        for generation, at in self._parts(rows, views):
            for i, data in zip(at.tolist(), generation.packed(rows[at], views[at]), strict=True):
                packed[i] = data
        return packed

    def pixel_checksums(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B] int64: crc32c of the pixels that the teacher saw of (rows[i], views[i])."""
        sums = np.empty(len(rows), np.int64)
        for generation, at in self._parts(rows, views):
            sums[at] = generation.pixel_checksums(rows[at], views[at])
        return sums

    def image_digests(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """[B] S32: the content digest of the image that (rows[i], views[i]) was rendered from."""
        digests = np.empty(len(rows), "S32")
        for generation, at in self._parts(rows, views):
            digests[at] = generation.image_digests(rows[at], views[at])
        return digests

    def manifest_digests(self) -> list[str]:
        """Of keys and order of the rows that were added at once, in their order."""
        return [g.spec.manifest for g in self._row_generations()]

    def checksum(self, row: int, view: int) -> int:
        """crc32c of the pixels that the teacher saw of one view."""
        return int(self.pixel_checksums(np.array([row]), np.array([view]))[0])

    def content_digest(self, row: int, view: int) -> str:
        """The checksum of the image's bytes (milan.images.decode.content_digest) at extraction."""
        return self._holder(row, view).content_digest(row, view)

    def content_digests(self, rows: np.ndarray) -> list[str]:
        """The same of many rows, each record read once. Raises CacheError."""
        return [digest or "" for digest, _, _ in self._of_records(rows)]

    def image_sizes(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """(height, width) of the images at extraction, upright. Raises CacheError."""
        return [(height, width) for _, height, width in self._of_records(rows)]

    def _of_records(self, rows: np.ndarray) -> list[tuple[str | None, int, int]]:
        """(content digest, height, width) of each row's image."""
        by_row: dict[int, tuple[str | None, int, int]] = {}
        for g in self._row_generations():
            mine, size = rows[g.holds_rows(rows)] - g.spec.first_row, g.spec.shard_size
            blocks = np.unique(mine // size).tolist()
            records = map_files(g.root, partial(g.intact_record, view=0), blocks)
            for block, record in zip(blocks, records, strict=True):
                columns = [record[name] for name in ("digests", "heights", "widths")]
                for row in mine[mine // size == block].tolist():
                    at = row - record["rows"][0]
                    by_row[row + g.spec.first_row] = tuple(column[at] for column in columns)
        return [by_row[row] for row in rows.tolist()]

    @property
    def captioned(self) -> np.ndarray:
        """Rows with a caption, ascending, int64; none in a store extracted without --texts."""
        captioned = self.manifest.captioned() if self.spec.texts else np.zeros(0, bool)
        return np.flatnonzero(captioned)

    def texts(self, rows: np.ndarray) -> Texts:
        """The text tower's output for the captions of `rows`, an int array [B].

        Raises CacheError: a row without a caption, a store without texts, damage.
        """
        if not self.spec.texts:
            raise self.no_texts()
        rows, arrays = np.asarray(rows), self.generations[0].spec.arrays()
        shapes = {n: (len(rows), *arrays[n].shape[1:]) for n in (TEXT, TEXT_IDS) if n in arrays}
        texts = Texts(
            np.empty(shapes[TEXT], np.float32) if TEXT in shapes else None,
            np.empty(shapes[TEXT_IDS], np.int32),
        )
        missing = np.ones(len(rows), bool)
        for generation in self.generations:
            at = np.flatnonzero(generation.holds_rows(rows) & (generation.spec.first_view == 0))
            if len(at):
                part, missing[at] = read_texts(generation, rows[at]), False
                texts.ids[at] = part.ids
                if texts.features is not None:
                    texts.features[at] = part.features
        if missing.any():
            raise IndexError(f"{self.path} has no row {rows[missing][0]}")
        return texts

    def token_ids(self, rows: np.ndarray) -> np.ndarray:
        """[B, M, L] int32: those of the captions of `rows`, as `texts`; M is 1 but in a store of
        token ids alone."""
        ids = self.texts(rows).ids
        return ids if ids.ndim == 3 else ids[:, None]

    def _other_layers(self) -> list[TargetCache]:
        return [TargetCache(self.path, layer=name) for name in self.layers if name != self.layer]

    def no_targets(self, fix: str = "") -> CacheError:
        """The error for what needs a teacher's targets, which this layer has not.

        `fix` is what else may be done, where another layer does not have them.
        """
        others = self._other_layers()
        layer = next((cache.layer for cache in others if cache.spec.has_targets), None)
        return CacheError(
            f"{self.path} has no targets of a teacher" + (f" in {self.layer}" if others else ""),
            expected="a store that a teacher has seen",
            fix=f"--layer {layer}"
            if layer
            else f"{fix}milan extract-targets … --extend --out {self.path}",
        )

    def no_text_features(self) -> CacheError:
        """The error for what needs texts as a teacher sees them, which this layer has not."""
        others = self._other_layers()
        layer = next((c.layer for c in others if c.spec.texts and c.spec.has_targets), None)
        return CacheError(
            f"{self.path} has no text features of a teacher"
            + (f" in layer {self.layer}" if others else ""),
            expected="a teacher's features of images and of captions or class names",
            fix=f"--layer {layer}"
            if layer
            else f"milan extract-targets --data … --texts --extend --out {self.path}, with a CLIP "
            "as the teacher: a layer more, and what is there stays as it is",
        )

    def no_texts(self) -> CacheError:
        """The error for what needs texts, which this layer has not."""
        others = self._other_layers()
        layer = next((cache.layer for cache in others if cache.spec.texts), None)
        return CacheError(
            f"{self.path} has no texts" + (f" in layer {self.layer}" if others else ""),
            expected="token ids of captions or of class prompts",
            fix=f"--layer {layer}"
            if layer
            else f"milan extract-targets --data … --targets none --extend --out {self.path} adds "
            "token ids and leaves targets as they are; --texts --extend adds a layer with a "
            "teacher's vectors too",
        )

    @cached_property
    def prototypes(self) -> Prototypes | None:
        """The text tower's output for the class prompts; None in a store without."""
        parts = [part for g in self._row_generations() if (part := read_prototypes(g))]
        return Prototypes.join(parts, self.manifest.classes or []) if parts else None

    def use_local(self, folder: Path, limit: int) -> None:
        """Read from a local cache of whole shards below `folder`, at most `limit` bytes."""
        for generation in self.generations:
            generation.use_local(folder, limit)

    def shards_at(self, rows: np.ndarray, views: np.ndarray) -> list[tuple[Generation, int, int]]:
        """(generation, block, view) of every shard with some of (rows[i], views[i])."""
        shards = []
        for g in self.generations:
            at = g.holds(rows, views)
            shards += [(g, *shard) for shard in g.shards_of(rows[at], views[at])]
        return shards

    def check_files(self) -> None:
        """Raises CacheError if a file of any shard is missing or of the wrong size."""
        missing: list[str] = []
        wrong: list[str] = []
        for generation in self.generations:
            size_on_disk = sizes_below(generation.root)
            for name, size in generation.files():
                actual = size_on_disk(name)
                if actual != size:
                    (missing if actual is None else wrong).append(f"{generation.entry.path}/{name}")
        if missing or wrong:
            raise CacheError(
                f"{self.path} is damaged: {len(missing)} files missing and {len(wrong)} of the "
                f"wrong size, the first is {(missing + wrong)[0]}",
                fix=f"milan repair {self.path}",
            )

    def _read(self, names: list[str], rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        rows, views = np.asarray(rows), np.asarray(views)
        if len(self.generations) == 1:
            return self.generations[0].read(names, rows, views)
        out: dict[str, np.ndarray] = {}
        for generation, at in self._parts(rows, views):
            for name, values in generation.read(names, rows[at], views[at]).items():
                whole = out.setdefault(name, np.empty((len(rows), *values.shape[1:]), values.dtype))
                whole[at] = values
        return out

    def _parts(
        self, rows: np.ndarray, views: np.ndarray
    ) -> Iterator[tuple[Generation, np.ndarray]]:
        """Each generation with some of (rows[i], views[i]), and which i. Raises IndexError."""
        missing = np.ones(len(rows), bool)
        for generation in self.generations:
            at = np.flatnonzero(missing & generation.holds(rows, views))
            if len(at):
                missing[at] = False
                yield generation, at
        if missing.any():
            row, view = rows[missing][0], views[missing][0]
            raise IndexError(f"{self.path} has no row {row}, view {view}")

    def _row_generations(self) -> list[Generation]:
        """Those in which rows begin: each has the manifest of its rows."""
        return [g for g in self.generations if g.spec.first_view == 0]

    def _holder(self, row: int, view: int) -> Generation:
        at = np.array([row]), np.array([view])
        return next(g for g in self.generations if g.holds(*at)[0])

    def _tables(self) -> dict[str, np.ndarray]:
        """The tables of the fitted codec, each file verified."""
        first = self.generations[0]
        files = [name for name in first.entry.files if name.startswith("codec/")]
        for name in files:
            first.read_verified(name)
        names = sorted({name.split("/")[1] for name in files if name.count("/") > 1})
        return {name: read_array(first.root / "codec" / name) for name in names}

    def _check_tiling(self) -> None:
        """Raises CacheError unless every (row, view) is in exactly one generation."""
        area = sum(g.spec.rows * g.spec.views for g in self.generations)
        layer = self.spec.layer()
        for i, g in enumerate(self.generations):
            if g.spec.layer() != layer:
                raise CacheError(f"{self.path}: {g.entry.path} is of another teacher or codec")
            for other in self.generations[:i]:
                if _overlap(g.entry.rows, other.entry.rows) * _overlap(
                    g.entry.views, other.entry.views
                ):
                    raise CacheError(f"{self.path}: {g.entry.path} and {other.entry.path} overlap")
        if area != self.rows * self.views:
            raise CacheError(
                f"{self.path} holds {area:,} targets of {self.layer}",
                expected=f"{self.rows:,} rows x {self.views} views",
                fix="run the same extract-targets line again: it goes on where it stopped",
            )


def class_names(path: AnyPath, pinned: int | None = None) -> list[str] | None:
    """The names of the class numbers in a store, of all its layers; None if there are none."""
    manifests: dict[str, Manifest] = {}  # layers over the same rows have the same
    for entry in Index.read(path).first(pinned):
        if entry.views[0] == 0 and entry.files[MANIFEST] not in manifests:
            manifests[entry.files[MANIFEST]] = Generation(path, entry).manifest()
    return Manifest.join(list(manifests.values())).classes


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
