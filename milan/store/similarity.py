"""How alike a store's image features and texts are: what temperatures of softmax follow from.

A frozen CLIP's patches differ little in their cosines to texts, and a temperature that is large
beside that spread gives targets that are nearly uniform (docs/rils.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from milan.core import rng
from milan.errors import DataError
from milan.store.cache import TargetCache

VIEWS = 16  # whose patches are compared
_LEAST_NORM = 1e-6


def text_bank(
    cache: TargetCache, count: int, *, seed: int, classes: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(features [K, C] float32 of length 1, token ids [K, L]) of different texts of a store.

    Seeded draws of its captions, at most `count`; with `classes`, or where there are no captions,
    its class prompts. Raises CacheError for a store without text features, DataError where
    classes are asked for and there are none.
    """
    if not cache.spec.texts or not cache.spec.has_targets:
        raise cache.no_text_features()
    rows = cache.captioned
    if len(rows) and not classes:
        rows = np.sort(rows[rng.permutation(seed, rng.SAMPLE, (3,), len(rows))[:count]])
        texts = cache.texts(rows)
        features, ids = texts.features, texts.ids
    else:
        prototypes = cache.prototypes
        if prototypes is None:
            raise DataError(
                f"the images of {cache.path} have no class names",
                expected="class folders, or labels with names",
                fix="--set objective.sentences=captions" if len(rows) else "",
            )
        features, ids = prototypes.features, prototypes.ids[:, 0]
    assert features is not None
    known = np.isfinite(features).all(axis=1)
    _, first = np.unique(ids[known], axis=0, return_index=True)
    first.sort()
    return features[known][first], ids[known][first]


@dataclass(frozen=True)
class Similarities:
    """Cosines of some views' features to texts."""

    texts: int
    """K, how many different ones."""
    mean: float
    """Of patches."""
    spread: float
    """Of patches: the standard deviation over the texts, mean over patches."""
    class_mean: float
    class_spread: float
    """Of the class token."""
    cosines: torch.Tensor
    """[patches, K]"""

    def effective(self, tau: float) -> float:
        """exp(H): over how many texts softmax(cosine / tau) of a patch spreads, mean."""
        log_share = F.log_softmax(self.cosines / tau, dim=1)
        return float((-(log_share.exp() * log_share).sum(dim=1)).exp().mean())

    @property
    def teacher_tau(self) -> float:
        """A third of the spread, rounded: about one text in fifty then has a share."""
        return float(f"{max(self.spread, 1e-4) / 3:.2g}")


def similarities(cache: TargetCache, *, texts: int = 4096, seed: int = 0) -> Similarities:
    """Measured on the first view of VIEWS images. Raises CacheError as `text_bank` does."""
    bank = torch.from_numpy(text_bank(cache, texts, seed=seed)[0])
    rows = cache.good_rows()[:VIEWS]
    targets = cache.read(rows, np.zeros_like(rows))
    assert targets.codes is not None
    scale = None if targets.scale is None else torch.from_numpy(targets.scale)
    features = cache.codec.decode(torch.from_numpy(targets.codes), scale)
    cosines = F.normalize(features, dim=-1, eps=_LEAST_NORM) @ bank.T  # [B, T, K]
    first, patches = cosines[:, 0], cosines[:, 1:].flatten(0, 1)
    return Similarities(
        len(bank),
        float(patches.mean()),
        float(patches.std(dim=1, correction=0).mean()),
        float(first.mean()),
        float(first.std(dim=1, correction=0).mean()),
        patches,
    )
