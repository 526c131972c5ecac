"""The teacher as segmentation sees it: its patches as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from milan.core.atomic import digest_of
from milan.core.size import as_size
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
        """Normalised images [B, 3, H, W] to one map [B, C, H / patch, W / patch]."""
        patches = self._tower.tokens(images)[:, 1:]
        return [patches.transpose(1, 2).unflatten(2, self._tower.grid)]


def dense_teacher(config: SegmentConfig) -> tuple[DenseTeacher, Weights]:
    """The teacher that `config` names, on the CPU, and what it is; for windows of its size, or of
    `config.size` and `config.width`. Raises TeacherError as load_teacher does."""
    window = None if config.size is None else as_size((config.size, config.width or config.size))
    spec = TeacherSpec(
        config.teacher or DEFAULT_TEACHER, config.pretrained, config.teacher_norm,
        img_size=window, precision="fp32",
    )  # fmt: skip
    teacher = load_teacher(spec, device="cpu")
    norm, name = teacher.identity["normalisation"], f"teacher {teacher.about['name']}"
    args = {"identity": digest_of(teacher.identity)}
    weights = Weights({}, name, teacher.size, args, mean=norm["mean"], std=norm["std"])
    return DenseTeacher(teacher), weights
