"""RILS's losses: images against sentences, and patches as distributions over sentences.

RILS (arXiv 2301.06958, section 3; hustvl/RILS, losses.py). b images of this rank, M masked patches
of each, K sentences: all captions of the step, of every rank, which are the prototypes. D joint
width. Features come as they are; they are normalised and compared in float32 (float64 stays), also
under autocast: logits reach 25, where bfloat16 is wrong by 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from milan.core.distributed import SINGLE, Ranks
from milan.errors import ConfigError
from milan.models.rils import JointOutput
from milan.objectives.base import JointLoss

TEACHER_TAU = 0.04
"""Temperature of the target's distributions (RILS, losses.py: tea_tau)."""
STUDENT_TAU = 0.1
"""Temperature of the predicted ones (stu_tau)."""
WEIGHT = 0.5
"""Of the reconstruction in the loss."""
AT_ONCE = 32 * 2**20
"""Bytes of one table of logits: so many patches are compared with all sentences at once."""
GATHERS = ("detached", "full")
NORMALISERS = ("global", "local")
_LEAST_NORM = 1e-6
_NO_PATCH = 1e-6  # added to the number of patches, as published


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features [..., D] of length 1, float32 or float64; a vector of zeros stays zero."""
    wide = features.float() if features.dtype.itemsize < 4 else features
    return F.normalize(wide, dim=-1, eps=_LEAST_NORM)


class Contrast(NamedTuple):
    """What the contrastive loss found."""

    loss: torch.Tensor
    """Scalar: mean over the rank's images."""
    retrieved: torch.Tensor
    """[b] int64: the sentence nearest to each image, the first of equals."""


def contrastive(
    images: torch.Tensor,
    texts: torch.Tensor,
    all_images: torch.Tensor,
    all_texts: torch.Tensor,
    scale: torch.Tensor,
    *,
    first: int = 0,
) -> Contrast:
    """Symmetric InfoNCE of this rank's images and texts [b, D] against all [K, D], unit vectors.

    The rank's own begin at `first` of all. CLIP's loss (arXiv 2103.00020, figure 3).
    """
    own = first + torch.arange(len(images), device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        of_images = (scale * images) @ all_texts.T
        of_texts = (scale * texts) @ all_images.T
        loss = (F.cross_entropy(of_images, own) + F.cross_entropy(of_texts, own)) / 2
    return Contrast(loss, of_images.argmax(dim=1))


class Divergence(NamedTuple):
    """How far predicted distributions are from the target's, for each patch."""

    kl: torch.Tensor
    """KL(target || predicted), nats."""
    entropy: torch.Tensor
    """Of the target, nats; without gradient."""


def sentence_divergence(
    predicted: torch.Tensor,
    target: torch.Tensor,
    sentences: torch.Tensor,
    *,
    teacher_tau: float = TEACHER_TAU,
    student_tau: float = STUDENT_TAU,
    at_once: int = AT_ONCE,
) -> Divergence:
    """KL between what target and prediction say of sentences: [...] for patches [..., D].

    `sentences` [K, D] unit vectors. The target gets no gradient, sentences get that of the
    predicted side. No more than `at_once` bytes of logits, and some tables of that size beside
    them, are in memory: tables are computed again on the way back.
    """
    shape, width = predicted.shape[:-1], predicted.shape[-1]
    q = unit(predicted).reshape(-1, width)
    with torch.no_grad():
        u = unit(target).reshape(-1, width)
    parts = []
    with torch.autocast(q.device.type, enabled=False):
        # Scaled before the product: no logit is ever large without its temperature.
        scaled, asked = sentences / student_tau, sentences.detach() / teacher_tau
        rows = max(1, at_once // (len(sentences) * q.dtype.itemsize))
        for some, wanted in zip(q.split(rows), u.split(rows), strict=True):
            if torch.is_grad_enabled():
                parts.append(
                    checkpoint(_divergence, some, wanted, scaled, asked, use_reentrant=False)
                )
            else:
                parts.append(_divergence(some, wanted, scaled, asked))
    kl, entropy = (torch.cat(values).reshape(shape) for values in zip(*parts, strict=True))
    return Divergence(kl, entropy)


def _divergence(
    q: torch.Tensor, u: torch.Tensor, scaled: torch.Tensor, asked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL, entropy of the target), each [R], of rows [R, D]."""
    with torch.no_grad():
        log_target = F.log_softmax(u @ asked.T, dim=-1)
        share = log_target.exp()
        entropy = -(share * log_target).sum(dim=-1)
    log_predicted = F.log_softmax(q @ scaled.T, dim=-1)
    # One product with the shares: the cross entropy; the target's own entropy is constant.
    return -(share * log_predicted).sum(dim=-1) - entropy, entropy


@dataclass(frozen=True)
class SentenceLoss:
    """RILS's loss: contrastive, and `weight` times the reconstruction of accepted images.

    An image is accepted if the sentence nearest to it is its own caption, or an equal one.
    """

    weight: float = WEIGHT
    teacher_tau: float = TEACHER_TAU
    student_tau: float = STUDENT_TAU
    gather: str = "detached"
    """detached: gradients reach an image or a sentence only where it asks, not where it is compared
    with (as published on several devices). full: everywhere."""
    normaliser: str = "global"
    """Accepted patches are averaged over all ranks (global), or on each (local, as published)."""
    at_once: int = AT_ONCE

    def __post_init__(self) -> None:
        for name, allowed in (("gather", GATHERS), ("normaliser", NORMALISERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r}", expected=" or ".join(allowed))

    def __call__(self, output: JointOutput, ranks: Ranks = SINGLE) -> JointLoss:
        """Of all images of this rank in a step; all ranks call it together.

        Parts: `clip`; `recon`, the mean KL before its weight; `accuracy`, the share of images whose
        own caption is retrieved; `accepted`, the same with equal captions; `prototypes`, the mean
        of exp(entropy) of the target; `duplicates`, the share of sentences that are in the batch
        already. Of a single sentence all are 0 but `accuracy`, `accepted` and `prototypes`. Without
        predicted patches (plain CLIP) there is neither `recon` nor `prototypes`.
        """
        images, texts = unit(output.images), unit(output.texts)
        grows = self.gather == "full"
        all_images = ranks.gather_rows(images, gradient=grows)
        all_texts = ranks.gather_rows(texts, gradient=grows)
        numbers = ranks.gather_rows(output.captions, gradient=False)
        first = ranks.rank * len(images)
        contrast = contrastive(images, texts, all_images, all_texts, output.scale, first=first)
        accepted = numbers[contrast.retrieved] == output.captions
        own = first + torch.arange(len(images), device=images.device)
        ordered, kind = numbers.sort().values, images.dtype
        parts = {
            "clip": contrast.loss,
            "accuracy": (contrast.retrieved == own).to(kind).mean(),
            "accepted": accepted.to(kind).mean(),
            "duplicates": (ordered[1:] == ordered[:-1]).to(kind).sum() / len(ordered),
        }
        loss = contrast.loss
        if output.predicted.shape[1]:
            parts |= self._reconstruction(output, accepted, all_texts, ranks)
            loss = loss + self.weight * parts["recon"]
        return JointLoss(loss, {name: value.detach() for name, value in parts.items()})

    def _reconstruction(
        self, output: JointOutput, accepted: torch.Tensor, sentences: torch.Tensor, ranks: Ranks
    ) -> dict[str, torch.Tensor]:
        """`recon` and `prototypes` of the patches of `accepted` images [b]."""
        kl, entropy = sentence_divergence(
            output.predicted,
            output.target,
            sentences,
            teacher_tau=self.teacher_tau,
            student_tau=self.student_tau,
            at_once=self.at_once,
        )
        patches, share = accepted.sum(dtype=kl.dtype) * kl.shape[1], 1
        if self.normaliser == "global":  # this rank's part, of which the ranks' mean is taken
            patches, share = ranks.sum_of(patches), ranks.size
        recon = share * (kl * accepted[:, None]).sum() / (patches + _NO_PATCH)
        return {"recon": recon, "prototypes": entropy.exp().mean()}
