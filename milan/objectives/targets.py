"""One teacher's targets of a batch, and how far a student's prediction is from them.

B views, N patches = V visible + M masked of the student's grid, T = 1 + N tokens with the class
token first (T = N for a student without one; fewer where a mask chooses), C the teacher's channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch.nn import functional as F

from milan.data.loader import Batch
from milan.models.masking import Mask
from milan.objectives.normalisation import MEASURED, Affine, layer_norm
from milan.objectives.relations import relation_distance
from milan.objectives.resample import resampled_features
from milan.store.cache import TargetCache
from milan.store.statistics import statistics_of

_BETA = 2.0


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

    def __init__(self, cache: TargetCache, norm: str = "none") -> None:
        """`norm`: how features are normalised (milan.objectives.normalisation)."""
        self.cache, self.norm = cache, norm
        self._affine: Affine | None = None

    @property
    def channels(self) -> int:
        """C."""
        return self.cache.spec.channels

    def affine(self) -> Affine | None:
        """The map of a norm by statistics, made when it is first asked for; None of another."""
        if self._affine is None and self.norm in MEASURED:
            self._affine = Affine(self.norm, statistics_of(self.cache))
        return self._affine

    def to(self, device: torch.device) -> None:
        """Have all tables on `device`: they cannot be made while a step is traced or compiled."""
        self.cache.codec.to(device)
        if affine := self.affine():
            affine.to(device)

    def class_token(self, coded: Coded) -> torch.Tensor:
        """The teacher's own class token, or what stands for it, [B, C] float32."""
        codes, scale = coded
        return self.cache.codec.decode(codes[:, :1], None if scale is None else scale[:, :1])[:, 0]

    def features(
        self, coded: Coded, mask: Mask, tokens: int, *, normalised: bool = True
    ) -> torch.Tensor:
        """The features of the predicted tokens, [B, T, C] float32, for T = `tokens`.

        `normalised` as the student predicts them, else as the teacher gave them. Of another grid
        than the student's they are resampled: normalised, or as unit vectors, for a long one must
        not drown its neighbours. A student without class token predicts patches only. Those of
        patches that are not decoded are left out. They are in the decoder's order, as predictions
        are: to gather codes takes fewer bytes than to turn predictions back.
        """
        codes, scale = coded
        patches = mask.visible.shape[1] + mask.masked.shape[1]
        resample, at = codes.shape[1] != 1 + patches, mask.rows
        if not resample:
            codes, scale = _rows(codes, at), None if scale is None else scale.gather(1, at)
        features = self.cache.codec.decode(codes, scale)
        if normalised and (affine := self.affine()):
            features = affine(features)
        elif normalised and self.norm == "layernorm":
            features = layer_norm(features)
        elif resample:
            features = F.normalize(features, dim=-1)
        if resample:
            shape = self.cache.view_spec.size
            features = _rows(resampled_features(features, patches, shape), at)
        return features[:, -tokens:]

    def restored(self, prediction: torch.Tensor) -> torch.Tensor:
        """A prediction [B, T, C] as the teacher's features, as far as the norm can be undone."""
        affine = self.affine()
        return affine.restored(prediction) if affine else prediction


def cosine_distance(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """2 - 2 cos of each token, [B, T] float32 for [B, T, C] of any float dtype (MILAN eq. 1)."""
    return 2 - 2 * F.cosine_similarity(prediction.float(), features.float(), dim=-1, eps=1e-12)


def smooth_l1_distance(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Smooth L1 of each token, mean over its channels, [B, T] float32 for [B, T, C].

    d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with beta 2 as data2vec has for images
    (arXiv 2202.03555). MaskAlign (2211.08887) has beta 1, and twice the value.
    """
    loss = F.smooth_l1_loss(prediction.float(), features.float(), beta=_BETA, reduction="none")
    return loss.mean(dim=-1)


DISTANCES: Final[dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "cosine": cosine_distance, "smooth-l1": smooth_l1_distance, "relation": relation_distance,
}  # fmt: skip
"""--loss -> the distance of each token."""


def _rows(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows `at` [B, K] of [B, T, C]."""
    return table.gather(1, at[..., None].expand(-1, -1, table.shape[2]))
