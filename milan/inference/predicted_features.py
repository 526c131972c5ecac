"""The teacher's features as a student predicts them, of whole images.

Training shows a student a quarter of the patches. Of a whole image there are two ways: all patches
are visible at once, or as few as in training, in turns.

B images, N patches = V visible + M masked, C width of the targets.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from milan.core import rng
from milan.models.masking import Mask
from milan.models.student import Student


def all_visible(patches: int) -> list[Mask]:
    """One mask [1, N], [1, 0] that masks nothing: the decoder has nothing to fill in."""
    return [Mask(torch.arange(patches)[None], torch.empty(1, 0, dtype=torch.int64))]


def in_turns(patches: int, visible: int, seed: int = 0) -> list[Mask]:
    """Masks [1, V], [1, M] of which each patch is visible in one or more, and masked in others."""
    order = torch.from_numpy(rng.permutation(seed, rng.SAMPLE, (3,), patches))
    turned = [order.roll(-first) for first in range(0, patches, visible)]
    return [
        Mask(turn[None, :visible].sort(1).values, turn[None, visible:].sort(1).values)
        for turn in turned
    ]


def predicted_features(
    student: Student, images: torch.Tensor, masks: list[Mask]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Class token [B, C], None without one, and patches [B, N, C] of images [B, 3, S, S].

    Means of unit vectors over the masks; of several masks, those that masked a patch count for it.
    """
    patches, total, counts = student.patches, images.new_zeros(()), images.new_zeros(())
    for mask in masks:
        every = Mask(*(part.to(images.device).expand(len(images), -1) for part in mask))
        found = F.normalize(student(images, every).float(), dim=-1)
        count = torch.ones(1, found.shape[1], 1, device=images.device)
        if len(masks) > 1:
            count[:, -patches:, 0] = mask.boolean().float()
        total, counts = total + found * count, counts + count
    mean = total / counts
    return mean[:, 0] if student.decoder.class_token else None, mean[:, -patches:]
