"""The teacher as segmentation sees it: its patches as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from milan.core.atomic import digest_of
from milan.errors import ConfigError
from milan.evaluation.config import SegmentConfig
from milan.models.foreign import Weights
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec


class DenseTeacher(nn.Module):
    """The teacher's patches as a map, for protocols that look at blocks of a ViT of timm."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.visual, self._tower = teacher.visual, teacher.tower
        self.num_features, self.blocks = teacher.channels, (teacher.visual,)

    def forward_intermediates(self, images: torch.Tensor, **_: Any) -> list[torch.Tensor]:
        """Normalised images [B, 3, S, S] to one map [B, C, S / patch, S / patch]."""
        patches = self._tower.tokens(images)[:, 1:]
        grid = round(patches.shape[1] ** 0.5)
        return [patches.transpose(1, 2).reshape(len(images), -1, grid, grid)]


def dense_teacher(config: SegmentConfig) -> tuple[DenseTeacher, Weights]:
    """The teacher that `config` names, on the CPU, and what it is; for squares of its size or
    `config.size`. Raises TeacherError as load_teacher does, ConfigError for other windows."""
    if config.width not in (None, config.size):
        raise ConfigError(
            f"windows of {config.width} x {config.size} pixels for the teacher",
            expected="squares, whose features it gives",
            fix="without --width",
        )
    spec = TeacherSpec(
        config.teacher or DEFAULT_TEACHER, config.pretrained, config.teacher_norm,
        img_size=config.size, precision="fp32",
    )  # fmt: skip
    teacher = load_teacher(spec, device="cpu")
    norm, name = teacher.identity["normalisation"], f"teacher {teacher.about['name']}"
    args = {"identity": digest_of(teacher.identity)}
    weights = Weights({}, name, teacher.size, args, mean=norm["mean"], std=norm["std"])
    return DenseTeacher(teacher), weights
