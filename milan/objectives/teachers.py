"""Several teachers at once: an objective of features for each, whose losses are weighed.

As AM-RADIO (arXiv 2312.06709): a head a teacher, and every loss in every step; there the teachers
run, here their targets are layers of stores. Dropping teachers is UNIC's (arXiv 2408.05088; its
teacher_dropping.py), except that an image's kept losses are averaged: the loss of an image does not
depend on others in its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from milan.config import PretrainConfig
from milan.core.config_fields import names_in
from milan.data.loader import Batch
from milan.errors import ConfigError
from milan.models.masking import Mask
from milan.models.student import Student
from milan.objectives.base import JointObjective, Objective, Prediction
from milan.objectives.features import FeatureRegression
from milan.store.cache import TargetCache
from milan.store.joined import short_names


class SeveralTeachers(Objective):
    """What `kind` says of each layer of a JoinedCache: a weighted mean of its losses.

    The student predicts the channels of all teachers side by side, in the order of the layers.
    """

    needs_features = True

    def __init__(self, kind: type[Objective], cache: TargetCache, **settings: Any) -> None:
        """Raises ConfigError for an objective that is not of features, and for weights that are
        not one for each layer."""
        super().__init__(cache, **settings)
        if not issubclass(kind, FeatureRegression) or issubclass(kind, JointObjective):
            raise ConfigError(
                f"{len(cache.parts)} layers with objective {self.config.objective}",
                expected="one layer: only the features of several teachers are learnt at once",
                fix=f"--layer {cache.layer}, or --objective milan",
            )
        self.dropping = self.config.teacher_dropping
        if self.dropping and kind.loss is not FeatureRegression.loss:
            raise ConfigError(
                f"teacher_dropping {self.dropping:g} with objective {self.config.objective}",
                expected="an objective with the loss of milan, which is known for each image",
                fix="without teacher_dropping",
            )
        self.each = [kind(part, **settings) for part in cache.parts]
        self.pooling = self.each[0].pooling
        self.names = short_names(cache)
        self.weights = layer_weights(self.config, len(self.each))

    def target_width(self, encoder: Any) -> Sequence[int]:  # type: ignore[override]
        """C of each teacher."""
        return [one.target_width(encoder) for one in self.each]

    def complete(self, student: Student) -> Student:
        """What each needs, which is the same."""
        return self.each[0].complete(student)

    @property
    def normalised_by(self) -> list[TargetCache]:
        """Those of each teacher."""
        return [cache for one in self.each for cache in one.normalised_by]

    def to(self, device: torch.device) -> None:
        """The tables of each teacher."""
        for one in self.each:
            one.to(device)

    def notes(self) -> list[str]:
        """Those of each teacher, and how their losses are weighed."""
        weighed = ", ".join(
            f"{name} {weight:g}" for name, weight in zip(self.names, self.weights, strict=True)
        )
        dropped = (
            "" if not self.dropping else f"; each but the worst is dropped in {self.dropping:.0%}"
        )
        own = [
            f"{name}: {note}"
            for name, one in zip(self.names, self.each, strict=True)
            for note in one.notes()
        ]
        return [f"losses: {weighed}{dropped}", *own]

    def after_step(self, student: nn.Module) -> None:
        """That of each, which is the same."""
        self.each[0].after_step(student)

    def leave(self, run: Path, student: nn.Module) -> None:
        """That of each, which is the same."""
        self.each[0].leave(run, student)

    def mask(self, batch: Batch) -> Mask:
        """By the attention that the batch brings, of one of the layers."""
        return self.each[0].mask(batch)

    def predict(self, network: nn.Module, batch: Batch) -> Prediction:
        """Of all teachers, side by side."""
        return self.each[0].predict(network, batch)

    def shares(self, prediction: Prediction) -> list[Prediction]:
        """The prediction of each teacher, as if it were the only one."""
        batch, widths = prediction.batch, [part.spec.channels for part in self.cache.parts]
        assert batch.codes is not None
        coded = [(batch.codes, batch.scale), *batch.others]
        predicted = [part.split(widths, dim=-1) for part in (prediction.tokens, *prediction.deep)]
        return [
            prediction._replace(
                tokens=own, deep=tuple(deep),
                batch=batch._replace(codes=codes, scale=scale, others=(), drops=None),
            )
            for own, *deep, (codes, scale) in zip(*predicted, coded, strict=True)
        ]  # fmt: skip

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """The weighted mean over the teachers; with dropping over those that an image keeps."""
        pairs = list(zip(self.each, self.shares(prediction), strict=True))
        if not self.dropping:
            return self._mean([one.loss(share) for one, share in pairs])
        losses = torch.stack([one.image_losses(share) for one, share in pairs], dim=1)
        drops = prediction.batch.drops
        assert drops is not None
        kept = kept_teachers(losses, drops, self.dropping)
        # Column by column: a tensor of the weights would wait for the device.
        columns = zip(kept.unbind(dim=1), self.weights, strict=True)
        weights = torch.stack([column * weight for column, weight in columns], dim=1)
        return ((losses * weights).sum(dim=1) / weights.sum(dim=1)).mean()

    def metrics(self, prediction: Prediction) -> dict[str, torch.Tensor]:
        """The weighted mean of each metric over all teachers, none dropped, and that of each."""
        by_teacher = [
            one.metrics(share)
            for one, share in zip(self.each, self.shares(prediction), strict=True)
        ]
        means = {name: self._mean([of[name] for of in by_teacher]) for name in by_teacher[0]}
        return means | {
            f"{name}_{teacher}": value
            for teacher, of in zip(self.names, by_teacher, strict=True)
            for name, value in of.items()
        }

    def picture(self, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of the patches, of all teachers side by side: theirs and the student's."""
        pairs = [
            one.picture(share)
            for one, share in zip(self.each, self.shares(prediction), strict=True)
        ]
        target, predicted = (torch.cat(parts, dim=-1) for parts in zip(*pairs, strict=True))
        return target, predicted

    def _mean(self, values: list[torch.Tensor]) -> torch.Tensor:
        total = sum(self.weights)
        weighed = [value * (w / total) for value, w in zip(values, self.weights, strict=True)]
        return torch.stack(weighed).sum(dim=0)


def kept_teachers(losses: torch.Tensor, drops: torch.Tensor, probability: float) -> torch.Tensor:
    """Which teachers an image learns from, [B, teachers] float32 of 0 and 1, for its `losses`.

    The one with the greatest loss always; each other one is dropped where its uniform draw of
    `drops` is below `probability`.
    """
    worst = F.one_hot(losses.detach().argmax(dim=1), losses.shape[1]).bool()
    return (worst | (drops >= probability)).float()


def layer_weights(config: PretrainConfig, count: int) -> list[float]:
    """The weight of each of `count` layers. Raises ConfigError unless there is one, above 0."""
    if config.layer_weights is None:
        return [1.0] * count
    words = names_in(config.layer_weights)
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = []
    if len(weights) != count or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(
            f"layer_weights {config.layer_weights}",
            expected=f"a number above 0 for each of the {count} layers",
            fix="--set layer_weights=" + ",".join(["1"] * count),
        )
    return weights


def check_one_teacher(config: PretrainConfig) -> None:
    """Raises ConfigError for a setting that says how several teachers are weighed."""
    for name, value in (
        ("layer_weights", config.layer_weights), ("teacher_dropping", config.teacher_dropping)
    ):  # fmt: skip
        if value:
            raise ConfigError(
                f"{name} {value} with one layer",
                expected="several teachers",
                fix=f"--layer A --layer B, or without {name}",
            )
