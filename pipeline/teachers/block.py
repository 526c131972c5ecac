"""Targets of an inner block of a teacher, in place of its output (`--teacher-layer`).

TinyMIM (arXiv 2301.01296) found that a block below the last one may teach a small student better.
"""

from __future__ import annotations

import torch
from torch import nn

from milan.errors import TeacherError
from pipeline.teachers.towers import Tower


class BlockTower(Tower):
    """A tower's tokens as they leave block `number`, counted from 1: before norm and projection.

    C is the tower's width. Row 0 is the class token there, or the mean of the patches if the
    tower's output is not its class token. The attention is the whole tower's.
    """

    def __init__(self, name: str, tower: Tower, number: int) -> None:
        blocks = tower.blocks
        if not 1 <= number <= len(blocks):
            raise TeacherError(
                f"--teacher-layer {number} of teacher {name}",
                expected=f"1 to {len(blocks)}, a block of its image tower",
                fix=f"--teacher-layer {max(1, len(blocks) * 3 // 4)}",
            )
        self.tower, self.number, self.count = tower, number, len(blocks)
        self.module, self.pooling, self.left_out = tower.module, tower.pooling, tower.left_out
        self.size, self.patch, self.channels = tower.size, tower.patch, tower.width
        self.blocks, self.width = blocks, tower.width
        self._output: torch.Tensor | None = None
        blocks[number - 1].register_forward_hook(self._keep)

    def identity(self) -> dict:
        """The tower's, and which block."""
        return self.tower.identity() | {"block": self.number}

    def about(self) -> dict:
        """The tower's, but for row 0."""
        row = "the class token" if self.pooling == "token" else "the mean of the patches"
        of = f"block {self.number} of {self.count}"
        return self.tower.about() | {"class_token": f"{row}, as {of} leaves it", "block": of}

    def notes(self) -> list[str]:
        """What the features are."""
        about = self.about()
        return [
            f"features of {about['block']}, before norm and projection; row 0 is "
            f"{about['class_token']}; attention {about['attention']}"
        ]

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] to [B, T, C]; the whole tower runs, for its attention."""
        self.tower.tokens(images)
        assert self._output is not None
        output, self._output = self._output, None
        patches = output[:, output.shape[1] - self.patches :]
        first = output[:, :1] if self.pooling == "token" else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    def attention(self) -> torch.Tensor:
        return self.tower.attention()

    def _keep(self, _: nn.Module, __: tuple, output: torch.Tensor) -> None:
        self._output = output
