"""MILAN's objective: the teacher's features of all tokens, by direction (MILAN, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from milan.objectives.base import Objective, Prediction
from milan.objectives.resample import resampled_features


def feature_regression(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean over B views and all T tokens of 2 - 2 cos (MILAN eq. 1, and its models_milan.py).

    `prediction`, `features` [B, T, C], any float dtype; computed in float32. Only directions
    matter; visible, masked and class tokens count alike. Scalar in [0, 4].
    """
    cosine = F.cosine_similarity(prediction.float(), features.float(), dim=-1, eps=1e-12)
    return (2 - 2 * cosine).mean()


class FeatureRegression(Objective):
    """Predict the teacher's features of the class token and of all patches, masked or not."""

    decoder = "prompt"
    masking = "semantic"
    needs_features = True

    def target_width(self, encoder: Any) -> int:
        """The teacher's channels."""
        return self.cache.spec.channels

    def features(self, prediction: Prediction) -> torch.Tensor:
        """The teacher's features for the predicted tokens, [B, T, C].

        Of another grid than the student's they are resampled: as unit vectors, for only directions
        count, and a long one must not drown its neighbours. A student without class token predicts
        patches only.
        """
        batch, patches = prediction.batch, prediction.batch.noise.shape[1]
        assert batch.codes is not None
        features = self.cache.codec.decode(batch.codes, batch.scale)
        if features.shape[1] != 1 + patches:
            features = resampled_features(F.normalize(features, dim=-1), patches)
        return features[:, -prediction.tokens.shape[1] :]

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """`feature_regression`."""
        return feature_regression(prediction.tokens, self.features(prediction))

    def metrics(self, prediction: Prediction) -> dict[str, torch.Tensor]:
        """The loss, and the mean cosine to the teacher over masked patches."""
        features = self.features(prediction)
        cosine = F.cosine_similarity(prediction.tokens.float(), features.float(), dim=-1)
        masked = prediction.mask.boolean()
        return {
            "loss": feature_regression(prediction.tokens, features),
            "cosine": cosine[:, -masked.shape[1] :][masked].mean(),
        }

    def picture(self, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of the patches, the teacher's and the student's."""
        patches = prediction.patches.float()
        return self.features(prediction)[:, -patches.shape[1] :].float(), patches
