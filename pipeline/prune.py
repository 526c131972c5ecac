"""Drop layers, views or generations of a store; what is left keeps its bytes.

    1. under the lock: decide, check what runs pin, ask
    2. a generation that loses its last views is written again, with the same shards and records
    3. the index lists what is left, and says which names do not count any more
    4. the files of those are removed

Killed before 3 it is the store as it was, after 3 the new one; the same line removes leftovers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from milan.core.paths import AnyPath, as_path, read_file
from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes
from milan.errors import CacheError, ConfigError, DataError, nearest
from milan.reporting.run_files import RUN, layers_of_part, read_run
from milan.store.cache import TargetCache
from milan.store.format import (
    GENERATIONS,
    ORIGIN,
    CacheSpec,
    Entry,
    Index,
    content_digest,
    read_group,
)
from milan.store.generation import Generation
from pipeline.writing.copying import copy_shards, small_files
from pipeline.writing.disk import as_store_error
from pipeline.writing.shards import create_arrays
from pipeline.writing.store import Store, group_attributes


@dataclass(frozen=True)
class Drop:
    """What is to go; several parts add up."""

    layers: Sequence[str] = ()
    """Names of teachers and codecs, such as `ViT-B-16-quickgelu/int8`."""
    generations: Sequence[int] = ()
    """Numbers of generations."""
    views: int | None = None
    """How many views of each image are left, in all layers: the last ones go."""
    unpinned: bool = False
    """All that no run pins."""


@dataclass(frozen=True)
class Runs:
    """What the runs in some folders pin of a store."""

    pinned: dict[str, str]
    """Path of a generation -> a run that needs it."""
    others: list[str]
    """Runs that know nothing of the store as it is."""


@dataclass(frozen=True)
class Decision:
    """What is dropped of a store, shown before it is done."""

    kept: dict[str, int]
    """Path of each generation -> how many of its views are left."""
    rows: list[tuple[str, str]]
    """(generation, what goes) of those that lose something."""
    bytes: int
    """Of the shards that go."""


def prune(
    path: str | AnyPath,
    drop: Drop,
    *,
    runs: Sequence[str | Path] = (),
    agree: Callable[[Decision], bool],
    progress: Progress | None = None,
) -> Decision:
    """Drop a part of the finished store at `path`, if `agree` says so of the decision.

    `runs` are folders of runs, or folders with runs below them: what one of them pins stays, or
    nothing is done. Other runs are not known. Returns the decision. Raises CacheError, ConfigError;
    DataError for a folder without runs.
    """
    progress, where = progress or NoProgress(), as_path(path)
    Index.read(where)  # a folder that is no store stays untouched
    with as_store_error(where):
        store = Store(where)
        try:
            index = Index.read(where)
            known = _runs(runs, index)
            for run in known.others:
                progress.note(f"{run} pins nothing of {where}: it knows another store")
            decision = _decide(where, index, drop, known)
            if not decision.rows:
                store.remove_pruned()
                return decision
            if not agree(decision):
                raise ConfigError(
                    f"{where} would lose {format_bytes(decision.bytes)}; nothing is dropped",
                    expected="your consent", fix="--yes",
                )  # fmt: skip
            _carry_out(store, index, decision, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{where} is whole, as it was or without what was to go; the same line goes on"
            ) from None
        finally:
            store.close()
    return decision


# --- what goes ------------------------------------------------------------------------------------


def _runs(folders: Sequence[str | Path], index: Index) -> Runs:
    pinned: dict[str, str] = {}
    others: list[str] = []
    for folder in map(Path, folders):
        runs = sorted(file.parent for file in folder.rglob(RUN))
        if not runs:
            raise DataError(f"--runs {folder}: there is no run in or below it", expected=RUN)
        for run in runs:
            parts = read_run(run).get("stretches", [])  # none of a fine-tuning
            for part in parts:
                entries = [e for one in layers_of_part(part) for e in _entries_of(one, index)]
                pinned |= {entry.path: str(run) for entry in entries}
                if not entries and str(run) not in others:
                    others.append(str(run))
    return Runs(pinned, others)


def _entries_of(part: dict[str, Any], index: Index) -> list[Entry]:
    """The generations that a part of a run refers to, by the digest of their content."""
    visible = index.first(part["generations"])
    for layer in dict.fromkeys(entry.layer for entry in visible):
        entries = [entry for entry in visible if entry.layer == layer]
        if content_digest(entries) == part["cache"]:
            return entries
    return []


def _decide(where: AnyPath, index: Index, drop: Drop, runs: Runs) -> Decision:
    """What is left of each generation. Raises CacheError if a run needs more."""
    layers = list(dict.fromkeys(entry.layer for entry in index.generations))
    numbers = {entry.number for entry in index.generations}
    for name in drop.layers:
        if name not in layers:
            raise CacheError(
                f"{where} has no layer {name!r}", expected="one of " + ", ".join(layers),
                fix=nearest(name, layers),
            )  # fmt: skip
    for number in drop.generations:
        if number not in numbers:
            expected = "one of " + ", ".join(map(str, sorted(numbers)))
            raise CacheError(f"{where} has no generation {number}", expected=expected)
    if drop.unpinned and not runs.pinned:
        raise ConfigError(
            f"no run pins anything of {where}", expected="--runs with the runs that need it"
        )
    if drop.views is not None and drop.views < 1:
        raise ConfigError(f"--views {drop.views}", expected="1 or more")
    kept, rows, size = {}, [], 0
    for entry in index.generations:
        first, last = entry.views
        whole = last - first
        gone = (
            entry.layer in drop.layers
            or entry.number in drop.generations
            or (drop.unpinned and entry.path not in runs.pinned)
        )
        left = whole if drop.views is None else min(max(drop.views - first, 0), whole)
        kept[entry.path] = left = 0 if gone else left
        if left == whole:
            continue
        if entry.path in runs.pinned:
            raise CacheError(
                f"{runs.pinned[entry.path]} pins {entry.path} of {where}",
                expected="what no run needs",
                fix="keep it, or delete the run",
            )
        freed = entry.bytes if not left else _bytes_of(where, entry, left)
        size += freed
        views = f"views {first + left} to {last}"
        text = f"{entry.layer}, rows {entry.rows[0]:,} to {entry.rows[1]:,}, {views}"
        rows.append((entry.path, f"{text}: {format_bytes(freed)}"))
    _check_left(where, index, kept)
    return Decision(kept, rows, size)


def _bytes_of(where: AnyPath, entry: Entry, first: int) -> int:
    """Bytes of the shards of a generation's views from `first` on."""
    generation = Generation(where, entry)
    sizes = generation.sizes().clip(0).sum(axis=1).reshape(generation.spec.blocks, -1)
    return int(sizes[:, first:].sum())


def _check_left(where: AnyPath, index: Index, kept: dict[str, int]) -> None:
    """Raises CacheError unless each layer that is left has all views of all its rows."""
    left = [entry for entry in index.generations if kept[entry.path]]
    if not left:
        raise CacheError(f"nothing would be left of {where}", fix=f"delete {where}")
    for layer in dict.fromkeys(entry.layer for entry in left):
        parts = [entry for entry in left if entry.layer == layer]
        rows = max(entry.rows[1] for entry in parts)
        views = max(entry.views[0] + kept[entry.path] for entry in parts)
        area = sum((e.rows[1] - e.rows[0]) * kept[e.path] for e in parts)
        if area != rows * views:
            raise CacheError(
                f"{where} would have {area:,} targets of {layer}",
                expected=f"{rows:,} rows x {views} views: all views of a row, and no row between "
                "others, can go alone",
                fix="--views, --layer, or the newest generations",
            )


# --- letting it go --------------------------------------------------------------------------------


def _carry_out(store: Store, index: Index, decision: Decision, progress: Progress) -> None:
    """Write generations that lose views again; replace the index; remove what does not count."""
    cut = [e for e in index.generations if 0 < decision.kept[e.path] < e.views[1] - e.views[0]]
    _check_none_begun(store, index, cut)
    successors = {
        entry.path: _cut(store, entry, decision.kept[entry.path], progress) for entry in cut
    }
    dropped = {path for path, views in decision.kept.items() if not views}

    def without(now: Index) -> Index:
        left = tuple(successors.get(e.path, e) for e in now.generations if e.path not in dropped)
        paths = {entry.path for entry in left}
        rows = {e.layer: 0 for e in left}
        for entry in left:
            rows[entry.layer] = max(rows[entry.layer], entry.rows[1])
        return Index(
            left,
            {n: [r for r in gone if r < rows[n]] for n, gone in now.dropped.items() if n in rows},
            tuple(sorted({*now.pruned, *dropped, *successors} - paths)),
        )

    after = store.replace_index(without)
    store.log("prune", generations=sorted({*dropped, *successors}), bytes=decision.bytes)
    if _rows(after) < _rows(index):
        cache = TargetCache(store.path)
        superseded = {*cache.superseded}
        bad = {row: why for row, why in cache.bad.items() if row not in superseded}
        store.report_bad(bad, cache.manifest)
    store.remove_pruned()


def _rows(index: Index) -> int:
    return max(entry.rows[1] for entry in index.generations)


def _check_none_begun(store: Store, index: Index, cut: Collection[Entry]) -> None:
    """Raises CacheError if an unfinished growth has the number that a new one would get."""
    known = {*index.pruned, *(entry.path for entry in index.generations)}
    begun = sorted(store.begun() - known)
    if cut and begun:
        raise CacheError(
            f"{store.path / begun[0]} is begun and not finished",
            expected="a store that is not growing",
            fix="finish it by the same extract-targets line, or delete that folder",
        )


def _cut(store: Store, entry: Entry, views: int, progress: Progress) -> Entry:
    """A generation with the first `views` of another's: the same shards, with a spec of its own."""
    source = Generation(store.path, entry)
    spec = replace(source.spec, views=views)
    name = _name_for(store, spec)

    def build(folder: Path) -> None:
        create_arrays(folder, spec, group_attributes(spec, source.attributes["about"]), {})
        arrays = frozenset(f"{array}/zarr.json" for array in spec.arrays())
        small_files(source, folder, skip=arrays | {"zarr.json"})
        if (source.root / ORIGIN).exists():
            (folder / ORIGIN).write_bytes(read_file(source.root / ORIGIN))

    writer = store.begin(name, spec, build)
    copy_shards(source, writer, progress, link=True)
    return writer.finish(entry.layer)


def _name_for(store: Store, spec: CacheSpec) -> str:
    """The name of a new generation, which the index knows and does not count; or the one that an
    earlier call has begun.
    """
    index = Index.read(store.path)
    for name in index.pruned:
        root = store.path / name
        if (root / "zarr.json").exists() and read_group(root)[0] == spec:
            return name
    name = f"{GENERATIONS}/{index.count:03d}"
    store.replace_index(lambda now: replace(now, pruned=(*now.pruned, name)))
    return name
