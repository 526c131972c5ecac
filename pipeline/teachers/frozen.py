"""The teacher as a frozen feature extractor, for a linear probe."""

from __future__ import annotations

import torch

from milan.evaluation.linear_probe import Frozen
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec


def frozen_teacher(
    name: str | None, pretrained: str | None, norm: str | None, device: str
) -> Frozen:
    """The teacher's class feature and the mean of its patch features, float32 [B, 2C].

    Raises TeacherError, see load_teacher.
    """
    teacher = load_teacher(TeacherSpec(name or DEFAULT_TEACHER, pretrained, norm), device=device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        tokens, _ = teacher.targets(pixels)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    return Frozen(features, teacher.size, f"teacher {teacher.about['name']}")
