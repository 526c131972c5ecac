"""The teacher as an evaluation sees it."""

from __future__ import annotations

import torch

from milan.evaluation.config import EvaluationConfig
from milan.evaluation.frozen import (
    FEATURES,
    MEAN_OF_PATCHES,
    TOKEN,
    TOKENS,
    Frozen,
    tokens_side_by_side,
)
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec


def frozen_teacher(config: EvaluationConfig, device: torch.device) -> Frozen:
    """The teacher that `config` names; features are those of `config.feature_set`.

    Of its blocks it gives the last alone, so `blocks` is what `pooled` is: class feature and mean
    of patch features, [B, 2C]. Raises TeacherError as load_teacher does.
    """
    spec = TeacherSpec(config.teacher or DEFAULT_TEACHER, config.pretrained, config.teacher_norm)
    teacher = load_teacher(spec, device=str(device))
    return frozen_view(teacher, config.feature_set, mean_alone=config.pooling == "mean")


def frozen_view(
    teacher: Teacher, feature_set: str = "pooled", *, mean_alone: bool = False
) -> Frozen:
    """A loaded teacher as an evaluation sees it."""
    kind = feature_set if feature_set in TOKENS else "pooled"

    def tokens(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every, _ = teacher.targets(pixels)
        return every[:, 0], every[:, 1:]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        first, patches = tokens(pixels)
        if kind in TOKENS:
            return tokens_side_by_side(None if mean_alone else first, patches, kind)
        mean = patches.mean(dim=1)
        return mean if mean_alone else torch.cat([first, mean], dim=1)

    name = f"teacher {teacher.about['name']}"
    parts: tuple[str, ...] = (kind,) if kind in TOKENS else (TOKEN, MEAN_OF_PATCHES)
    what = FEATURES[kind]
    if kind == "pooled" and mean_alone:
        parts, what = (MEAN_OF_PATCHES,), f"{MEAN_OF_PATCHES} alone"
    identity = {"teacher": teacher.identity, "features": what}
    return Frozen(features, teacher.size, name, identity, tokens, parts)
