"""An objective: what a student is trained to predict, in one class of one file.

Adding one takes a subclass of `Objective` in a file of its own and a line in
`milan.config.OBJECTIVES`. One that lives elsewhere is named `package.module:Class`.

B views, N patches = V visible + M masked, T = 1 + N tokens with the class token first (T = N for
an encoder without one), C width of the targets, H x W pixels of a view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from milan.config import OBJECTIVES, PretrainConfig
from milan.core.distributed import SINGLE, Ranks
from milan.core.size import grid_of
from milan.data.loader import Batch
from milan.errors import ConfigError
from milan.models.decoder import decoder_arguments
from milan.models.masking import Mask, decode_share, importance_mask, random_mask, visible_count
from milan.models.student import Student, split_deep
from milan.objectives.resample import resampled_attention
from milan.store.cache import TargetCache

OWN = {
    "gather": "rils", "text_tower": "rils", "loss": "milan", "target_norm": "milan",
    "predict": "milan", "class_weight": "milan", "deep_supervision": "milan",
}  # fmt: skip
"""Settings that only some objectives have -> one that has it."""


class Prediction(NamedTuple):
    """What a student predicts for a micro-batch, and what it was given."""

    tokens: torch.Tensor
    """[B, T, C] in the decoder's order: class token, visible patches, masked ones (`Mask.order`);
    T = 1 + V + D where the mask chooses D masked patches."""
    images: torch.Tensor
    """[B, channels, H, W] normalised."""
    mask: Mask
    batch: Batch
    """On the same device."""
    joint: Any = None
    """What is compared with other images of the step, a NamedTuple of tensors, each with a row an
    image or a scalar; None where images are independent."""
    deep: tuple[torch.Tensor, ...] = ()
    """[B, T, C] each: what intermediate blocks of the encoder predict, the first block first."""

    @property
    def patches(self) -> torch.Tensor:
        """[B, N, C]: the tokens of the patches in raster order, `Mask.predicted`; of V + D where D
        are chosen."""
        return self.mask.in_raster(self.of_patches(self.tokens))

    def of_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] without the class token, if there is one; in the same order."""
        return tokens[:, -(self.mask.visible.shape[1] + self.mask.decoded.shape[1]) :]

    @property
    def patch_size(self) -> int:
        """Edge of the student's patches in pixels."""
        height, width = self.images.shape[2:]
        return height // grid_of(self.batch.noise.shape[1], (height, width))[0]


class JointLoss(NamedTuple):
    """The loss of all images of a step, on one rank, and its parts as figures."""

    loss: torch.Tensor
    """Scalar with gradient; its mean over the ranks is the step's."""
    parts: dict[str, torch.Tensor]
    """Scalars without gradient, whose means over the ranks are the step's."""


class Objective(ABC):
    """What a student is trained to predict from the images and targets of a store."""

    decoder: ClassVar[str]
    """Kind of the decoder by default: prompt or mae."""
    masking: ClassVar[str]
    """How masks are drawn by default: semantic or random."""
    needs_features: ClassVar[bool]
    """Whether a batch has to bring the teacher's features."""
    needs_tokens: ClassVar[bool] = False
    """Whether a batch has to bring the token ids of a caption for each image."""
    needs_texts: ClassVar[bool] = False
    """Whether a batch has to bring a text's features for each image, and its token ids."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Which of the settings that only some objectives have (OWN) it has."""
    pooling: str = "both"
    """What of the encoder's tokens was trained to stand for an image: both (class token and mean of
    patches) or mean. Frozen evaluations look at it."""

    def __init__(
        self,
        cache: TargetCache,
        *,
        masking: str,
        mask_ratio: float,
        config: PretrainConfig | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.cache, self.draw, self.mask_ratio = cache, masking, mask_ratio
        self.config, self.ranks = config or PretrainConfig(), ranks

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Raises ConfigError for settings that the objective cannot have."""
        if config.objective_args:
            name = f"objective.{next(iter(config.objective_args))}"
            raise _not_its_own(name, config, f"--objective rils, or without {name}")
        cls.check_own(config)

    @classmethod
    def check_own(cls, config: PretrainConfig) -> None:
        """Raises ConfigError for a setting of other objectives (OWN)."""
        default = PretrainConfig()
        for name, other in OWN.items():
            if name not in cls.settings and getattr(config, name) != getattr(default, name):
                raise _not_its_own(name, config, f"--objective {other}, or without {name}")

    @abstractmethod
    def target_width(self, encoder: Any) -> int:
        """C, for a student with this encoder, a ViT of timm."""

    def decoder_arguments(self, encoder: Any, given: dict[str, Any]) -> dict[str, Any]:
        """All arguments of the decoder for this encoder: those `given`, else the objective's."""
        return decoder_arguments(encoder.embed_dim, given)

    def complete(self, student: Student) -> Student:
        """The student with what else it needs to learn this, initialised by torch's seed."""
        return student

    @property
    def normalised_by(self) -> list[TargetCache]:
        """The layers by whose statistics its targets are normalised (milan.store.statistics)."""
        return []

    def to(self, device: torch.device) -> None:  # noqa: B027
        """Have what a step looks up on `device`, before steps are traced or compiled."""

    def notes(self) -> list[str]:
        """What a person should know before a run begins, a line each."""
        return []

    def after_step(self, student: nn.Module) -> None:  # noqa: B027
        """Called after each update of the weights."""

    def leave(self, run: Path, student: nn.Module) -> None:  # noqa: B027
        """Write what a call leaves beside the encoder; on rank 0, which under fsdp has shards."""

    @abstractmethod
    def loss(self, prediction: Prediction) -> torch.Tensor:
        """The loss of a micro-batch, a scalar: a mean over its images. Called under autocast."""

    def metrics(self, prediction: Prediction) -> dict[str, torch.Tensor]:
        """Scalars by name for validation images; the loss, and what says more to people."""
        return {"loss": self.loss(prediction)}

    @abstractmethod
    def picture(self, prediction: Prediction) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(target, prediction) as pictures: both [B, N, C] float32, shown by common colours.

        Or (None, uint8 pixels [B, H, W, 3]).
        """

    def mask(self, batch: Batch) -> Mask:
        """Which patches are masked and decoded, by the batch's noise and attention alone."""
        patches = batch.noise.shape[1]
        visible = visible_count(patches, self.mask_ratio)
        if self.draw == "random":
            mask = random_mask(batch.noise, visible=visible)
        else:
            mask = importance_mask(attention_of(batch), batch.noise, visible=visible)
        share = self.decoded_share
        return mask if share == 1 else decode_share(mask, batch.noise, share)

    @property
    def decoded_share(self) -> float:
        """Of the masked patches; 0 for an objective that learns from visible ones alone."""
        return self.config.decode_fraction

    def predict(self, network: nn.Module, batch: Batch) -> Prediction:
        """Mask a micro-batch and let `network`, the student, predict; all on one device.

        An objective whose student sees more than masked images has its own.
        """
        images, mask = batch.images, self.mask(batch)
        tokens, *deep = split_deep(network(images, mask))
        return Prediction(tokens, images, mask, batch, deep=tuple(deep))


class JointObjective(Objective):
    """One whose loss compares all images of a step with each other, on all ranks."""

    compared: ClassVar[int] = 256
    """So many validation images are compared with each other."""

    @abstractmethod
    def joint_loss(self, joint: Any) -> JointLoss:
        """The loss of all images of a step, from `joint` of all predictions of this rank together.
        All ranks call it."""

    def loss(self, prediction: Prediction) -> torch.Tensor:
        """`joint_loss` of a micro-batch by itself."""
        return self.joint_loss(prediction.joint).loss


def _not_its_own(name: str, config: PretrainConfig, fix: str) -> ConfigError:
    return ConfigError(
        f"{name} with objective {config.objective}", expected="a setting of this objective", fix=fix
    )


def attention_of(batch: Batch) -> torch.Tensor:
    """The teacher's attention on the student's grid of patches, [B, N], > 0."""
    patches = batch.noise.shape[1]
    if batch.attention.shape[1] == patches:
        return batch.attention
    height, width = batch.images.shape[2:]
    return resampled_attention(batch.attention, patches, (height, width))


def objective_class(name: str) -> type[Objective]:
    """The objective of that name in `milan.config.OBJECTIVES`, or `package.module:Class`.

    Raises ConfigError if it cannot be imported, or is no Objective.
    """
    module, _, attribute = OBJECTIVES.get(name, name).partition(":")
    try:
        chosen = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"objective {name} cannot be imported: {error}",
            expected="package.module:Class, importable in every process of the run",
        ) from None
    if not (isinstance(chosen, type) and issubclass(chosen, Objective)):
        raise ConfigError(
            f"objective {name} is no subclass of milan.objectives.base.Objective",
            fix=" or ".join(f"--objective {known}" for known in OBJECTIVES),
        )
    return chosen
