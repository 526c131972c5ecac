"""Settings of pretraining. No heavy imports: flags and help are made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from milan.core.config_fields import check_fields, seed_setting, setting
from milan.core.units import parse_bytes
from milan.errors import ConfigError, nearest

OBJECTIVES = {
    "milan": "milan.objectives.features:FeatureRegression",
    "pixels": "milan.objectives.pixels:PixelRegression",
    "rils": "milan.objectives.rils:SentenceReconstruction",
    "rils-cached": "milan.objectives.rils_cached:CachedSentences",
}
"""Name of an objective -> module:Class (milan.objectives.base)."""


@dataclass(frozen=True)
class PretrainConfig:
    """What `milan pretrain` does; defaults are the published ViT-B/16 recipe (MILAN, table 8)."""

    # The store and the run
    cache: str = setting("targets.zarr", identity=False)
    """A finished store: a path or a URL."""
    layer: str | None = setting(None, identity=False, several=True)
    """Layer of a store that has several (`milan inspect` names them). With several names the
    student has a head for each teacher; STORE::NAME is a layer of another store of the same
    views."""
    mask_layer: str | None = setting(None, identity=False)
    """With several layers: the one whose attention draws the masks; default: the first."""
    out: str = setting("runs/pretrain", identity=False)
    """The run's folder."""
    data_root: str | None = setting(None, identity=False)
    """Where the images are, if not where the store says."""
    recipe: str = setting("vit_base", identity=False)
    """A recipe: it gives the defaults of all other settings. vit_base, vit_large, rils_vit_base,
    rils_vit_large, rils_cached_vit_base."""

    # What is learnt
    model: str = "vit_base_patch16_224"
    """A ViT of timm."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: --set model.embed_dim=128."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """embed_dim 2/3 of the model's, at most 512; depth 8; num_heads embed_dim / 32; mlp_ratio 4:
    --set decoder.depth=2."""
    objective: str = "milan"
    """milan (the teacher's features), pixels (MAE, the baseline), rils (captions), rils-cached (the
    teacher's features compared with texts), or package.module:Class."""
    objective_args: dict[str, Any] = field(default_factory=dict)
    """rils: weight, teacher_tau, student_tau, normaliser; rils-cached: teacher_tau, student_tau,
    rows, gate, sentences, draws, milan: --set objective.weight=0.5."""
    loss: str = setting("cosine", choices=("cosine", "smooth-l1", "relation"))
    """milan: distance between a predicted token and its target: cosine (2 - 2 cos, as published),
    smooth-l1 (beta 2, as data2vec), or relation (how both relate to the image's other tokens, after
    TinyMIM)."""
    target_norm: str | None = setting(
        None, choices=("none", "layernorm", "standardise", "phi-s"), auto=True
    )
    """milan: how the teacher's features are normalised: none, layernorm (each token), standardise
    (each channel), phi-s (all channels alike, after a rotation). The last two use statistics of the
    store. Auto: layernorm with smooth-l1, else none."""
    predict: str = setting("all", choices=("all", "both", "masked", "visible"))
    """milan: the tokens in the loss: all (each counts the same, the class token too; as published),
    both (masked and visible patches count half each; CAE v2), masked, or visible (nothing is
    decoded; MaskAlign)."""
    class_weight: float | None = setting(None, unit="times", auto=True, least=0)
    """milan: weight of the class token, where the patches have 1 (MEDiC). Auto: with predict all
    that of any other token, else 0."""
    deep_supervision: str | None = setting(None, several=True)
    """milan: encoder blocks whose tokens predict the targets too, such as 6,8,10 (DeepMIM, for
    ViT-B). Each has a decoder of its own, which is not exported."""
    gather: str | None = setting(None, choices=("detached", "full"), auto=True)
    """rils: whether gradients pass through the images and captions gathered for comparison: full or
    detached. Auto: detached, as published on several devices."""
    text_tower: str | None = setting(None, auto=True)
    """rils: architecture of the text tower (an open_clip name), or a checkpoint of open_clip or
    RILS to start from. Auto: the architecture of the store's tokens."""
    layer_weights: str | None = setting(None, several=True)
    """Weights of the losses of several layers, in their order: 1,0.5; default: all alike."""
    teacher_dropping: float = setting(0.0, unit="probability", least=0, most=1)
    """With several teachers: an image learns from the one it is worst at; each other one is dropped
    with this probability (UNIC: 0.5)."""
    decoder_kind: str | None = setting(None, auto=True)
    """prompt or mae; auto: the objective's (prompt for milan, mae for others)."""
    masking: str | None = setting(None, choices=("semantic", "random"), auto=True)
    """semantic or random; auto: the objective's (semantic for milan, random for others)."""
    mask_ratio: float = setting(0.75, unit="share", above=0, below=1)
    """Share of patches that are masked."""
    decode_fraction: float = setting(1.0, unit="share", above=0, most=1)
    """Share of the masked patches that a step decodes, drawn by address. The others cost nothing
    and are not in the loss. Published: 1."""
    student_channels: str | None = None
    """Channels that the student sees in place of RGB: numbers from 1, such as 1-13; rgb,1 puts the
    image's colours before them. Default: what the teacher sees."""
    student_data: str | None = setting(None, identity=False)
    """Folder of files (.npy, TIFF, PNG) named by the images' keys, with any ending, that hold the
    channels of student_channels; default: the image's own file."""
    shown_channels: tuple[int, int, int] | None = setting(None, identity=False, least=1)
    """Which of student_channels are red, green and blue in pictures, by place: 4,3,2. Default: the
    first three, or the first in grey."""
    init: str | None = None
    """Weights to start from: a run's folder (its encoder), timm:NAME, another library's checkpoint,
    or published[:FILE]."""

    # The schedule
    epochs: int = setting(400, unit="epochs", least=1)
    """Passes over the images."""
    warmup_epochs: float | None = setting(None, unit="epochs", auto=True, least=0)
    """Linear warm-up; auto: a tenth of the epochs (40 of 400)."""
    batch_size: int = setting(4096, unit="images", least=1)
    """Images of a step, over all devices."""
    micro_batch: int | None = setting(None, identity=False, unit="images", auto=True, least=1)
    """Largest number of images on a device at once; gradients accumulate. Auto: 256, or what a
    CPU's cache holds."""
    lr: float | None = setting(None, unit="a step", auto=True, above=0)
    """Peak learning rate; auto: 1.5e-4 for every 256 images of a step (2.4e-3 at 4096)."""
    min_lr: float = setting(0.0, unit="a step", least=0)
    """Learning rate at the end."""
    weight_decay: float = setting(0.05, unit="times lr", least=0)
    """AdamW's; none for biases and norms."""
    beta2: float = setting(0.95, unit="share", least=0, below=1)
    """AdamW's second moment; the first is 0.9."""
    seed: int = seed_setting()
    """Seed of weights, order and masks."""

    # The order of the images
    shuffle: str = setting("window", choices=("window", "global"))
    """window (shards, then rows within window_rows), or global (all rows)."""
    window_rows: int = setting(131_072, unit="rows", least=1)
    """Rows that a window shuffles together; a store that fits one is shuffled globally."""
    on_changed: str = setting("error", identity=False, choices=("error", "drop"))
    """If images changed since extraction: error, or drop them (all are compared before the run)."""
    on_growth: str = setting("keep", identity=False, choices=("keep", "move"))
    """If the store grew since the run began: keep to what it was, or move on at the next epoch."""

    # What is seen of the run
    held_out: float = setting(0.01, unit="share", least=0, most=0.5)
    """Share of the images that are kept for validation, by the seed, and never trained on."""
    probe_every: int | None = setting(None, identity=False, unit="epochs", least=1)
    """Epochs between k-NN probes: validation images against others, by the store's labels."""
    probe_images: int = setting(10_000, identity=False, unit="images", least=1)
    """Images whose labels a k-NN probe knows."""
    picture_every: int = setting(10, identity=False, unit="epochs", least=1)
    """Epochs between pictures of masks and features; the first and the last have one too."""
    report_to: str = setting("tensorboard", identity=False)
    """Trackers, with commas between: tensorboard, wandb, mlflow; or none."""
    log_every: int = setting(10, identity=False, unit="steps", least=1)
    """Steps between lines of the log."""

    # Numbers and devices
    precision: str = setting("auto", identity=False, choices=("auto", "fp32", "bf16", "fp16"))
    """fp32, bf16, fp16; auto: bf16 or fp16 on CUDA, else fp32."""
    tf32: bool = setting(True, identity=False)
    """Multiply float32 in TF32 if precision is fp32 on CUDA; sums stay float32."""
    compile: str = setting("auto", identity=False, choices=("auto", "on", "off"))
    """torch.compile student and loss; auto: on CUDA, and without it if that fails."""
    checkpoint_activations: bool = setting(False, identity=False)
    """Keep only the input of each block, and compute the rest again: less memory, more time."""
    clip_grad: float | None = setting(None, unit="norm", above=0)
    """Largest norm of a step's gradients; default: no clipping, as published."""
    on_nonfinite: str = setting("stop", identity=False, choices=("stop", "skip"))
    """If a loss is not finite: stop, or skip its step (ten in a row stop the run)."""
    device: str = setting("auto", identity=False)
    """auto, cuda, cpu, ..."""
    devices: int | None = setting(None, identity=False, unit="ranks", auto=True, least=1)
    """Processes on each machine; auto: one for every visible GPU, one on a CPU."""
    num_nodes: int = setting(1, identity=False, unit="machines", least=1)
    """Machines of a Ray cluster, with --address. Ranks of torchrun and srun need no flag."""
    address: str | None = setting(None, identity=False)
    """The Ray cluster that starts the ranks."""
    parallel: str = setting("ddp", identity=False, choices=("ddp", "fsdp"))
    """Each rank holds all weights (ddp), or a share of them (fsdp)."""
    max_restarts: int = setting(3, identity=False, unit="times", least=0)
    """How often all ranks restart from the last checkpoint after one crashed."""

    # Reading and saving
    num_workers: int | None = setting(None, identity=False, unit="processes", auto=True, least=0)
    """Loader workers of each rank; auto: its share of the cores but one, as memory allows."""
    local: str | None = setting(None, identity=False)
    """Folder on a fast disk, to which whole shards are copied before they are read."""
    cache_limit: str | None = setting(None, identity=False, unit="bytes")
    """Most that --local may hold, such as 200GB; at least one window."""
    save_every: int | None = setting(None, identity=False, unit="steps", auto=True, least=1)
    """Steps between checkpoints; auto: an epoch's end, unless one is younger than 2 minutes."""
    save_minutes: float | None = setting(None, identity=False, unit="minutes", auto=True, above=0)
    """Minutes between checkpoints, at most; auto: 15, or 100 times what the last one took."""
    keep: int = setting(2, identity=False, unit="files", least=1)
    """Checkpoints kept."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)
        if self.objective not in OBJECTIVES and ":" not in self.objective:
            raise ConfigError(
                f"objective {self.objective!r}",
                expected="one of " + ", ".join(OBJECTIVES) + ", or package.module:Class",
                fix=nearest(self.objective, OBJECTIVES),
            )
        if not self.out or "://" in self.out:
            raise ConfigError(
                f"out {self.out!r}",
                expected="a folder: runs are kept on a disk",
                fix="--out runs/pretrain",
            )
        if "in_chans" in self.model_args and self.student_channels is None:
            raise ConfigError(
                f"model argument in_chans={self.model_args['in_chans']}",
                expected="which channels these are",
                fix=f"--student-channels 1-{self.model_args['in_chans']}",
            )
        if self.student_data is not None and self.student_channels is None:
            raise ConfigError(
                "student_data without student_channels",
                expected="which channels of these files the student sees",
                fix="--student-channels 1, or rgb,1 for the image's colours too",
            )
        if self.student_data is not None and self.on_growth == "move":
            raise ConfigError(
                "on_growth move with student_data",
                expected="keep: the files beside the images were read when the run began",
                fix="--out another folder, for a run of the store as it is now",
            )
        if (self.local is None) != (self.cache_limit is None):
            raise ConfigError(
                "one of local and cache_limit",
                expected="both, or neither",
                fix="--local FOLDER --cache-limit 200GB",
            )
        if self.cache_limit is not None:
            parse_bytes(self.cache_limit)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs {self.warmup_epochs} of {self.epochs} epochs",
                expected="less than the epochs",
            )
