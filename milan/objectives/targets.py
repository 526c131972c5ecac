"""One teacher's targets of a batch, and how far a student's prediction is from them.

B views, N patches = V visible + M masked of the student's grid, T = 1 + N tokens with the class
token first (T = N for a student without one; fewer where a mask chooses), C the teacher's channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from milan.data.loader import Batch
from milan.models.masking import Mask
from milan.objectives.resample import resampled_features
from milan.store.cache import TargetCache


class Coded(NamedTuple):
    """What a batch brings of one teacher."""

    codes: torch.Tensor
    """[B, 1 + patches of the teacher, width] in the codec's dtype."""
    scale: torch.Tensor | None
    """[B, 1 + patches of the teacher] float32, for codecs that scale."""

    @classmethod
    def of(cls, batch: Batch) -> Coded:
        """Of a batch that was loaded with features."""
        assert batch.codes is not None
        return cls(batch.codes, batch.scale)


class TeacherTargets:
    """The targets of one teacher: a layer of a store, for the tokens that a student predicts."""

    def __init__(self, cache: TargetCache) -> None:
        self.cache = cache

    @property
    def channels(self) -> int:
        """C."""
        return self.cache.spec.channels

    def class_token(self, coded: Coded) -> torch.Tensor:
        """The teacher's own class token, or what stands for it, [B, C] float32."""
        codes, scale = coded
        return self.cache.codec.decode(codes[:, :1], None if scale is None else scale[:, :1])[:, 0]

    def features(self, coded: Coded, mask: Mask, tokens: int) -> torch.Tensor:
        """The teacher's features of the predicted tokens, [B, T, C] float32, for T = `tokens`.

        Of another grid than the student's they are resampled: as unit vectors, for only directions
        count, and a long one must not drown its neighbours. A student without class token predicts
        patches only. Those of patches that are not decoded are left out.
        """
        codes, scale = coded
        patches = mask.visible.shape[1] + mask.masked.shape[1]
        resample, at = codes.shape[1] != 1 + patches, None
        if mask.chosen is not None:
            at = F.pad(1 + mask.predicted, (1, 0))
            if not resample:  # decode those alone
                codes, scale = _rows(codes, at), None if scale is None else scale.gather(1, at)
        features = self.cache.codec.decode(codes, scale)
        if resample:
            features = resampled_features(F.normalize(features, dim=-1), patches)
            features = features if at is None else _rows(features, at)
        return features[:, -tokens:]


def cosine_distance(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """2 - 2 cos of each token, [B, T] float32 for [B, T, C] of any float dtype (MILAN eq. 1)."""
    return 2 - 2 * F.cosine_similarity(prediction.float(), features.float(), dim=-1, eps=1e-12)


def _rows(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` [B, K] of [B, T, C]."""
    return table.gather(1, at[..., None].expand(-1, -1, table.shape[2]))
