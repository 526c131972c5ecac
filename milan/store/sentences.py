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

    def encoded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(features [B, C] float32, token ids [B, L] int32) of the caption of each of `rows`, else
        of its class, whose ids are those of its first prompt; zeros and -1 without either.

        Raises CacheError for damage, and for a store without text features.
        """
        if not self.cache.spec.has_targets:
            raise self.cache.no_text_features()
        features = np.zeros((len(rows), self.cache.spec.channels), np.float32)
        ids = np.full((len(rows), self.length), -1, np.int32)
        captioned, prototypes = np.flatnonzero(self.captioned[rows]), self.cache.prototypes
        if len(captioned):
            texts = self.cache.texts(rows[captioned])
            features[captioned], ids[captioned] = texts.features, texts.ids
        if prototypes is not None and prototypes.features is not None:
            labels = np.where(self.captioned[rows], -1, self.labels[rows])
            known = np.flatnonzero((labels >= 0) & (prototypes.ids[:, 0, 0] >= 0)[labels.clip(0)])
            features[known] = prototypes.features[labels[known]]
            ids[known] = prototypes.ids[labels[known], 0]
        return features, ids

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
        captioned = np.flatnonzero(self.captioned[rows])
        captions = self.cache.token_ids(rows[captioned]) if len(captioned) else None
        place = dict(zip(captioned.tolist(), range(len(captioned)), strict=True))
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
