"""How a store grows: which generations it has, and which it needs for the images and views asked.

Rows keep their numbers: new images come after the old ones. Each stretch of rows that was added at
once gets its further views in a generation of its own, so that blocks stay aligned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from milan.core.paths import AnyPath
from milan.errors import CacheError, ConfigError
from milan.images.manifest import Manifest
from milan.store.format import GENERATION, GENERATIONS, INDEX, CacheSpec, Index, canonical
from milan.store.generation import Generation
from pipeline.writing.store import settings_differ


@dataclass(frozen=True)
class Part:
    """A generation that exists or is to be written."""

    name: str
    spec: CacheSpec
    manifest: Manifest


def parts_of(
    out: AnyPath, wanted: CacheSpec, listing: Manifest, layer: str, *, extend: bool
) -> tuple[str, list[Part]]:
    """(layer's name, its generations) for `wanted.rows` images and `wanted.views` views.

    `listing` has all images in their seeded order. Finished generations come first and unchanged;
    an unfinished one must be the next one wanted. Raises CacheError for a store of other targets,
    unless `extend` is set: then these become another layer.
    """
    if not (out / INDEX).exists():
        manifest = listing.head(wanted.rows)
        spec = replace(wanted, manifest=manifest.digest())
        return layer, [Part(GENERATION, spec, manifest)]
    existing = [Generation(out, entry) for entry in Index.read(out).generations]
    same = [g for g in existing if g.spec.layer() == wanted.layer()]
    rows = [g for g in (same or existing) if g.spec.first_view == 0]
    if not same:
        if not extend:
            raise settings_differ(out, existing[0].spec, _with_ranges(wanted, existing[0].spec))
        names = {g.entry.layer for g in existing}
        layer = next(n for n in _numbered(layer) if n not in names)
        first = existing[0].entry.layer
        rows = [g for g in rows if g.entry.layer == first]
        _check_views(wanted, existing[0].spec)
    else:
        layer = same[0].entry.layer
    manifests = [g.manifest() for g in rows]
    views = max((g.entry.views[1] for g in same), default=0)
    if wanted.views < views:
        raise CacheError(
            f"{out} has {views} views of each image (views: {views} != {wanted.views})",
            expected=f"--views {views} or more: a store only grows",
            fix=f"--views {views}, or --out another.zarr",
        )
    parts = [Part(g.entry.path, g.spec, g.manifest()) for g in same]
    free_names = _free_names(len(existing))
    if views < wanted.views:
        for g, manifest in zip(rows, manifests, strict=True):
            more = replace(
                wanted,
                manifest=manifest.digest(),
                rows=g.spec.rows,
                first_row=g.spec.first_row,
                views=wanted.views - views,
                first_view=views,
            )
            parts.append(Part(next(free_names), more, manifest))
    added = _new_rows(out, Manifest.join(manifests), listing, wanted.rows)
    if len(added):
        first_row = sum(len(manifest) for manifest in manifests)
        spec = replace(wanted, manifest=added.digest(), rows=len(added), first_row=first_row)
        parts.append(Part(next(free_names), spec, added))
    return layer, parts


def _new_rows(out: AnyPath, stored: Manifest, listing: Manifest, rows: int) -> Manifest:
    """The images of `listing` that come after those stored, up to `rows` in all."""
    keys = listing.table["key"].to_pylist()
    old = set(stored.table["key"].to_pylist())
    gone = len(old) - len(old & set(keys))
    if gone:
        first = sorted(old - set(keys))[0]
        raise CacheError(
            f"{gone:,} of the {len(old):,} images of {out} are not in the data, the first is "
            f"{first!r} (manifest)",
            expected="the same images, and perhaps more",
            fix="restore them, or --out another.zarr",
        )
    if rows < len(old):
        raise CacheError(
            f"{out} has {len(old):,} images (rows: {len(old)} != {rows})",
            expected=f"--limit {len(old)} or more: a store only grows",
            fix=f"--limit {len(old)}, or --out another.zarr",
        )
    new = [i for i, key in enumerate(keys) if key not in old]
    return listing.take(np.array(new[: rows - len(old)], np.int64))


def _check_views(wanted: CacheSpec, existing: CacheSpec) -> None:
    """Raises ConfigError unless both have the same views: layers share their crops."""
    mine, theirs = ({**spec.view_law, "size": None} for spec in (wanted, existing))
    if canonical(mine) != canonical(theirs) or wanted.shard_size != existing.shard_size:
        raise ConfigError(
            "another view spec or shard size than the store's",
            expected=f"the store's: {theirs}, --shard-size {existing.shard_size}",
            fix="--out another.zarr",
        )


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
