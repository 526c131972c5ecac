"""The teacher as an evaluation sees it."""

from __future__ import annotations

import torch

from milan.evaluation.config import EvaluationConfig
from milan.evaluation.frozen import FEATURES, Frozen
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec


def frozen_teacher(config: EvaluationConfig, device: torch.device) -> Frozen:
    """The teacher that `config` names; features are those of `config.feature_set`.

    Of its blocks it gives the last alone, so `blocks` is what `pooled` is: class feature and mean
    of patch features, [B, 2C]. Raises TeacherError as load_teacher does.
    """
    spec = TeacherSpec(config.teacher or DEFAULT_TEACHER, config.pretrained, config.teacher_norm)
    return frozen_view(load_teacher(spec, device=str(device)), config.feature_set)


def frozen_view(teacher: Teacher, feature_set: str = "pooled") -> Frozen:
    """A loaded teacher as an evaluation sees it."""
    pooled = feature_set != "patches"

    def tokens(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every, _ = teacher.targets(pixels)
        return every[:, 0], every[:, 1:]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        first, patches = tokens(pixels)
        return torch.cat([first, patches.mean(dim=1)], dim=1) if pooled else patches.half()

    name = f"teacher {teacher.about['name']}"
    identity = {
        "teacher": teacher.identity, "features": FEATURES["pooled" if pooled else "patches"]
    }  # fmt: skip
    parts = ("class token", "mean of patches") if pooled else ("patches",)
    return Frozen(features, teacher.size, name, identity, tokens, parts)
