"""Shards of a finished generation that are written again: of the same images, or not at all."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from milan.errors import CacheError, ImageFault
from milan.images.decode import content_digest
from milan.images.source import ImageSource
from milan.store.generation import Generation
from pipeline.extraction.growth import Part

_READERS = 16  # threads that compare images
_DELETED = "missing: deleted since extraction"


def written_again(
    part: Part,
    generation: Generation,
    images: ImageSource,
    shards: Collection[tuple[int, int]],
    dropped: Collection[int],
) -> tuple[Part, set[tuple[int, int]]]:
    """(`part` as it was, the shards to write) for (block, view) `shards` that are damaged or gone.

    Rows that were rejected stay rejected, whatever is in their files by now: another view of them
    has no targets either. Of `dropped` rows, counted through the store, the images may be gone:
    then all views of their blocks are written. Raises CacheError if another image is not what it
    was.
    """
    rejected, digests = _recorded(part, generation, sorted({block for block, _ in shards}))

    def fault(row: int) -> str:
        try:
            same = content_digest(images.read(row)) == digests[row]
        except ImageFault as error:
            return str(error)
        return "" if same else "changed: other bytes"

    with ThreadPoolExecutor(_READERS, thread_name_prefix="compare") as pool:
        faults = dict(zip(digests, pool.map(fault, digests), strict=True))
    faults = {row: why for row, why in faults.items() if why}
    first, size, views = part.spec.first_row, part.spec.shard_size, range(part.spec.views)
    deleted = [row for row in faults if first + row in dropped]
    if others := sorted(faults.keys() - {*deleted}):
        raise CacheError(
            f"{len(others):,} images of {len(shards):,} damaged shards of {generation.root} are "
            f"not what they were, the first is {part.manifest.key(others[0])!r}: "
            f"{faults[others[0]]}",
            expected="the images as they were at extraction; nothing was written",
            fix="restore them, then the same line; or extract to another store",
        )
    rejected |= {row: (digests[row], _DELETED) for row in deleted}
    whole = {(row // size, view) for row in deleted for view in views}
    return replace(part, rejected=rejected), {*shards} | whole


def _recorded(
    part: Part, generation: Generation, blocks: list[int]
) -> tuple[dict[int, tuple[str | None, str]], dict[int, str]]:
    """({rejected row: (digest, reason)}, {other row: digest}) of blocks, as far as is known: by an
    intact record, else by the first views of the same rows.
    """
    rejected: dict[int, tuple[str | None, str]] = {}
    digests: dict[int, str] = {}
    for block in blocks:
        start, stop = part.spec.block_rows(block)
        for view in range(part.spec.views):
            try:
                record = generation.intact_record(block, view)
            except CacheError:
                continue
            known = dict(enumerate(record["digests"], start))
            rejected |= {int(row): (known[int(row)], why) for row, why in record["bad"].items()}
            digests |= {row: digest for row, digest in known.items() if row not in rejected}
            break
        else:
            if part.first:
                rows = range(start, stop)
                known = {r: part.first.content_digest(part.spec.first_row + r, 0) for r in rows}
                digests |= {row: digest for row, digest in known.items() if digest}
    return rejected, digests
