"""MILAN's objective: the teacher's features of all tokens, by direction (MILAN, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from milan.objectives.base import Objective, Prediction
from milan.objectives.targets import Coded, TeacherTargets, cosine_distance
from milan.store.cache import TargetCache


def feature_regression(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean over B views and all T tokens of 2 - 2 cos (MILAN eq. 1, and its models_milan.py).

    `prediction`, `features` [B, T, C], any float dtype; computed in float32. Only directions
    matter; visible, masked and class tokens count alike. Scalar in [0, 4].
    """
    return cosine_distance(prediction, features).mean()


def image_regression(prediction: Prediction, features: torch.Tensor) -> torch.Tensor:
    """`feature_regression` of each image, [B], for features [B, T, C] of the predicted tokens.

    Where D of M masked patches are decoded, each counts M / D times: the mean over draws is what
    the same predictions of all tokens have.
    """
    distance, mask = cosine_distance(prediction.tokens, features), prediction.mask
    if mask.chosen is None:
        return distance.mean(dim=1)
    left_out = mask.masked.shape[1] - mask.chosen.shape[1]
    decoded = prediction.of_patches(distance).gather(1, mask.decoded_at)
    total = distance.sum(dim=1) + left_out * decoded.mean(dim=1)
    return total / (distance.shape[1] + left_out)


class FeatureRegression(Objective):
    """Predict the teacher's features of the class token and of all patches, masked or not."""

    decoder = "prompt"
    masking = "semantic"
    needs_features = True

    def __init__(self, cache: TargetCache, **settings: Any) -> None:
        super().__init__(cache, **settings)
        self.targets = TeacherTargets(cache)

    def target_width(self, encoder: Any) -> int:
        """The teacher's channels."""
        return self.targets.channels

    def features(self, prediction: Prediction) -> torch.Tensor:
        """The teacher's features for the predicted tokens, [B, T, C]."""
        coded, tokens = Coded.of(prediction.batch), prediction.tokens.shape[1]
        return self.targets.features(coded, prediction.mask, tokens)

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """`feature_regression`; the mean of `image_regression` where not all is decoded."""
        return self._regression(prediction, self.features(prediction))

    def _regression(self, prediction: Prediction, features: torch.Tensor) -> torch.Tensor:
        if prediction.mask.chosen is None:
            return feature_regression(prediction.tokens, features)
        return image_regression(prediction, features).mean()

    def image_losses(self, prediction: Prediction) -> torch.Tensor:
        """The loss of each image, [B]; their mean is `loss`."""
        return image_regression(prediction, self.features(prediction))

    def metrics(self, prediction: Prediction) -> dict[str, torch.Tensor]:
        """The loss, and the mean cosine to the teacher over masked patches."""
        features = self.features(prediction)
        cosine = F.cosine_similarity(prediction.tokens.float(), features.float(), dim=-1)
        return {
            "loss": self._regression(prediction, features),
            "cosine": prediction.of_patches(cosine).gather(1, prediction.mask.decoded_at).mean(),
        }

    def picture(self, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of the patches, the teacher's and the student's."""
        features = prediction.of_patches(self.features(prediction))
        return features.float(), prediction.patches.float()
