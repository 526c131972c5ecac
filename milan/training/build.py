"""What a run learns: the student that fits a store, its objective, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from milan.config import PretrainConfig
from milan.core.device import MEAN, STD, denormalise, normalise
from milan.core.distributed import Ranks
from milan.data.dataset import Batch, CachedDataset
from milan.data.order import StepSampler, Stream
from milan.errors import ConfigError
from milan.models.encoder import build_encoder
from milan.models.masking import Mask, importance_mask, random_mask, visible_count
from milan.models.student import Student, build_student
from milan.objectives.features import feature_regression, pixel_regression, unpatchify_prediction
from milan.objectives.resample import resampled_attention, resampled_features
from milan.reporting.panels import SheetInputs
from milan.store.cache import TargetCache
from milan.training.loop import decay_groups
from milan.training.validation import Validation


def student_of(config: PretrainConfig, targets: TargetCache) -> Student:
    """The student for views and targets of the store. Raises ConfigError."""
    milan, size = config.objective == "milan", targets.view_spec.size
    if config.model_args.get("img_size", size) != size:
        raise ConfigError(
            f"model argument img_size={config.model_args['img_size']}",
            expected=f"{size}, as the views of the store are",
        )
    patch = config.model_args.get("patch_size") or _patch_of(config, targets)
    if not isinstance(patch, int):
        raise ConfigError(f"patch_size {patch!r} of the model", expected="a number of pixels")
    student = build_student(
        config.model,
        img_size=size,
        target_width=targets.spec.channels if milan else 3 * patch * patch,
        decoder_kind=config.decoder_kind or "prompt",
        model_args=config.model_args,
        decoder=config.decoder,
        seed=config.seed,
        recompute=config.checkpoint_activations,
    )
    visible_count(student.patches, config.mask_ratio)  # refuses a ratio before the run begins
    return student


def _patch_of(config: PretrainConfig, targets: TargetCache) -> int:
    args = {**config.model_args, "depth": 1}
    shallow = build_encoder(config.model, img_size=targets.view_spec.size, args=args)
    return shallow.patch_embed.patch_size[0]


def optimiser_of(
    student: Student, config: PretrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW as published; its rate is set at every step."""
    return torch.optim.AdamW(
        decay_groups(student, config.weight_decay),
        lr=0.0,
        betas=(0.9, config.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


class Said(NamedTuple):
    """What a student says of a batch, and what it should have said."""

    images: torch.Tensor
    """[B, 3, S, S] normalised."""
    prediction: torch.Tensor
    """[B, T, C]"""
    features: torch.Tensor | None
    """[B, T, C] of the teacher; None where pixels are predicted."""
    mask: Mask

    @property
    def patch(self) -> int:
        """Edge of the student's patches in pixels."""
        patches = self.mask.visible.shape[1] + self.mask.masked.shape[1]
        return self.images.shape[2] // round(patches**0.5)

    def loss(self) -> torch.Tensor:
        """The objective, a scalar."""
        if self.features is None:
            hidden = self.mask.boolean()
            return pixel_regression(self.prediction, self.images, hidden, patch=self.patch)
        return feature_regression(self.prediction, self.features)


def say(network: nn.Module, config: PretrainConfig, targets: TargetCache, batch: Batch) -> Said:
    """Mask a batch and predict what the teacher said, or pixels.

    Targets of another grid than the student's are resampled: unit vectors, for only directions
    count, and a long one must not drown its neighbours.
    """
    images = normalise(batch.pixels, MEAN, STD)
    patches = batch.noise.shape[1]
    visible = visible_count(patches, config.mask_ratio)
    prediction, mask = predict(network, images, batch, config.masking, visible)
    if config.objective == "pixels":
        return Said(images, prediction, None, mask)
    assert batch.codes is not None
    features = targets.codec.decode(batch.codes, batch.scale)
    if features.shape[1] != 1 + patches:
        features = resampled_features(F.normalize(features, dim=-1), patches)
    # A student without class token predicts patches only.
    return Said(images, prediction, features[:, -prediction.shape[1] :], mask)


def predict(
    network: nn.Module, images: torch.Tensor, batch: Batch, masking: str | None, visible: int
) -> tuple[torch.Tensor, Mask]:
    """Mask and predict: (predictions [B, T, C], the mask)."""
    if masking == "semantic":
        attention, patches = batch.attention, batch.noise.shape[1]
        if attention.shape[1] != patches:
            attention = resampled_attention(attention, patches)
        mask = importance_mask(attention, batch.noise, visible=visible)
    else:
        mask = random_mask(batch.noise, visible=visible)
    return network(images, mask), mask


def loss_function(
    network: nn.Module, config: PretrainConfig, targets: TargetCache, device: torch.device
) -> Callable[[Batch], torch.Tensor]:
    """The objective as a function of a batch."""
    return lambda batch: say(network, config, targets, batch.to(device)).loss()


class Task:
    """What a run trains, for what, and how it is judged (milan.training.loop.Task)."""

    sampler: StepSampler
    """Of the batches that are being read."""

    def __init__(
        self,
        config: PretrainConfig,
        student: Student,
        network: nn.Module,
        dataset: CachedDataset,
        stream: Stream,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.config, self.student, self.network = config, student, network
        self.targets, self.device = dataset.cache, device
        self.loss = loss_function(network, config, dataset.cache, device)
        self.judged = Validation(
            config, dataset, stream, measure=self._measure, represent=self._represent,
            show=self._show, ranks=ranks, device=device,
        )  # fmt: skip

    def rows(self, batch: Batch) -> list[tuple[int, int]]:
        """(row, view) of each image of a micro-batch."""
        return list(zip(batch.rows.tolist(), batch.views.tolist(), strict=True))

    def judge(
        self, epoch: int, batches: Iterator[Batch]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Figures, and pictures by name, after an epoch; takes its own `batches` of the stream."""
        return self.judged(self.sampler.aside_of(epoch), batches)

    def _measure(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the objective, mean cosine to the teacher of the hidden patches), both of a batch."""
        said = self._say(batch)
        if said.features is None:
            return said.loss(), None
        cosine = F.cosine_similarity(said.prediction.float(), said.features.float(), dim=-1)
        hidden = said.mask.boolean()
        return said.loss(), cosine[:, -hidden.shape[1] :][hidden].mean()

    def _show(self, batch: Batch) -> SheetInputs:
        said, patches = self._say(batch), batch.noise.shape[1]
        attention, features = batch.attention, None
        if attention.shape[1] != patches:
            attention = resampled_attention(attention, patches)
        if said.features is None:
            prediction = unpatchify_prediction(said.prediction, said.images, patch=said.patch)
            prediction = denormalise(prediction, MEAN, STD)
        else:
            prediction = said.prediction[:, -patches:].float()
            features = said.features[:, -patches:].float().cpu().numpy()
        return SheetInputs(
            batch.rows.numpy(),
            batch.pixels.numpy(),
            attention.numpy(),
            said.mask.boolean().cpu().numpy(),
            features,
            prediction.cpu().numpy(),
        )

    def _say(self, batch: Batch) -> Said:
        return say(self.student, self.config, self.targets, batch.to(self.device))

    def _represent(self, batch: Batch) -> torch.Tensor:
        pixels = batch.pixels.to(self.device, non_blocking=True)
        return self.student.pooled_features(normalise(pixels, MEAN, STD))
