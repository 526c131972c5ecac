"""The teacher as an evaluation sees it."""

from __future__ import annotations

import torch

from milan.evaluation.frozen import Frozen
from milan.evaluation.protocols import EvaluationConfig
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec


def frozen_teacher(config: EvaluationConfig, device: torch.device) -> Frozen:
    """The teacher that `config` names: class feature and mean of patch features, [B, 2C].

    Raises TeacherError as load_teacher does.
    """
    spec = TeacherSpec(config.teacher or DEFAULT_TEACHER, config.pretrained, config.teacher_norm)
    teacher = load_teacher(spec, device=str(device))

    def features(pixels: torch.Tensor) -> torch.Tensor:
        tokens, _ = teacher.targets(pixels)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    identity = {"teacher": teacher.identity, "features": "class token and mean of patches"}
    return Frozen(features, teacher.size, f"teacher {teacher.about['name']}", identity)
