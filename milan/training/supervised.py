"""An encoder and a new head, trained on labelled images: what fine-tuning, segmentation and
detection bring. Their run is milan.training.supervised_run's, the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from milan.core.config_resolver import load_recipe
from milan.core.distributed import parallelise
from milan.core.progress import Progress
from milan.core.size import Size
from milan.data.loader import BatchSource
from milan.data.sampler import Address, Kind, split_over_ranks
from milan.errors import ConfigError
from milan.evaluation.config import SupervisedConfig, teacher_refused
from milan.images.channels import Channels
from milan.models.encoder import size_argument
from milan.models.export import CHANNELS, read_about
from milan.models.foreign import Weights
from milan.models.state_dict import misfit
from milan.models.weights import find_weights, is_foreign, resampled
from milan.training.loop import Context


@dataclass(frozen=True)
class Plan:
    """A SupervisedConfig with every default filled in that depends on other things."""

    config: Any
    """The protocol's SupervisedConfig."""
    lr: float
    """Peak learning rate."""
    warmup_epochs: float
    precision: str
    """fp32, bf16 or fp16."""
    num_workers: int
    size: Size
    """Of the images, in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the encoder's normalisation, of each channel."""
    micro_batch: int

    def values(self, **more: Any) -> dict[str, Any]:
        """All settings by name, as run.json keeps them."""
        filled = {name: value for name, value in vars(self).items() if name != "config"}
        return asdict(self.config) | filled | more


class SupervisedData(ABC):
    """Labelled images to train on and to measure on."""

    classes: list[str]
    """Names of what the head tells apart."""
    left_out: int = 0
    """Images that were found unusable before training, and are in neither count."""

    @property
    @abstractmethod
    def train_count(self) -> int:
        """Images to train on."""

    @property
    @abstractmethod
    def val_count(self) -> int:
        """Images to measure on."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Changes with the images, with files beside them that the encoder sees, their order and
        their labels."""

    @abstractmethod
    def key(self, position: int) -> str:
        """Name of an image of a batch: training images are counted first."""


class SupervisedTask(ABC):
    """A network with a head as the loop sees it (milan.training.loop.Task).

    Batches have `positions` [B] int64, places among the training images or in the images to measure
    on behind them, `readable` [B] bool, and `to(device)`.
    """

    def __init__(
        self, network: nn.Module, part: str, plan: Plan, data: Any, context: Context
    ) -> None:
        """`part` names the network's weights in checkpoints; `data` is a SupervisedData."""
        self.plan, self.config, self.data, self.context = plan, plan.config, data, context
        parts, self.trained = {part: network}, network
        if self.config.ema is not None:
            average = get_ema_multi_avg_fn(self.config.ema)
            parts["average"] = AveragedModel(network, multi_avg_fn=average).requires_grad_(False)
        self.model: nn.Module = nn.ModuleDict(parts)
        self.network = parallelise(network, context.ranks, "ddp")
        self.forward: Any = self.network
        """What `loss` calls: the network, perhaps compiled."""
        self.evaluated: Any = parts["average"].module if "average" in parts else network
        """Whose weights are measured and kept."""
        self.rejected: set[int] = set()
        """Positions of images that cannot be read, as far as this rank saw."""
        self.measured = False
        """Whether all images to measure on were seen with the weights as they are."""

    @abstractmethod
    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a micro-batch, a mean over its images; called under autocast."""

    @abstractmethod
    def measure(self, batches: Iterator[Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics (val_loss and more) and pictures by name, of all ranks' validation images.

        `self.evaluated` is in eval mode. Gradients are off; autocast is the protocol's choice.
        """

    @property
    def kept(self) -> nn.Module:
        """Whose weights the run's file has."""
        return self.evaluated

    def validate(
        self, epoch: int, batches: Iterator[Any]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`measure` with this rank's batches of validation images; all must call it."""
        taken = ((address, next(batches)) for address in self.addresses(epoch))
        self.evaluated.eval()
        with torch.no_grad():
            measured = self.measure(batch for address, batch in taken if not address.padding)
        self.evaluated.train()
        self.measured = True
        return measured

    def update_average(self) -> None:
        """Let the average follow the weights; called after each step of the optimiser."""
        self.model["average"].update_parameters(self.trained)  # type: ignore[index]

    def to_device(self, batch: Any) -> Any:
        """The micro-batch on the device; from pinned memory to CUDA the copy does not wait."""
        if not batch.readable.all():
            new = set(batch.positions[~batch.readable].tolist()) - self.rejected
            if new and not self.rejected:
                first = self.data.key(min(new))
                self.context.progress.note(
                    f"rejected files: others stand in for them, the first is {first}"
                )
            self.rejected |= new
        return batch.to(self.context.device)

    def rejected_of_all(self) -> set[int]:
        """`rejected`, as far as any rank saw; all must call it."""
        return set().union(*(own for _, own in self.context.ranks.gather_objects(self.rejected)))

    def describe(self, batch: Any) -> list[str]:
        """The key of each image of a micro-batch."""
        return [self.data.key(position) for position in batch.positions.tolist()]

    def addresses(self, epoch: int) -> list[Address]:
        """This rank's micro-batches of validation images; every rank has as many."""
        rows = np.arange(self.data.val_count)
        whole = Address(Kind.VALIDATION, epoch, rows, np.zeros_like(rows))
        ranks, micro = self.context.ranks, self.plan.micro_batch
        return split_over_ranks(whole, rank=ranks.rank, ranks=ranks.size, micro=micro)


class Supervised(ABC):
    """What a protocol brings that trains an encoder with a new head."""

    kind: ClassVar[type[SupervisedConfig]]
    """Its settings."""
    file: ClassVar[str]
    """Of encoder and head in the run's folder: classifier.safetensors."""
    base_lr: ClassVar[float] = 1e-4
    """Peak learning rate for 256 images a step (MILAN, FINETUNE.md)."""
    most: ClassVar[tuple[int, int]] = (128, 32)
    """Images at once: on a GPU (as published for ViT-B), and on a CPU."""
    compiles: ClassVar[bool] = True
    """Whether the network can be tried on images [B, 3, H, W] and is left as it was by that: has no
    running statistics."""
    default_size: ClassVar[int | None] = None
    """Edge of the images in pixels, if not the encoder's."""

    channels: Channels | None = None
    """What the encoder sees in place of RGB; known once there are weights."""
    of_rgb: ClassVar[dict[str, Any]] = {}
    """Settings that are of 8-bit pictures of RGB alone, and their values without effect."""
    places: ClassVar[tuple[str, ...]] = ()
    """Settings of its own that no recipe has: where data are, and what they mean."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def recipe(self) -> dict[str, Any]:
        """field -> value: what is published. Raises ConfigError."""
        return load_recipe(self.kind, self.config.recipe, self.config.section)

    pairs: ClassVar[tuple[str, str]] = ("", "")
    """Why micro-batches are a multiple of more than one, and flags without which they are not."""

    @property
    def multiple(self) -> int:
        """Micro-batches are a multiple of it."""
        return 1

    @property
    def drops(self) -> tuple[float, ...]:
        """Shares of the run after each of which the learning rate is a tenth; none: a cosine."""
        return ()

    def weights(self) -> Weights:
        """Weights, model and normalisation that the run starts from. Raises ConfigError."""
        return initial_weights(self.config)

    def see(self, channels: Channels | None) -> None:
        """Keep what the encoder sees. Raises ConfigError for settings of RGB, if that is other."""
        self.channels = channels
        if channels is None:
            return
        for name, without in self.of_rgb.items():
            if (value := getattr(self.config, name)) != without:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{name} {value} for {self.config.checkpoint}, which sees channels "
                    f"{channels.spelled} of files",
                    expected="crops and mirrors alone: the others are of 8-bit pictures of RGB",
                    fix=f"without {flag}" if without is False else f"{flag} {without}",
                )

    @abstractmethod
    def open_data(self, progress: Progress) -> Any:
        """A SupervisedData; called on rank 0, when `channels` are known. Raises DataError."""

    @abstractmethod
    def build(self, weights: Weights, plan: Plan, data: Any) -> Any:
        """The network on the CPU, its new weights drawn by the seed. Raises ConfigError."""

    @abstractmethod
    def source(self, plan: Plan, data: Any) -> BatchSource:
        """Loads batches of both kinds (Address.kind)."""

    @abstractmethod
    def task(self, network: Any, plan: Plan, data: Any, context: Context) -> SupervisedTask:
        """How it is trained and measured."""

    @abstractmethod
    def results(self, task: Any, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what describes the network in its file, metrics); writes tables and pictures.

        Called on rank 0 once the task has measured all.
        """


# --- weights --------------------------------------------------------------------------------------


def initial_weights(config: SupervisedConfig) -> Weights:
    """Weights, model and normalisation that a run starts from. Raises ConfigError."""
    name = config.checkpoint
    if name == "teacher":
        raise teacher_refused()
    if name != "random":
        return find_weights(name, flag="--checkpoint", model=config.model, size=config.image_size)
    if not config.like:
        args = dict(config.model_args)
        size = size_argument(args)
        args.pop("img_size", None)
        return Weights({}, config.model, config.image_size or size, args)
    if config.like.startswith("timm:") or is_foreign(config.like):
        weights = find_weights(
            config.like, flag="--like", model=config.model, size=config.image_size
        )
        return replace(weights, encoder={})
    about = read_about(config.like)
    return Weights(
        {}, about["model"], about["input_size"], about["model_args"], mean=about["mean"],
        std=about["std"], channels=about.get(CHANNELS),
    )  # fmt: skip


def load_weights(vit: Any, weights: Weights, *, name: str, leave: tuple[str, ...]) -> None:
    """Put weights into a ViT, positions resampled for its grid; those that begin with one of
    `leave` stay as they are. Raises ConfigError for weights that do not fit."""
    if not weights.encoder:
        return
    state = resampled(weights.encoder, vit, weights.size)
    if odd := misfit(state, vit, leave=leave):
        raise ConfigError(
            f"the weights of {name} do not fit {weights.model}: {odd}",
            expected="the encoder of a plain ViT",
            fix="--model NAME, if it is of another of timm's ViTs",
        )
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(leave)}
    vit.load_state_dict(kept, strict=False)


def parameter_groups(network: Any, config: SupervisedConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: `lr_scale` is layer_decay^(depth + 1 - layer); no decay for biases, norms,
    positions and tokens (MAE, util/lr_decay.py).

    A network that is no ViT has one as `encoder`; the scale of all its other weights is 1. Weights
    that are frozen are in no group.
    """
    encoder = getattr(network, "encoder", network)
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        return param_groups_weight_decay(network, config.weight_decay)
    groups = param_groups_layer_decay(
        encoder, config.weight_decay, no_weight_decay_list=encoder.no_weight_decay(),
        layer_decay=config.layer_decay,
    )  # fmt: skip
    taken = {id(parameter) for parameter in encoder.parameters()}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in taken]
    for decay in (0.0, config.weight_decay):
        chosen = [p for p in others if (p.ndim > 1) == bool(decay)]
        if chosen:
            groups.append({"params": chosen, "lr_scale": 1.0, "weight_decay": decay})
    return groups
