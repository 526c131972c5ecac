"""A fine-tuned classifier on corrupted images: its scores are the features that are looked at."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from milan.core.device import normalise, pick_device
from milan.core.launch import as_rank
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.core.size import as_size
from milan.evaluation.config import ClassificationConfig, EvaluationConfig
from milan.evaluation.corruptions import Corruption, robustness
from milan.evaluation.features import Context, Labelled, features_of
from milan.evaluation.frozen import Frozen
from milan.evaluation.splits import open_splits
from milan.models.classifier import load_classifier
from milan.models.state_dict import weights_digest

_BATCH = 128  # images at once


def classifier_robustness(
    config: ClassificationConfig, metrics: dict[str, Any], stop: Stop, progress: Progress | None
) -> dict[str, Any]:
    """What corruptions leave of the accuracy of the classifier in `metrics["run"]`.

    `metrics` are those that its training returned. Runs on one device. Raises MilanError; Stopped.
    """
    run, device = Path(metrics["run"]), pick_device(config.device)
    with as_rank(None, device, stop=stop, progress=progress or NoProgress()) as (ranks, own):
        context = Context(own, ranks, progress or NoProgress(), stop)
        network = _scores(run, own)
        train, val = open_splits(config)
        numbers = np.unique(train.labels)  # as fine-tuning counts its classes
        shared = {field.name: getattr(config, field.name) for field in fields(ClassificationConfig)}
        settings = EvaluationConfig(**shared | {"batch_size": _BATCH})

        def accuracy(corruption: Corruption) -> float:
            scores = features_of(
                network, val.of, run / "frozen_features", settings, context, corruption=corruption
            )
            labelled = Labelled.of(scores, val)
            pieces = [x for x, _ in scores.pieces(range(len(scores))) if len(x)]
            best = torch.cat(pieces).argmax(dim=1).numpy()
            right = numbers[best[labelled.places]] == labelled.labels
            return 100 * float(right.mean())

        return robustness(accuracy, metrics["top1"])


def _scores(run: Path, device: torch.device) -> Frozen:
    """The classifier of a run, whose features are its logits [B, classes]."""
    vit = load_classifier(run).requires_grad_(False)
    about = timm.data.resolve_model_data_config(vit)
    size, mean, std = as_size(about["input_size"][1:]), list(about["mean"]), list(about["std"])
    identity = {
        "weights": weights_digest(vit), "mean": mean, "std": std, "size": size,
        "features": "scores of the classes",
    }  # fmt: skip
    vit = vit.to(device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return vit(normalise(pixels, mean, std)).float()

    return Frozen(features, size, str(run), identity)
