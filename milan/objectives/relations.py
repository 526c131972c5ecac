"""How the tokens of an image are related, in place of what each one is (TinyMIM, arXiv 2301.01296).

TinyMIM distils softmax(Q K^T / sqrt(d)) and softmax(V V^T / sqrt(d)) of a teacher's block, for each
head, into the same of a student's block that sees all patches. A store has no queries, keys and
values, but features. So here a relation is softmax(f f^T / tau) of unit features, one for an image;
of the last block or of an inner one (`--teacher-layer`). It is compared with that of what a masked
student predicts. tau stands in the place of sqrt(d), which is for vectors that are not of length 1.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as F

TAU: Final = 0.1


def relation_distance(prediction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """How another relation to all T predicted tokens each token has, [B, T] float32, at least 0.

    KL(teacher || student) of its row, for [B, T, C] of any float dtype. Turning all predictions
    of an image together changes nothing.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        said, true = (_relations(tokens) for tokens in (prediction, features))
    return F.kl_div(said, true, reduction="none", log_target=True).sum(dim=-1)


def _relations(tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(f f^T / tau) over the last dimension, [B, T, T] for [B, T, C]."""
    unit = F.normalize(tokens.float(), dim=-1)
    return (unit @ unit.transpose(1, 2) / TAU).log_softmax(dim=-1)
