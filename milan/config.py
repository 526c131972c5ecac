"""What the commands of learning can be told. No heavy imports: flags and help are made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from milan.core.units import parse_bytes
from milan.errors import ConfigError

OBJECTIVES = ("milan", "pixels")
MASKINGS = ("semantic", "random")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SHUFFLES = ("window", "global")
ON_CHANGED = ("error", "drop")
ON_GROWTH = ("keep", "move")
ON_NONFINITE = ("stop", "skip")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class PretrainConfig:
    """What `milan pretrain` does; defaults are the published ViT-B/16 recipe (MILAN, table 8)."""

    cache: str = "targets.zarr"
    """A finished store: a path or a URL."""
    layer: str | None = None
    """Which targets, of a store that holds several (`milan inspect` names them)."""
    out: str = "runs/pretrain"
    """The run's folder."""
    data_root: str | None = None
    """Where the images lie, if not where the store says."""
    recipe: str = "vit_base"
    """A published recipe, from which all else deviates: vit_base, vit_large."""
    model: str = "vit_base_patch16_224"
    """A ViT of timm."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: --set model.embed_dim=128."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """embed_dim 512, depth 8, num_heads 16, mlp_ratio 4: --set decoder.depth=2."""
    objective: str = "milan"
    """milan (the teacher's features), or pixels (MAE, the baseline)."""
    decoder_kind: str | None = None
    """prompt or mae; default: prompt for milan, mae for pixels."""
    masking: str | None = None
    """semantic or random; default: semantic for milan, random for pixels."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the student."""
    epochs: int = 400
    """Passes over the images."""
    warmup_epochs: float | None = None
    """Linear warm-up; default: a tenth of the epochs (40 of 400)."""
    batch_size: int = 4096
    """Images a step, over everything."""
    micro_batch: int | None = None
    """Images at once on a device, at most; the rest accumulates. Default: 256."""
    lr: float | None = None
    """Peak rate; default: 1.5e-4 for every 256 images of a step (2.4e-3 at 4096)."""
    min_lr: float = 0.0
    """Rate at the end."""
    weight_decay: float = 0.05
    """AdamW's; none for biases and norms."""
    beta2: float = 0.95
    """AdamW's second moment; the first is 0.9."""
    seed: int = 0
    """Of weights, order and masks."""
    shuffle: str = "window"
    """window (whole shards, and rows within window_rows of them), or global (all rows)."""
    window_rows: int = 131_072
    """Rows that a window shuffles together; a store that fits one is shuffled globally."""
    on_changed: str = "error"
    """Images that changed since extraction: error, or drop (all are looked at before the run)."""
    on_growth: str = "keep"
    """A store that grew since the run began: keep to what it was, or move on at the next epoch."""
    held_out: float = 0.01
    """Share of rows never trained on, by which the run is judged after every epoch; by seed."""
    probe_every: int | None = None
    """Epochs between k-NN probes: held-out images against others, by the store's labels."""
    probe_images: int = 10_000
    """Images that a k-NN probe knows the labels of."""
    picture_every: int = 10
    """Epochs between pictures of masks and features; the first and the last have one too."""
    report_to: str = "tensorboard"
    """Some of tensorboard, wandb, mlflow, with commas between; or none."""
    precision: str = "auto"
    """fp32, bf16, fp16; auto: bf16 or fp16 on CUDA, else fp32."""
    checkpoint_activations: bool = False
    """Keep what goes into a block only, and compute the rest again: less memory, more time."""
    clip_grad: float | None = None
    """Largest norm of a step's gradients; default: any, as published."""
    on_nonfinite: str = "stop"
    """A loss that is not finite: stop, or skip its step (ten in a row stop)."""
    device: str = "auto"
    """auto, cuda, cpu, ..."""
    devices: int | None = None
    """Processes on each machine; default: one for every visible GPU, one on a CPU."""
    num_nodes: int = 1
    """Machines of a Ray cluster, with --address; torchrun and srun are found by themselves."""
    address: str | None = None
    """The Ray cluster that starts the ranks."""
    parallel: str = "ddp"
    """Several ranks hold the weights each (ddp), or a share of them each (fsdp)."""
    max_restarts: int = 3
    """How often all ranks start again from the last checkpoint because one died."""
    num_workers: int | None = None
    """Loader processes of each rank; default: its share of the cores but one, at most 8."""
    local: str | None = None
    """A folder on a fast disk: whole shards are copied there ahead of reading."""
    cache_limit: str | None = None
    """Most that --local may hold, such as 200GB; at least one window."""
    save_every: int | None = None
    """Steps between checkpoints; default: about an epoch's, at least 50."""
    save_minutes: float = 15.0
    """Minutes between checkpoints, whatever the steps."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between lines of the log."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        choice("objective", self.objective, OBJECTIVES)
        choice("masking", self.masking, (*MASKINGS, None))
        choice("precision", self.precision, PRECISIONS)
        choice("shuffle", self.shuffle, SHUFFLES)
        choice("on_changed", self.on_changed, ON_CHANGED)
        choice("on_growth", self.on_growth, ON_GROWTH)
        choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        choice("parallel", self.parallel, PARALLEL)
        if "://" in self.out:
            raise ConfigError(f"out {self.out}", expected="a folder: runs are kept on a disk")
        for name in (
            "epochs", "batch_size", "micro_batch", "keep", "log_every", "save_every", "window_rows",
            "devices", "num_nodes", "probe_every", "probe_images", "picture_every",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}", expected="at least 1")
        for name in ("lr", "clip_grad", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} {value}", expected="a number greater than 0")
        for name in ("num_workers", "weight_decay", "min_lr", "max_restarts"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} {value}", expected="at least 0")
        if (self.local is None) != (self.cache_limit is None):
            raise ConfigError("one of local and cache_limit", expected="both, or neither")
        if self.cache_limit is not None:
            parse_bytes(self.cache_limit)
        if not 0 <= self.held_out <= 0.5:
            raise ConfigError(f"held_out {self.held_out}", expected="a share from 0 to 0.5")
        if not 0 <= self.beta2 < 1:
            raise ConfigError(f"beta2 {self.beta2}", expected="at least 0, less than 1")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(
                f"warmup_epochs {self.warmup_epochs} of {self.epochs} epochs",
                expected="less than the epochs",
            )


def choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join(str(a) for a in allowed if a is not None)
        raise ConfigError(f"{name} {value!r}", expected=f"one of {names}")


@dataclass(frozen=True)
class ProbeConfig:
    """What `milan linear-probe` does."""

    checkpoint: str = "runs/pretrain"
    """A run's folder, random (as timm initialises it), timm:NAME, or teacher."""
    data: str = "imagenet"
    """Labelled images to fit on."""
    val_data: str | None = None
    """Labelled images to measure on; default: a fifth of --data, by seed."""
    data_root: str | None = None
    """Where data names are looked up."""
    out: str | None = None
    """Where the metrics go (JSON); default: linear_probe.json in the run's folder."""
    like: str | None = None
    """With random: a run whose encoder's shape is taken."""
    model: str = "vit_base_patch16_224"
    """With random and no --like: a ViT of timm."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: --set model.embed_dim=128."""
    crop_share: float = 0.875
    """Central square shown, as a share of the shorter edge (224 of 256)."""
    batch_size: int = 256
    """Images at once."""
    num_workers: int | None = None
    """Decoding threads; default: the cores, at most 16."""
    limit: int | None = None
    """Only so many images of each set."""
    device: str = "auto"
    """auto, cuda, cpu, ..."""
    seed: int = 0
    """Of random weights and of the splits."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        for name in ("batch_size", "limit", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}", expected="at least 1")
        if not 0 < self.crop_share <= 1:
            raise ConfigError(f"crop_share {self.crop_share}", expected="above 0, at most 1")
