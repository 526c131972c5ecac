"""Reading a store's texts: what the teacher's text tower said of captions and of classes.

Texts are of rows, not of views: they lie in the shards of each block's first view, and are read
where the store is, not from local copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np

from milan.errors import CacheError
from milan.store.format import PROTOTYPES, TEXT, TEXT_IDS, record_name
from milan.store.generation import Generation


@dataclass
class Texts:
    """Captions as the text tower sees them; numpy arrays."""

    features: np.ndarray
    """[B, C] float32, of length 1."""
    ids: np.ndarray
    """[B, L] int32: equal rows are equal captions, as far as the tower reads."""


@dataclass
class Prototypes:
    """Classes as the text tower sees them, in the order of their numbers; numpy arrays."""

    classes: list[str]
    features: np.ndarray
    """[P, C] float32: the mean of a class's sentences, of length 1."""
    ids: np.ndarray
    """[P, M, L] int32, of each class in each template."""


def read_texts(generation: Generation, rows: np.ndarray) -> Texts:
    """The texts of rows of the store, all in `generation`. Raises CacheError, with the row.

    Every row is compared with the checksums that its record keeps.
    """
    spec = generation.spec
    local = rows - spec.first_row
    blocks = local // spec.shard_size
    proofs = {block: generation.proof(block, 0) for block in np.unique(blocks).tolist()}
    for row, block in zip(local.tolist(), blocks.tolist(), strict=True):
        if proofs[block].crc32c[TEXT][row - proofs[block].first] < 0:
            raise CacheError(
                f"row {row + spec.first_row} of {generation.root} has no caption",
                expected="rows of TargetCache.captioned",
            )
    futures = {name: generation.array(name)[local].read() for name in (TEXT, TEXT_IDS)}
    got = {}
    for name, future in futures.items():
        try:
            got[name] = np.ascontiguousarray(future.result())
        except (ValueError, RuntimeError, OSError) as error:
            raise _damaged(generation, name, sorted(proofs), str(error)) from None
        for row, block, values in zip(local.tolist(), blocks.tolist(), got[name], strict=True):
            sums = proofs[block].crc32c[name]
            if google_crc32c.value(values) != sums[row - proofs[block].first]:
                why = f"row {row + spec.first_row} is not what its record says"
                raise _damaged(generation, name, [block], why)
    return Texts(got[TEXT], got[TEXT_IDS])


def read_prototypes(generation: Generation) -> Prototypes | None:
    """The classes of a generation, each file proven by the index; None if it names none."""
    files = [name for name in generation.entry.files if name.startswith(f"{PROTOTYPES}/")]
    if not files:
        return None
    for name in files:
        generation.read_verified(name)
    tables = {
        name: np.asarray(generation.array(f"{PROTOTYPES}/{name}").read().result())
        for name in ("features", "ids")
    }
    return Prototypes(generation.manifest().classes or [], **tables)


def _damaged(generation: Generation, name: str, blocks: list[int], why: str) -> CacheError:
    shards = ", ".join(record_name(block, 0)[:-5] for block in blocks)
    return CacheError(
        f"{generation.root}: {name} (of shards {shards}) cannot be used: {why}",
        expected="what its record says",
        fix=f"milan repair {generation.store}",
    )
