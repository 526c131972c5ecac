"""The teacher as a linear probe sees it."""

from __future__ import annotations

import torch

from milan.evaluation.linear_probe import Frozen
from pipeline.teachers.load import DEFAULT_TEACHER, TeacherSpec, load_teacher


def frozen_teacher(
    name: str | None, pretrained: str | None, norm: str | None, device: str
) -> Frozen:
    """The teacher as a linear probe sees it: class feature and mean of patch features, [B, 2C]."""
    teacher = load_teacher(TeacherSpec(name or DEFAULT_TEACHER, pretrained, norm), device=device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        tokens, _ = teacher.targets(pixels)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    return Frozen(features, teacher.size, f"teacher {teacher.about['name']}")
