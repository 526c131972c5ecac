"""Reading a store's texts: the text tower's output for captions and for class names.

A text belongs to a row, not to a view: texts are in the shards of each block's first view. They
are read from the store, not from the local cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np

from milan.errors import CacheError
from milan.store.format import PROTOTYPES, TEXT, TEXT_IDS, record_name
from milan.store.generation import Generation, read_array


@dataclass
class Texts:
    """Encoded captions; numpy arrays."""

    features: np.ndarray | None
    """[B, C] float32, of length 1; None in a store of token ids alone."""
    ids: np.ndarray
    """[B, L] int32: token ids. Equal rows: equal captions, up to the length the tower reads. In a
    store of token ids alone [B, M, L]: of M captions, -1 where an image has fewer."""


@dataclass
class Prototypes:
    """Encoded class prompts, in the order of class numbers; numpy arrays."""

    classes: list[str]
    features: np.ndarray | None
    """[P, C] float32, of length 1: the mean over the prompts of a class; None in a store of token
    ids alone."""
    ids: np.ndarray
    """[P, M, L] int32: token ids of each class in each template."""

    @classmethod
    def join(cls, parts: list[Prototypes], classes: list[str]) -> Prototypes:
        """Those of `classes`, in this order, each from the last part that has it.

        NaN and -1 where none has it.
        """
        if parts[-1].classes == classes:
            return parts[-1]
        last, size = parts[-1], len(classes)
        features = None
        if last.features is not None:
            features = np.full((size, *last.features.shape[1:]), np.nan, np.float32)
        ids = np.full((size, *last.ids.shape[1:]), -1, np.int32)
        number = {name: i for i, name in enumerate(classes)}
        for part in parts:
            known = [i for i, name in enumerate(part.classes) if name in number]
            at = [number[part.classes[i]] for i in known]
            ids[at] = part.ids[known]
            if features is not None and part.features is not None:
                features[at] = part.features[known]
        return cls(classes, features, ids)


def read_texts(generation: Generation, rows: np.ndarray) -> Texts:
    """The texts of rows of the store, all in `generation`. Raises CacheError naming the row.

    Every row is compared with the checksum in its record.
    """
    spec = generation.spec
    local = rows - spec.first_row
    blocks = local // spec.shard_size
    checksums = {block: generation.checksums(block, 0) for block in np.unique(blocks).tolist()}
    for row, block in zip(local.tolist(), blocks.tolist(), strict=True):
        if checksums[block].crc32c[TEXT_IDS][row - checksums[block].first] < 0:
            raise CacheError(
                f"row {row + spec.first_row} of {generation.root} has no caption",
                expected="rows of TargetCache.captioned",
            )
    values: dict[str, np.ndarray] = {}
    for name in [name for name in (TEXT, TEXT_IDS) if name in spec.arrays()]:
        try:
            values |= generation.read_arrays([name], local)
        except (ValueError, RuntimeError, OSError) as error:
            raise _damaged(generation, name, sorted(checksums), str(error)) from None
        for row, block, value in zip(local.tolist(), blocks.tolist(), values[name], strict=True):
            expected = checksums[block].crc32c[name][row - checksums[block].first]
            if google_crc32c.value(value) != expected:
                why = f"row {row + spec.first_row} differs from the checksum of its record"
                raise _damaged(generation, name, [block], why)
    return Texts(values.get(TEXT), values[TEXT_IDS])


def read_prototypes(generation: Generation) -> Prototypes | None:
    """The class prompts of a generation, each file verified; None if it has none."""
    files = [name for name in generation.entry.files if name.startswith(f"{PROTOTYPES}/")]
    if not files:
        return None
    for name in files:
        generation.read_verified(name)
    root = generation.root / PROTOTYPES
    features = read_array(root / "features") if generation.spec.has_targets else None
    return Prototypes(generation.manifest().classes or [], features, read_array(root / "ids"))


def _damaged(generation: Generation, name: str, blocks: list[int], why: str) -> CacheError:
    shards = ", ".join(record_name(block, 0)[:-5] for block in blocks)
    return CacheError(
        f"{generation.root}: {name} (of shards {shards}) cannot be used: {why}",
        expected="the checksums of its record",
        fix=f"milan repair {generation.store}",
    )
