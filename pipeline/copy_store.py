"""Copy a finished store, disk or bucket, to another place: the same bytes, the index last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milan.core.paths import AnyPath, Url, as_path, is_local, read_file
from milan.core.progress import NoProgress, Progress
from milan.errors import CacheError, ConfigError
from milan.store.format import INDEX, ORIGIN, SHARDS, Index, canonical
from milan.store.generation import Generation
from pipeline.writing.backend import check_space, location_of
from pipeline.writing.copying import copy_shards, small_files
from pipeline.writing.disk import as_store_error
from pipeline.writing.store import BAD_CSV, Store


def copy_store(
    source: str | AnyPath, target: str | AnyPath, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Copy the finished store at `source` to `target`, a new folder or an earlier copy of it.

    Every file is compared with its checksum on the way. The index of the copy is written last, byte
    for byte; a call that was killed goes on where it stopped. The origin of the copy says where its
    images are as seen from there, the log is its own. Returns path, generations, shards, bytes.
    Raises CacheError if `source` is damaged, or `target` has another store; DataError if a server
    does not answer.
    """
    progress, here, there = progress or NoProgress(), as_path(source), location_of(target).path
    index_bytes = _index_of(here)
    index = Index.read(here)
    _check_apart(here, there)
    generations = [Generation(here, entry) for entry in index.generations]
    size = sum(entry.bytes for entry in index.generations)
    with as_store_error(there):
        store = Store(there)
        try:
            listed = _check_target(store, here, index)
            new = [entry for entry in index.generations if entry.path not in listed]
            needed = sum(entry.bytes for entry in new if entry.path not in store.begun())
            check_space(location_of(there), needed, fix="a larger disk")
            for generation in generations:
                _copy(generation, store, progress)
            _copy_beside(here, store)
            store.log("copied", source=str(here), generations=len(generations))
            store.put_index(index_bytes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what is copied stays in {there}; the same line goes on with the rest"
            ) from None
        finally:
            store.close()
    return {
        "path": str(there),
        "generations": len(generations),
        "shards": sum(entry.shards for entry in index.generations),
        "bytes": size,
    }


def _index_of(store: AnyPath) -> bytes:
    """Its bytes, before they are parsed. Raises CacheError as Index.read does."""
    return read_file(store / INDEX) if (store / INDEX).exists() else b""


def _check_apart(here: AnyPath, there: AnyPath) -> None:
    """Raises ConfigError if one of two places is the other, or in it."""
    one, other = here.resolve(), there.resolve()
    if isinstance(one, Url) or isinstance(other, Url):
        inside = f"{other}/".startswith(f"{one}/") or f"{one}/".startswith(f"{other}/")
    else:
        inside = one.is_relative_to(other) or other.is_relative_to(one)
    if inside:
        raise ConfigError(
            f"the copy at {there} would be in the store at {here}, or around it",
            expected="another folder",
        )


def _check_target(store: Store, here: AnyPath, index: Index) -> set[str]:
    """The generations that the target lists. Raises CacheError if it is of another store."""
    ours = {entry.path: entry for entry in index.generations}
    listed = store.entries()
    for entry in listed:
        if ours.get(entry.path) != entry:
            raise _another(store.path, here, f"{entry.path}, {entry.digest[:12]}")
    for path in sorted(store.begun()):
        begun = store.backend.read(f"{path}/zarr.json")
        if begun is None or path in index.pruned:
            continue
        if path not in ours or begun != read_file(here / path / "zarr.json"):
            raise _another(store.path, here, path)
    return {entry.path for entry in listed}


def _another(target: AnyPath, source: AnyPath, what: str) -> CacheError:
    return CacheError(
        f"{target} has a generation that {source} has not ({what})",
        expected="a new or empty folder, or an earlier copy of the same store",
        fix="another folder",
    )


def _copy(source: Generation, store: Store, progress: Progress) -> None:
    """Copy a generation, its shard table last."""

    def build(folder: Path) -> None:
        small_files(source, folder)
        if (source.root / ORIGIN).exists():
            (folder / ORIGIN).write_bytes(_origin_at(source, store.path))

    writer = store.begin(source.entry.path, source.spec, build)
    copy_shards(source, writer, progress, link=False)
    name, table = f"{source.entry.path}/{SHARDS}", source.read_verified(SHARDS)
    if store.backend.read(name) != table:
        store.backend.write(name, table)


def _origin_at(source: Generation, target: AnyPath) -> bytes:
    """origin.json for a copy at `target`: only the way from the store to the images is another."""
    data = read_file(source.root / ORIGIN)
    try:
        origin = source.origin
    except CacheError:  # it is in no digest, and what is left of it may help
        return data
    root = as_path(origin["data_root"])
    relative = location_of(target).relative_root(root) if is_local(root) else None
    return canonical(json.loads(data) | {"data_root_from_store": relative})


def _copy_beside(here: AnyPath, store: Store) -> None:
    """The list of rejected images, if there is one."""
    rejected = read_file(here / BAD_CSV) if (here / BAD_CSV).exists() else None
    if rejected is None:
        store.backend.remove(BAD_CSV)
    elif store.backend.read(BAD_CSV) != rejected:
        store.backend.write(BAD_CSV, rejected)
