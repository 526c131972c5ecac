"""MILAN's objective: the teacher's features of all tokens, by direction (MILAN, section 3.1)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from milan.config import PretrainConfig
from milan.core.config_fields import names_in
from milan.errors import ConfigError
from milan.models.masking import Mask
from milan.models.student import Student, add_deep_decoders
from milan.objectives.base import Objective, Prediction
from milan.objectives.normalisation import MEASURED
from milan.objectives.targets import DISTANCES, Coded, TeacherTargets, cosine_distance
from milan.store.cache import TargetCache
from milan.store.statistics import statistics_of


def feature_regression(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean over B views and all T tokens of 2 - 2 cos (MILAN eq. 1, and its models_milan.py).

    `prediction`, `features` [B, T, C], any float dtype; computed in float32. Only directions
    matter; visible, masked and class tokens count alike. Scalar in [0, 4].
    """
    return cosine_distance(prediction, features).mean()


def image_regression(prediction: Prediction, features: torch.Tensor) -> torch.Tensor:
    """`feature_regression` of each image, [B], for features [B, T, C] of the predicted tokens."""
    return image_loss(prediction, cosine_distance(prediction.tokens, features))


def image_loss(
    prediction: Prediction,
    distance: torch.Tensor,
    *,
    predict: str = "all",
    class_weight: float | None = None,
) -> torch.Tensor:
    """The loss of each image, [B], of the `distance` [B, T] of its predicted tokens.

    `predict` names the tokens that count (PretrainConfig.predict), and `class_weight` is the class
    token's beside 1 for the patches; None: as any token's with `all`, else 0.

    Where D of M masked patches are decoded, each counts M / D times: the mean over draws is what
    the same predictions of all tokens have.
    """
    mask = prediction.mask
    visible, decoded = mask.split(distance)
    if predict == "all":
        counted = distance if class_weight is None else prediction.of_patches(distance)
        if mask.chosen is None:
            loss = counted.mean(dim=1)
        else:
            left_out = mask.masked.shape[1] - mask.chosen.shape[1]
            total = counted.sum(dim=1) + left_out * decoded.mean(dim=1)
            loss = total / (counted.shape[1] + left_out)
    else:
        kinds = {"masked": [decoded], "visible": [visible]}.get(predict, [decoded, visible])
        loss = torch.stack([kind.mean(dim=1) for kind in kinds]).mean(dim=0)
    return loss + class_weight * distance[:, 0] if class_weight else loss


def supervised_blocks(config: PretrainConfig) -> list[int]:
    """The encoder's blocks that `deep_supervision` names, counted from 1, ascending.

    Raises ConfigError for what is no block.
    """
    if config.deep_supervision is None:
        return []
    words = names_in(config.deep_supervision)
    blocks = sorted({int(word) for word in words if word.isdecimal()})
    if len(blocks) != len(words) or blocks[0] < 1:
        raise ConfigError(
            f"deep_supervision {config.deep_supervision!r}",
            expected="different numbers of blocks, the first is 1",
            fix="--deep-supervision 6,8,10, as DeepMIM has for ViT-B",
        )
    return blocks


class FeatureRegression(Objective):
    """Predict the teacher's features of the class token and of all patches, masked or not."""

    decoder = "prompt"
    masking = "semantic"
    needs_features = True
    settings: ClassVar[tuple[str, ...]] = (
        "loss",
        "target_norm",
        "predict",
        "class_weight",
        "deep_supervision",
    )

    def __init__(self, cache: TargetCache, **settings: Any) -> None:
        super().__init__(cache, **settings)
        config = self.config
        auto = "layernorm" if config.loss == "smooth-l1" else "none"
        self.targets = TeacherTargets(cache, config.target_norm or auto)
        self.blocks = supervised_blocks(config)
        if not learns_class_token(config):
            self.pooling = "mean"

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """That blocks are numbers, and that nothing is asked of patches that are not decoded."""
        super().check(config)
        supervised_blocks(config)
        if config.predict == "visible" and config.decode_fraction != 1:
            raise ConfigError(
                f"decode_fraction {config.decode_fraction:g} with predict visible",
                expected="no masked patch to be decoded: visible ones alone are learnt from",
                fix="without decode_fraction, or --predict both",
            )

    @property
    def decoded_share(self) -> float:
        """None of the masked patches where visible ones alone are learnt from."""
        return 0.0 if self.config.predict == "visible" else self.config.decode_fraction

    def target_width(self, encoder: Any) -> int:
        """The teacher's channels."""
        return self.targets.channels

    def complete(self, student: Student) -> Student:
        """With a decoder for each block of `deep_supervision`; what visible patches alone do not
        need does not learn. Raises ConfigError for a student that has no such token or block."""
        config, encoder = self.config, student.encoder
        if config.class_weight is not None and not encoder.has_class_token:
            raise ConfigError(
                f"class_weight {config.class_weight:g} with {config.model} without class token",
                expected="a student with a class token",
                fix="without class_weight",
            )
        depth = len(encoder.blocks)
        if self.blocks and self.blocks[-1] >= depth:
            raise ConfigError(
                f"deep_supervision {self.blocks[-1]} with a student of {depth} blocks",
                expected="blocks before the last, which the decoder itself supervises",
                fix=f"--deep-supervision {max(1, depth // 2)}, or without it",
            )
        add_deep_decoders(student, self.blocks)
        if config.predict == "visible" and student.decoder.kind == "prompt":
            for decoder in (student.decoder, *student.deep_decoders.values()):
                decoder.blocks.requires_grad_(False)
        return student

    def to(self, device: torch.device) -> None:
        """The teacher's tables."""
        self.targets.to(device)

    def notes(self) -> list[str]:
        """How targets are normalised, if they are."""
        norm = self.targets.norm
        if norm not in MEASURED:
            return [] if norm == "none" else [f"targets: {norm}, each token by itself"]
        statistics = statistics_of(self.cache)
        views = int(statistics.views[0])
        return [f"targets: {norm}, by statistics of {views:,} views, {statistics.digest[:12]}"]

    @property
    def normalised_by(self) -> list[TargetCache]:
        return [self.cache] if self.targets.norm in MEASURED else []

    def features(self, prediction: Prediction) -> torch.Tensor:
        """What is to be predicted: the teacher's features, perhaps normalised, [B, T, C]."""
        coded, tokens = Coded.of(prediction.batch), prediction.tokens.shape[1]
        return self.targets.features(coded, prediction.mask, tokens)

    def _as_given(self, prediction: Prediction, features: torch.Tensor) -> torch.Tensor:
        """The same `features` as the teacher gave them."""
        if self.targets.norm == "none":
            return features
        coded, tokens = Coded.of(prediction.batch), prediction.tokens.shape[1]
        return self.targets.features(coded, prediction.mask, tokens, normalised=False)

    # --- the loss ---------------------------------------------------------------------------------

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """The mean of `image_losses`; as published, `feature_regression`."""
        return self._loss(prediction, self.features(prediction))

    def image_losses(self, prediction: Prediction) -> torch.Tensor:
        """The loss of each image, [B]: that of the decoder and of each deep one (DeepMIM)."""
        return self._image_losses(prediction, self.features(prediction))

    def _loss(self, prediction: Prediction, features: torch.Tensor) -> torch.Tensor:
        config = self.config
        plain = config.predict == "all" and config.class_weight is None and not prediction.deep
        if plain and config.loss == "cosine" and prediction.mask.chosen is None:
            return feature_regression(prediction.tokens, features)
        return self._image_losses(prediction, features).mean()

    def _image_losses(self, prediction: Prediction, features: torch.Tensor) -> torch.Tensor:
        config, apart = self.config, DISTANCES[self.config.loss]
        losses = [
            image_loss(
                prediction, apart(tokens, features), predict=config.predict,
                class_weight=config.class_weight,
            )
            for tokens in (prediction.tokens, *prediction.deep)
        ]  # fmt: skip
        return torch.stack(losses).sum(dim=0)

    def metrics(self, prediction: Prediction) -> dict[str, torch.Tensor]:
        """The loss, and the mean cosine to the teacher over masked patches.

        Over visible ones where those alone are learnt from. `class_cosine`, where the class token
        has a weight; `cosine_block_N` of deep decoders. Of relations the loss alone: predictions
        may be turned against the features.
        """
        target, mask = self.features(prediction), prediction.mask
        if self.config.loss == "relation":
            return {"loss": self._loss(prediction, target)}
        features = self._as_given(prediction, target)
        kind = 0 if self.config.predict == "visible" else 1

        def cosine(tokens: torch.Tensor) -> torch.Tensor:
            restored = self.targets.restored(tokens)
            return F.cosine_similarity(restored.float(), features.float(), dim=-1)

        def of_patches(tokens: torch.Tensor) -> torch.Tensor:
            return mask.split(cosine(tokens))[kind].mean()

        metrics = {
            "loss": self._loss(prediction, target),
            "cosine": of_patches(prediction.tokens),
        }
        if self.config.class_weight:
            metrics["class_cosine"] = cosine(prediction.tokens)[:, 0].mean()
        for block, tokens in zip(self.blocks, prediction.deep, strict=True):
            metrics[f"cosine_block_{block}"] = of_patches(tokens)
        return metrics

    def picture(self, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of the patches, the teacher's and the student's.

        Those that the student does not learn to predict are not a number.
        """
        mask, count = prediction.mask, prediction.batch.noise.shape[1]
        predicted = self.targets.restored(prediction.of_patches(prediction.tokens).float())
        whole, coded = mask._replace(chosen=None), Coded.of(prediction.batch)
        features = self.targets.features(coded, whole, count, normalised=False)
        return whole.in_raster(features.float()), _in_place(predicted, mask, self.config.predict)


def _in_place(patches: torch.Tensor, mask: Mask, predict: str) -> torch.Tensor:
    """Predicted patches [B, V + D, C], in the decoder's order, on the whole grid, [B, N, C].

    Those that are not decoded, or not learnt (`predict`), are not a number.
    """
    at = mask.order
    if predict == "masked":
        (_, patches), at = mask.split(patches), mask.decoded
    count = mask.visible.shape[1] + mask.masked.shape[1]
    blank = patches.new_full((len(patches), count, patches.shape[2]), float("nan"))
    return blank.scatter(1, at[..., None].expand_as(patches), patches)


def learns_class_token(config: PretrainConfig) -> bool:
    """Whether the class token is in the loss."""
    weight = config.class_weight
    return config.predict == "all" if weight is None else weight > 0
