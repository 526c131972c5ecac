"""What a run consists of: settings with all defaults filled in, objective, student, order, task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from milan.config import PretrainConfig
from milan.core.distributed import SINGLE, Ranks
from milan.core.progress import NoProgress, Progress
from milan.core.size import size_in_words
from milan.data.dataset import CachedDataset
from milan.data.feeding import Workers, loader_workers
from milan.data.loader import Batch, training_loader
from milan.data.order import Order, Stream, order_of
from milan.data.sampler import StepSampler
from milan.errors import ConfigError
from milan.models.encoder import size_argument
from milan.models.masking import visible_count
from milan.models.student import Student, build_student
from milan.objectives.base import Objective, objective_class
from milan.objectives.teachers import SeveralTeachers, check_one_teacher
from milan.store.cache import TargetCache
from milan.store.sentences import Sentences
from milan.training.channels import law_of
from milan.training.optim import Schedule
from milan.training.validation import Validation

_BASE_LR = 1.5e-4  # for 256 images a step (MILAN, PRETRAIN.sh)
_MICRO_BATCH = 256  # images a device takes at once, as published for ViT-B
_CPU_CACHE = 32 * 2**20  # bytes: about the last-level cache of a CPU


@dataclass(frozen=True)
class Settings:
    """A PretrainConfig with every default filled in that depends on another field or the device."""

    config: PretrainConfig
    decoder_kind: str
    masking: str
    warmup_epochs: float
    lr: float
    """Peak learning rate."""
    precision: str
    """fp32, bf16 or fp16."""

    @property
    def tf32(self) -> bool:
        """Whether float32 is multiplied in TF32, on CUDA: where it was asked for as a whole."""
        return self.precision == "fp32" and self.config.tf32

    def values(self, **more: Any) -> dict[str, Any]:
        """All settings by name, as run.json keeps them."""
        filled = {name: value for name, value in vars(self).items() if name != "config"}
        return asdict(self.config) | filled | more

    def whole(self) -> Settings:
        """The same, but that all masked patches are decoded."""
        return replace(self, config=replace(self.config, decode_fraction=1.0))

    def objective(self, cache: TargetCache, ranks: Ranks = SINGLE) -> Objective:
        """The objective, for the images and targets of a store."""
        config, kind = self.config, objective_class(self.config.objective)
        given: dict[str, Any] = {
            "masking": self.masking, "mask_ratio": config.mask_ratio, "config": config,
            "ranks": ranks,
        }  # fmt: skip
        if len(cache.parts) > 1:
            return SeveralTeachers(kind, cache, **given)
        check_one_teacher(config)
        return kind(cache, **given)


def resolve_defaults(
    config: PretrainConfig, device: torch.device, ranks: Ranks = SINGLE
) -> Settings:
    """Fill in the defaults of a run on `ranks` devices. Raises ConfigError."""
    objective = objective_class(config.objective)
    objective.check(config)
    config = _with_channels(config, objective)
    share = config.batch_size // ranks.size
    if config.batch_size % ranks.size:
        raise ConfigError(
            f"batch size {config.batch_size} over {ranks.size} ranks",
            expected="as many images for every rank",
            fix=f"--batch-size {(share + 1) * ranks.size}"
            + ("" if share else f", or at most {config.batch_size} ranks (--devices)"),
        )
    return Settings(
        config,
        decoder_kind=config.decoder_kind or objective.decoder,
        masking=config.masking or objective.masking,
        warmup_epochs=config.epochs / 10 if config.warmup_epochs is None else config.warmup_epochs,
        lr=config.lr or _BASE_LR * config.batch_size / 256,
        precision=precision_of(config.precision, device),
    )


def _with_channels(config: PretrainConfig, objective: type[Objective]) -> PretrainConfig:
    """The settings with the encoder's argument for so many channels. Raises ConfigError."""
    law = law_of(config)
    if law is None:
        return config
    given = config.model_args.get("in_chans", law.count)
    if given != law.count:
        raise ConfigError(
            f"model argument in_chans={given}",
            expected=f"{law.count}, as {law.spelled} are",
            fix="without it",
        )
    if objective.needs_tokens or objective.needs_texts:
        raise ConfigError(
            f"student_channels with objective {config.objective}",
            expected="an objective without texts",
            fix="--objective milan, or pixels",
        )
    if max(config.shown_channels or (1,)) > law.count:
        raise ConfigError(
            f"shown_channels {' '.join(map(str, config.shown_channels or ()))}",
            expected=f"three of the {law.count} channels {law.spelled}, by place",
            fix="--set shown_channels=1,1,1",
        )
    return replace(config, model_args={**config.model_args, "in_chans": law.count})


def precision_of(precision: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: `precision`, or for auto what the device is fast in."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    # Cards before Ampere compute bf16 by emulation: slower than fp32.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# --- the student ----------------------------------------------------------------------------------


def student_of(
    settings: Settings, cache: TargetCache, *, decoder: dict[str, Any] | None = None
) -> Student:
    """The student for views and targets of the store. Raises ConfigError.

    `decoder` has the decoder's arguments, of a run that goes on; default: those of the settings.
    """
    config, size = settings.config, cache.view_spec.size
    needed = objective_class(config.objective).needs_features or settings.masking == "semantic"
    if needed and not cache.spec.has_targets:
        raise cache.no_targets("--objective rils, or ")
    if config.mask_layer and settings.masking != "semantic":
        raise ConfigError(
            f"mask_layer {config.mask_layer} with {settings.masking} masks",
            expected="masks by a teacher's attention",
            fix="--masking semantic, or without --mask-layer",
        )
    if size_argument(config.model_args, size) != size:
        raise ConfigError(
            f"model argument img_size={config.model_args['img_size']}",
            expected=f"{size_in_words(size)}, as the views of the store are",
            fix="without --set model.img_size",
        )
    objective = settings.objective(cache)
    student = build_student(
        config.model,
        img_size=size,
        target_width=objective.target_width,
        decoder_kind=settings.decoder_kind,
        model_args=config.model_args,
        decoder=lambda encoder: objective.decoder_arguments(encoder, decoder or config.decoder),
        seed=config.seed,
        recompute=config.checkpoint_activations,
        complete=objective.complete,
    )
    student.own_channels = config.student_channels is not None
    visible_count(student.patches, config.mask_ratio)  # refuses a ratio before the run begins
    return student


def micro_batch_of(
    config: PretrainConfig,
    student: Student,
    device: torch.device,
    ranks: Ranks = SINGLE,
    progress: Progress | None = None,
) -> int:
    """Images at once on a device: the largest number that divides a rank's share of a step.

    At most `config.micro_batch`, by default 256; on a CPU no more than keep the widest activation
    of a block in its cache (docs/performance.md).
    """
    share = config.batch_size // ranks.size
    most = config.micro_batch or _MICRO_BATCH
    if device.type == "cpu" and not config.micro_batch:
        most = max(1, min(most, _CPU_CACHE // _widest_activation(student, config.mask_ratio)))
    most = min(most, share)
    size = divisor(share, most) or 1
    if 2 * size <= most:
        better = max(1, round(share / most)) * most * ranks.size
        (progress or NoProgress()).note(
            f"micro-batches of {size} images: a rank's {share} do not divide by any number nearer "
            f"to {most}; --batch-size {better} is faster"
        )
    return size


def divisor(share: int, most: int, *, multiple: int = 1) -> int | None:
    """The largest number up to `most` that divides `share` and is a multiple of `multiple`."""
    sizes = range(min(most, share), 0, -1)
    return next((m for m in sizes if share % m == 0 and m % multiple == 0), None)


def _widest_activation(student: Student, mask_ratio: float) -> int:
    """Bytes of the widest activation of an image: mostly the hidden layer of an MLP."""
    shares = (student.encoder, 1 - mask_ratio), (student.decoder, 1.0)
    return max(
        round(4 * share * student.patches * layer.out_features)
        for part, share in shares
        for layer in part.modules()
        if isinstance(layer, nn.Linear)
    )


# --- order and schedule ---------------------------------------------------------------------------


def run_order(config: PretrainConfig, cache: TargetCache) -> Order:
    """The order in which a run reads a store. Raises ConfigError if it has too few images."""
    order = order_of(
        cache,
        seed=config.seed,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        window_rows=config.window_rows,
        held_out=config.held_out,
    )
    without = uncaptioned_rows(config, cache)
    return order.without(without, without[:0]) if len(without) else order


def uncaptioned_rows(config: PretrainConfig, cache: TargetCache) -> np.ndarray:
    """Rows without a caption or a class, where the objective needs one; ascending, int64."""
    if not objective_class(config.objective).needs_tokens:
        return np.zeros(0, np.int64)
    return Sentences(cache).missing()


def schedule_of(settings: Settings, order: Stream, micro_batch: int, ranks: int) -> Schedule:
    """How long a run is and how fast it learns, on so many ranks."""
    config = settings.config
    return Schedule(
        data=order,
        epochs=config.epochs,
        accumulate=config.batch_size // ranks // micro_batch,
        lr=settings.lr,
        warmup_epochs=settings.warmup_epochs,
        min_lr=config.min_lr,
        precision=settings.precision,
        save_every=config.save_every,
        save_minutes=config.save_minutes,
        keep=config.keep,
        log_every=config.log_every,
        on_nonfinite=config.on_nonfinite,
        clip_grad=config.clip_grad,
    )


def check_room(order: Order, cache: TargetCache, limit: int) -> None:
    """Raises ConfigError if the shards of a window are more than `limit` bytes."""
    shards = min(order.window_shards, len(np.unique(order.shards)))
    largest = sum(
        max(int(g.sizes().clip(0).sum(axis=1).max()) for g in part.generations)
        for part in cache.parts
    )
    if shards * largest > limit:
        raise ConfigError(
            f"a window of {shards:,} shards takes {shards * largest:,} bytes, "
            f"cache_limit is {limit:,}",
            expected="room for one window, better for two",
            fix="a larger --cache-limit, or a smaller window: --set window_rows=N",
        )


def loader_of(
    dataset: CachedDataset, sampler: StepSampler, objective: Objective, student: Student,
    **reading: Any,
) -> Any:  # fmt: skip
    """The micro-batches of `sampler` with what the objective needs of them.

    `reading` is how they are read: the other arguments of `training_loader`.
    """
    return training_loader(
        dataset,
        sampler,
        features=objective.needs_features,
        tokens=objective.needs_tokens,
        texts=objective.needs_texts,
        patches=student.patches,
        **reading,
    )


def workers_of(
    config: PretrainConfig, dataset: CachedDataset, micro_batch: int, ranks: Ranks
) -> Workers:
    """How many loader workers each rank has."""
    channels = dataset.channels.law.count if dataset.channels else 0
    return loader_workers(config.num_workers, dataset.cache, micro_batch, ranks.on_node, channels)


# --- the task -------------------------------------------------------------------------------------


class PretrainTask:
    """Pretraining as the loop sees it (milan.training.loop.Task)."""

    def __init__(
        self,
        student: Student,
        network: nn.Module,
        step_loss: Callable[[Batch], torch.Tensor],
        validation: Validation,
        device: torch.device,
    ) -> None:
        self.model, self.network, self.step_loss = student, network, step_loss
        self.validate, self.device = validation, device

    def to_device(self, batch: Batch) -> Batch:
        """The micro-batch on the device; from pinned memory to CUDA the copy does not wait."""
        return batch.to(self.device)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The objective on a micro-batch, a scalar."""
        return self.step_loss(batch)

    def describe(self, batch: Batch) -> list[str]:
        """'row.view' of each image of a micro-batch."""
        pairs: Iterator[tuple[int, int]] = zip(
            batch.rows.tolist(), batch.views.tolist(), strict=True
        )
        return [f"{row}.{view}" for row, view in pairs]
