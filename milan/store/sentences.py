"""Which sentences the rows of a store may be given, and drawing one by address."""

from __future__ import annotations

import numpy as np

from milan.core import rng
from milan.store.cache import TargetCache


class Sentences:
    """The token ids that each row of a store may be given: its captions, else its class's prompts.

    A row without either has none.
    """

    def __init__(self, cache: TargetCache) -> None:
        """Raises CacheError for a store without token ids."""
        self.cache = cache
        spec = cache.spec.texts
        if not spec:
            raise cache.no_texts()
        self.length: int = spec["context"]
        self.captioned = np.zeros(cache.rows, bool)
        self.captioned[cache.captioned] = True
        self.prompts = None if cache.prototypes is None else cache.prototypes.ids
        """[P, M, L] int32"""
        self.labels = cache.manifest.labels()

    def missing(self) -> np.ndarray:
        """Rows without a sentence, ascending; int64."""
        known = self.captioned.copy()
        if self.prompts is not None:
            classes = (self.prompts[:, 0, 0] >= 0)[self.labels.clip(0)]
            known |= (self.labels >= 0) & classes
        return np.flatnonzero(~known)

    def single(self, rows: np.ndarray) -> bool:
        """Whether `rows` are of one class where they have no captions of their own."""
        return bool(self.captioned[rows].all()) or len(np.unique(self.labels[rows])) == 1

    def draw(self, rows: np.ndarray, views: np.ndarray, epoch: int, *, seed: int) -> np.ndarray:
        """Token ids [B, L] int32, one of its sentences for each of `rows`, by its address.

        Raises CacheError for damage.
        """
        ids = np.empty((len(rows), self.length), np.int32)
        told = np.flatnonzero(self.captioned[rows])
        captions = self.cache.token_ids(rows[told]) if len(told) else None
        place = dict(zip(told.tolist(), range(len(told)), strict=True))
        for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            if i in place:
                assert captions is not None
                known = captions[place[i]]
            else:
                assert self.prompts is not None
                known = self.prompts[self.labels[row]]
            known = known[known[:, 0] >= 0]
            drawn = rng.bits(seed, rng.CAPTION, (row, view, epoch), 1)[0]
            ids[i] = known[int(drawn % np.uint64(len(known)))]
        return ids
