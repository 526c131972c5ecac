"""RILS's reconstruction against a store's features and texts: an extension, not RILS itself.

The target is what a frozen teacher's patch says of sentences, not what the student's own encoder
does: nothing contrastive, no text tower, one pass. Known as frozen-teacher RILS (docs/rils.md).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from milan.config import PretrainConfig
from milan.core.device import kept_copy
from milan.data.loader import Batch
from milan.models.text_encoder import caption_numbers
from milan.objectives.arguments import check_arguments
from milan.objectives.base import JointLoss, JointObjective, Prediction
from milan.objectives.features import FeatureRegression, image_regression
from milan.objectives.sentences import sentence_divergence, unit
from milan.objectives.targets import Coded
from milan.store.similarity import Similarities, similarities, text_bank

STRETCH = 2.5
"""RILS's student temperature over its teacher's: 0.1 / 0.04."""
_NUMBERS = {"teacher_tau": 1e-4, "student_tau": 1e-4, "milan": 0.0, "draws": 0}
_WORDS = {
    "rows": ("masked", "all"), "gate": ("none", "class"), "sentences": ("captions", "classes"),
}  # fmt: skip
_UNIFORM, _ONE_HOT = 0.5, 1.5  # the share of all sentences, and their number, that is too much


class CachedOutput(NamedTuple):
    """What the student says of B images, and the store's targets."""

    predicted: torch.Tensor
    """[B, R, C]"""
    target: torch.Tensor
    """[B, R, C]"""
    whole: torch.Tensor
    """[B, C]: the teacher's class token, for the gate."""
    texts: torch.Tensor
    """[B, C]: the image's caption, of length 1; zeros without."""
    captions: torch.Tensor
    """[B] int64: its number (`caption_numbers`)."""
    milan: torch.Tensor
    """[B]: MILAN's loss of each image."""


class CachedSentences(JointObjective, FeatureRegression):
    """Predict what the teacher's features say of sentences, from the store alone."""

    masking = "random"
    needs_texts = True
    settings = ()

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Its arguments, and those of other objectives that it has not."""
        check_arguments(config, numbers=_NUMBERS, words=_WORDS)
        cls.check_own(config)

    @cached_property
    def _copies(self) -> dict[Any, torch.Tensor]:
        """The bank on devices."""
        return {}

    def _argument(self, name: str, default: Any) -> Any:
        return self.config.objective_args.get(name, default)

    # --- sentences and temperatures ---------------------------------------------------------------

    @property
    def by_class(self) -> bool:
        """Whether sentences are class prompts; by default where the store has no captions."""
        default = "captions" if len(self.cache.captioned) else "classes"
        return self._argument("sentences", default) == "classes"

    @cached_property
    def measured(self) -> Similarities:
        """Of the store, from which temperatures follow; the same whenever it is asked."""
        return similarities(self.cache)

    @cached_property
    def teacher_tau(self) -> float:
        """Temperature of the target."""
        return float(self._argument("teacher_tau", None) or self.measured.teacher_tau)

    @cached_property
    def student_tau(self) -> float:
        """Temperature of the prediction."""
        return float(self._argument("student_tau", STRETCH * self.teacher_tau))

    @cached_property
    def bank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [K, C], numbers [K]) of the sentences that every step has, the same on all
        ranks: class prompts, or seeded draws of the store's captions."""
        if self.by_class:
            features, ids = text_bank(self.cache, 0, seed=0, classes=True)
        else:
            draws = int(self._argument("draws", 4096))
            features, ids = text_bank(self.cache, draws, seed=self.config.seed)
        return torch.from_numpy(features), caption_numbers(torch.from_numpy(ids))

    @cached_property
    def _of_class(self) -> torch.Tensor:
        """[rows] int64: the number of the class prompt of each row; 0 without a class."""
        prototypes, labels = self.cache.prototypes, torch.from_numpy(self.cache.manifest.labels())
        assert prototypes is not None
        numbers = caption_numbers(torch.from_numpy(prototypes.ids[:, 0].copy()))
        return torch.where(labels >= 0, numbers[labels.clamp_min(0)], 0)

    def _on(self, device: torch.device, part: int) -> torch.Tensor:
        """A part of the bank, or the numbers of classes, on a device."""
        made = [lambda: self.bank[0], lambda: self.bank[1], lambda: self._of_class]
        return kept_copy(self._copies, (part, device), made[part], device)

    def notes(self) -> list[str]:
        """Temperatures, and a doubt where they give targets that teach little.

        Raises CacheError and DataError for a store without the sentences, before a run begins.
        """
        measured, (_, numbers) = self.measured, self.bank
        effective = measured.effective(self.teacher_tau)
        notes = [
            f"sentences: {len(numbers):,} in every step; cosines of patches {measured.mean:.3f} ± "
            f"{measured.spread:.3f} over {measured.texts:,} texts; at temperature "
            f"{self.teacher_tau:g} a target spreads over {effective:,.1f} of them"
        ]
        if effective > _UNIFORM * measured.texts:
            notes.append(
                "sentences: targets are nearly uniform and teach little; a smaller "
                f"--set objective.teacher_tau, such as {measured.teacher_tau:g}"
            )
        elif effective < _ONE_HOT:
            notes.append(
                "sentences: targets are nearly one-hot; a larger --set objective.teacher_tau, such "
                f"as {measured.teacher_tau:g}"
            )
        return notes

    # --- the loss ---------------------------------------------------------------------------------

    def predict(self, network: nn.Module, batch: Batch) -> Prediction:
        """The student's prediction, with the rows of the teacher's features that count."""
        images, mask = batch.images, self.mask(batch)
        plain = Prediction(network(images, mask), images, mask, batch)
        features = self.features(plain)
        assert batch.texts is not None
        assert batch.ids is not None
        own = caption_numbers(batch.ids)
        if self.by_class:
            own = self._on(own.device, 2)[batch.rows]
        predicted, target = plain.tokens, features
        if self._argument("rows", "masked") == "masked":
            predicted, target = (mask.split(tokens)[1] for tokens in (predicted, target))
        output = CachedOutput(
            predicted, target, self.targets.class_token(Coded.of(batch)), batch.texts, own,
            image_regression(plain, features),
        )  # fmt: skip
        return plain._replace(joint=output)

    def joint_loss(self, joint: CachedOutput) -> JointLoss:
        """Mean KL over the rows of accepted images of all ranks, and `milan` times MILAN's loss.

        Parts: `recon`, `accepted`, `prototypes` (mean of exp H), `sentences` (K, all different),
        and `milan` where it is added.
        """
        ranks, device = self.ranks, joint.predicted.device
        sentences, numbers = self._on(device, 0), self._on(device, 1)
        if not self.by_class:
            own = ranks.gather_rows(unit(joint.texts), gradient=False)
            theirs = ranks.gather_rows(joint.captions, gradient=False)
            captioned = own.square().sum(dim=1) > 0.5
            sentences = torch.cat([sentences, own[captioned].to(sentences.dtype)])
            numbers = torch.cat([numbers, theirs[captioned]])
            sentences, numbers = _different(sentences, numbers)
        accepted = torch.ones(len(joint.captions), device=device)
        if self._argument("gate", "none") == "class":
            with torch.autocast(device.type, enabled=False):
                nearest = (unit(joint.whole.detach()) @ sentences.T).argmax(dim=1)
            accepted = (numbers[nearest] == joint.captions).float()
        kl, entropy = sentence_divergence(
            joint.predicted, joint.target, sentences,
            teacher_tau=self.teacher_tau, student_tau=self.student_tau,
        )  # fmt: skip
        rows = ranks.sum_of(accepted.sum()) * kl.shape[1]
        recon = ranks.size * (kl * accepted[:, None]).sum() / rows.clamp_min(1)
        parts = {
            "recon": recon, "accepted": accepted.mean(), "prototypes": entropy.exp().mean(),
            "sentences": torch.full((), float(len(sentences)), device=device),
        }  # fmt: skip
        loss, weight = recon, float(self._argument("milan", 0.0))
        if weight:
            parts["milan"] = joint.milan.mean()
            loss = loss + weight * parts["milan"]
        return JointLoss(loss, {name: value.detach() for name, value in parts.items()})


def _different(sentences: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sentence once, in an order that depends on the sentences alone."""
    ordered, order = numbers.sort(stable=True)
    first = torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])
    return sentences[order[first]], ordered[first]
