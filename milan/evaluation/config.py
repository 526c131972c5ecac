"""Settings of the evaluation protocols, and those that they share. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from milan.core.config_fields import check_choice, check_fields, names_in, seed_setting, setting
from milan.core.config_resolver import load_recipe
from milan.core.size import Size, as_size
from milan.core.units import parse_bytes
from milan.errors import ConfigError


@dataclass(frozen=True)
class LabelledConfig:
    """Settings of all that learns from labelled images: which encoder and images, results where."""

    checkpoint: str = setting("runs/pretrain", identity=False, several=True)
    """A run's folder, timm:NAME, another library's checkpoint, random (as timm initialises it), or
    teacher (only frozen features are measured). Several, with commas between, make one table."""
    data: str = setting("imagenet", identity=False)
    """Labelled images to fit on."""
    val_data: str | None = setting(None, identity=False)
    """Labelled images to measure on; default: a fifth of --data, by seed."""
    data_root: str | None = setting(None, identity=False)
    """Where data names are looked up."""
    split: str | None = setting(None, identity=False)
    """Which split of --data: train, validation, test, ..., or all; default: train, if any."""
    val_split: str | None = setting(None, identity=False)
    """Which split of --val-data; default: validation, else test, if any."""
    out: str | None = setting(None, identity=False)
    """File for the metrics (JSON); default: linear_probe.json and the like in the run's folder.
    With several checkpoints it has their table: JSON, or CSV if it ends in .csv."""
    like: str | None = setting(None, identity=False)
    """With random: the run, timm:NAME or checkpoint whose encoder's shape is taken; default: the
    first that is measured beside it, else --model."""
    model: str = setting("vit_base_patch16_224", identity=False)
    """A ViT of timm: with random but no --like, and for published weights."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: --set model.embed_dim=128."""
    crop_share: float = setting(0.875, unit="share", above=0, most=1)
    """Edge of the centre crop that is shown, as a share of the shorter edge (224 of 256)."""
    batch_size: int = setting(256, unit="images", least=1)
    """Images at once."""
    num_workers: int | None = setting(None, identity=False, unit="threads", auto=True, least=1)
    """Decoding threads; auto: the cores, at most 16."""
    limit: int | None = setting(None, identity=False, unit="images", least=1)
    """Number of images to use of each set."""
    student_data: str | None = setting(None, identity=False)
    """Of an encoder that sees files beside the images: the folder of those of --data."""
    val_student_data: str | None = setting(None, identity=False)
    """The folder of those of --val-data."""
    device: str = setting("auto", identity=False)
    """auto, cuda, cpu, ..."""
    devices: int | None = setting(None, identity=False, unit="ranks", auto=True, least=1)
    """Ranks on this machine; auto: one for each GPU."""
    seed: int = seed_setting()
    """Seed of random weights and of the splits."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)
        if self.out and Path(self.out).is_dir():
            raise ConfigError(
                f"out {self.out} is a folder",
                expected="a file for the metrics (JSON)",
                fix=f"--out {Path(self.out) / 'metrics.json'}",
            )

    @property
    def folder(self) -> Path:
        """Of what evaluations of the checkpoint leave: the run's, else runs/<checkpoint>."""
        name, folder = self.checkpoint, Path(self.checkpoint)
        if name in ("random", "teacher") or name.startswith("timm:"):  # never paths
            return Path("runs") / name.replace(":", "-")
        if name.partition(":")[0] == "published":
            file = name.partition(":")[2]
            return Path(f"runs/published-{Path(file).stem}" if file else "runs/published")
        if folder.is_file() and folder.suffix != ".safetensors":  # of others: not where it lies
            return Path("runs") / folder.name.partition(".")[0]
        return folder.parent if folder.is_file() else folder

    @property
    def checkpoints(self) -> list[str]:
        """The name of each."""
        return names_in(self.checkpoint)

    @property
    def _like(self) -> str | None:
        """What a random encoder has its shape from: what it is measured beside, unless said."""
        if self.like or self.model_args or self.model != LabelledConfig.model:
            return self.like
        return next((n for n in self.checkpoints if n not in ("random", "teacher")), None)

    def each(self) -> list[Self]:
        """These settings for each checkpoint, checked. Raises ConfigError, also if one is twice."""
        names = self.checkpoints
        if len(names) == 1:
            self.check()
            return [self]
        configs = [replace(self, checkpoint=name, out=None, like=self._like) for name in names]
        folders: dict[Path, str] = {}
        for config in configs:
            config.check()
            place = config.folder.resolve()
            if place in folders:
                raise ConfigError(
                    f"checkpoints {folders[place]} and {config.checkpoint} are the same, or leave "
                    f"their metrics in the same folder, {config.folder}",
                    expected="each checkpoint once",
                    fix=f"--checkpoint {folders[place]}, and a line of its own with --out for "
                    f"{config.checkpoint}"
                    if folders[place] != config.checkpoint
                    else f"--checkpoint {','.join(dict.fromkeys(names))}",
                )
            folders[place] = config.checkpoint
        return configs


@dataclass(frozen=True)
class ClassificationConfig(LabelledConfig):
    """Settings of what learns classes: of which of the training images, and how it is measured."""

    fraction: float | None = setting(None, identity=False, unit="share", above=0, below=1)
    """Train on this share of each class's images, at least one."""
    shots: int | None = setting(None, identity=False, unit="images", least=1)
    """Train on this many images of each class."""
    draws: int = setting(1, identity=False, unit="draws", least=1, most=30)
    """Number of draws of --fraction or --shots: each is learnt from, metrics are means over
    them."""
    first_draw: int = setting(0, identity=False, unit="number", least=0)
    """The number of the first draw."""
    train_list: str | None = setting(None, identity=False, several=True)
    """Train only on the images named in this file, one a line. Several files are several draws."""
    save_lists: str | None = setting(None, identity=False)
    """Folder for the lists of images that were drawn: draw-0.txt, ..."""
    corruptions: bool = setting(False, identity=False)
    """Measure on corrupted validation images too: noise, blur, ..., at five severities. After
    fine-tuning on one device, otherwise on all."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super().check()
        chosen = {
            name: value
            for name in ("fraction", "shots", "train_list")
            if (value := getattr(self, name)) is not None
        }
        if len(chosen) > 1:
            raise ConfigError(
                " and ".join(f"{name} {value}" for name, value in chosen.items()),
                expected="one of them: each says which images are learnt from",
                fix=f"without --{list(chosen)[-1].replace('_', '-')}",
            )
        if self.draws > 1 and not chosen.keys() & {"fraction", "shots"}:
            raise ConfigError(
                f"draws {self.draws} without fraction or shots",
                expected="something to draw; each file of train_list is a draw by itself",
                fix="--shots 10",
            )
        if self.save_lists and not chosen:
            raise ConfigError(
                f"save_lists {self.save_lists} of all images", fix="--shots 10, or --fraction 0.01"
            )

    def each_draw(self) -> list[Self]:
        """These settings for each draw."""
        if self.train_list is not None:
            return [replace(self, train_list=name) for name in names_in(self.train_list)]
        return [replace(self, draws=1, first_draw=self.first_draw + i) for i in range(self.draws)]


@dataclass(frozen=True)
class EvaluationConfig(ClassificationConfig):
    """Settings of the protocols that look at features of a frozen network."""

    features: str | None = None
    """Folder where features are kept for the next evaluation (float32), or none; default:
    frozen_features/ in the run's folder."""
    pooling: str = setting("auto", choices=("auto", "both", "mean"))
    """Features of an image: both (class token and mean of patches), or mean. Auto: what the run's
    objective trained; both for other encoders."""
    baseline: str = setting("random", choices=("random", "none"))
    """What is measured for comparison: random (the same network as timm initialises it), or
    none."""
    memory: str | None = setting(None, auto=True)
    """Features that each rank keeps in memory between two passes, such as 8GB; the rest is read
    from disk again. Auto: half of a GPU's free memory, 1GB on a CPU."""
    teacher: str | None = None
    """A teacher to measure too: its name or config, as in extract-targets."""
    pretrained: str | None = setting(None, auto=True)
    """The teacher's weights, as in extract-targets."""
    teacher_norm: str | None = setting(None, auto=True)
    """The teacher's normalisation: imagenet, own or auto, as in extract-targets."""

    @property
    def checkpoints(self) -> list[str]:
        """The name of each; a teacher that is named is one of them."""
        names = names_in(self.checkpoint)
        return [*names, "teacher"] if self.teacher and "teacher" not in names else names

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super().check()
        if self.memory is not None:
            parse_bytes(self.memory)

    def check_width(self, width: int) -> None:
        """Raises ConfigError if features of `width` channels do not go with the settings."""

    @property
    def feature_set(self) -> str:
        """Which features are looked at: a name of milan.evaluation.frozen.FEATURES."""
        return "pooled"

    @property
    def kept_bytes(self) -> int | None:
        """How many bytes of features of a data set are kept on disk; None: all, however many."""
        return None


@dataclass(frozen=True)
class LinearProbeConfig(EvaluationConfig):
    """What `milan linear-probe` does."""

    protocol: str = setting("logistic", choices=("logistic", "published", "dinov2"))
    """logistic: a converged logistic regression on standardised features; published: LARS on the
    normalised class token (MILAN, MAE); dinov2: the best of 13 learning rates, on the last block or
    the last 4, with the mean of patches or without."""
    epochs: int | None = setting(None, unit="epochs", auto=True, least=1)
    """Passes over the images. Auto: 100 with published (MAE: 90); with dinov2 as many as 12,500
    steps take (10 of ImageNet), at most 100."""
    step_images: int | None = setting(None, unit="images", auto=True, least=1)
    """Images of a step, over all devices; auto: with published 16384, or a 78th of the images, with
    dinov2 1024, or a 20th; at least 64."""
    lr: float | None = setting(None, unit="a step", auto=True, above=0)
    """Peak learning rate of published. Auto: 3.2, from a width of 1024 on 1.28 (MILAN's for ViT-B
    and ViT-L). MAE has 6.4."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range or without effect."""
        super().check()
        without_effect = {
            "logistic": ("epochs", "step_images", "lr"), "published": (), "dinov2": ("lr",)
        }[self.protocol]  # fmt: skip
        for name in without_effect:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} {getattr(self, name)} with protocol {self.protocol}, which has none",
                    fix="--protocol published",
                )

    @property
    def feature_set(self) -> str:
        """The last blocks for the grid of DINOv2."""
        return "blocks" if self.protocol == "dinov2" else "pooled"


@dataclass(frozen=True)
class AttentiveProbeConfig(EvaluationConfig):
    """What `milan attentive-probe` does."""

    queries: str = setting("class", choices=("class", "one"))
    """class: a learnt query and a weight vector for each class; one: a single learnt query."""
    heads: int | None = setting(None, unit="heads", auto=True, least=1)
    """Heads of the single query; each has a share of the channels. Auto: 4."""
    tokens: str = setting("patches", choices=("patches", "all"))
    """What queries look at: patches, or all (the class token too, if there is one)."""
    epochs: int | None = setting(None, unit="epochs", auto=True, least=1)
    """Passes over the images; auto: as many as 12,500 steps take, at most 20."""
    step_images: int | None = setting(None, unit="images", auto=True, least=1)
    """Images of a step, over all devices; auto: 256, or a 78th of the images; at least 64."""
    keep: str = "20GB"
    """Largest size of the patches kept on disk for each network and set of images (float16). Larger
    ones are computed in every pass."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super().check()
        parse_bytes(self.keep)
        if self.heads is not None and self.queries == "class":
            raise ConfigError(
                f"heads {self.heads} with queries class, which have none", fix="--queries one"
            )
        if self.pooling != "auto":
            raise ConfigError(
                f"pooling {self.pooling}",
                expected="none: queries look at the patches",
                fix="without --pooling; --tokens all adds the class token",
            )

    def heads_of(self, width: int) -> int:
        """Heads of the single query for patches of `width` channels. Raises ConfigError."""
        heads = self.heads or 4
        if self.queries == "one" and width % heads:
            raise ConfigError(
                f"heads {heads} for patches of {width} channels",
                expected="a number that divides them",
                fix=f"--heads {max(h for h in range(1, heads) if width % h == 0)}",
            )
        return heads

    def check_width(self, width: int) -> None:
        """Raises ConfigError for heads that do not divide the channels."""
        self.heads_of(width)

    @property
    def feature_set(self) -> str:
        """Patches of the last block, or all its tokens."""
        return "patches" if self.tokens == "patches" else "tokens"

    @property
    def kept_bytes(self) -> int | None:
        """`keep` as a number."""
        return parse_bytes(self.keep)


@dataclass(frozen=True)
class FewShotConfig(LinearProbeConfig):
    """Settings of `milan few-shot`: the linear probe's, with other defaults."""

    shots: int | None = setting(10, identity=False, unit="images", least=1)
    """Train on this many images of each class."""
    draws: int = setting(3, identity=False, unit="draws", least=1, most=30)
    """Number of draws: each is learnt from, metrics are means over them."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range, and other choices of images."""
        for name, draws in (("fraction", f" --draws {self.draws}"), ("train_list", "")):
            if self.shots is not None and (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"{name} {value} with few-shot, which draws {self.shots} images of each class",
                    expected="--shots, or the linear probe: they are the same otherwise",
                    fix=f"milan linear-probe --{name.replace('_', '-')} {value}{draws}",
                )
        super().check()


@dataclass(frozen=True)
class SupervisedConfig(LabelledConfig):
    """Settings of the protocols that train the encoder together with a new head."""

    section: ClassVar[str]
    """Of the parameter file and of recipes: the protocol's name."""

    recipe: str = setting("vit_base", identity=False)
    """A published recipe: it gives the defaults of all other settings. vit_base, vit_large."""
    size: int | None = setting(None, unit="pixels", auto=True, least=1)
    """Edge of the images, or their height; auto: the encoder's. Positions are resampled."""
    epochs: int = setting(100, unit="epochs", least=1)
    """Passes over the images."""
    warmup_epochs: float | None = setting(None, unit="epochs", auto=True, least=0)
    """Linear warm-up; auto: a twentieth of the epochs (5 of 100)."""
    batch_size: int = setting(1024, unit="images", least=1)
    """Images of a step, over all devices."""
    micro_batch: int | None = setting(None, identity=False, unit="images", auto=True, least=1)
    """Largest number of images on a device at once; auto: by the device."""
    lr: float | None = setting(None, unit="a step", auto=True, above=0)
    """Peak learning rate; auto: by the batch size, 4e-4 for 1024 images (MILAN)."""
    min_lr: float = setting(1e-6, unit="a step", least=0)
    """Learning rate at the end."""
    layer_decay: float = setting(0.65, unit="times", above=0, most=1)
    """Learning rate of a block, as a share of the next one's."""
    weight_decay: float = setting(0.05, unit="times lr", least=0)
    """AdamW's; none for biases, norms, positions and tokens."""
    drop_path: float = setting(0.1, unit="share", least=0, below=1)
    """Probability that the last block is skipped; earlier ones less."""
    hflip: float = setting(0.5, unit="share", least=0, most=1)
    """Probability that a training image is mirrored."""
    ema: float | None = setting(None, unit="share", least=0, below=1)
    """Decay of a moving average of the weights, such as 0.9999. The average is measured and
    kept."""
    clip_grad: float | None = setting(None, unit="norm", above=0)
    """Largest norm of a step's gradients; default: no clipping, as published."""
    precision: str = setting("auto", identity=False, choices=("auto", "fp32", "bf16", "fp16"))
    """fp32, bf16, fp16; auto: bf16 or fp16 on CUDA, else fp32."""
    tf32: bool = setting(True, identity=False)
    """Multiply float32 in TF32 if precision is fp32 on CUDA; sums stay float32."""
    compile: str = setting("auto", identity=False, choices=("auto", "on", "off"))
    """torch.compile the network; auto: on CUDA, and without it if that fails."""
    num_workers: int | None = setting(None, identity=False, unit="processes", auto=True, least=0)
    """Loader workers of each rank; auto: its share of the cores but one."""
    report_to: str = setting("tensorboard", identity=False)
    """Trackers, with commas between: tensorboard, wandb, mlflow; or none."""
    log_every: int = setting(10, identity=False, unit="steps", least=1)
    """Steps between lines of the log."""
    max_restarts: int = setting(3, identity=False, unit="times", least=0)
    """How often all ranks restart from the last checkpoint after one crashed."""
    overwrite: bool = setting(False, identity=False)
    """Replace a run of other settings."""
    baseline: str = setting("random", identity=False, choices=("random", "none"))
    """What is trained afterwards for comparison: random (the same network as timm initialises it,
    in as many hours again), or none."""

    def __post_init__(self) -> None:
        # The run's folder lies beside its metrics: one may name the folder.
        if self.out and not self.out.endswith(".json"):
            object.__setattr__(self, "out", f"{self.out.rstrip('/')}.json")

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super().check()
        if self.checkpoint == "teacher" and not self.takes_teacher:
            raise teacher_refused()
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"warmup_epochs {self.warmup_epochs} of {self.epochs} epochs",
                expected="less than the epochs",
                fix="--warmup-epochs auto",
            )

    @property
    def takes_teacher(self) -> bool:
        """Whether the checkpoint may be the teacher."""
        return False

    @property
    def run(self) -> Path:
        """The folder of the run: beside its metrics, without .json."""
        return Path(self.out).with_suffix("") if self.out else self.folder / self.section

    @property
    def image_size(self) -> Size | None:
        """The size of the images that is asked for; None: the encoder's."""
        return self.size


def teacher_refused() -> ConfigError:
    """The error for a teacher that would be trained."""
    return ConfigError(
        "checkpoint teacher: its network is not trained here",
        expected="a run, a checkpoint, timm:NAME, published[:FILE] or random",
        fix="--checkpoint FOLDER, where config.json and weights of the teacher are, or "
        "timm:vit_base_patch16_clip_224.openai, the published one",
    )


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig, ClassificationConfig):
    """What `milan finetune` does; defaults are the published ViT-B/16 recipe (MILAN)."""

    section = "finetune"

    width: int | None = setting(None, unit="pixels", auto=True, least=1)
    """Width of the images, with --size their height; auto: as --size."""
    pooling: str = setting("mean", choices=("mean", "token"))
    """What the head sees: the mean of patches, or the class token."""
    scale: tuple[float, float] = setting((0.08, 1.0), unit="share", above=0, most=1)
    """Area of a training crop, as a share of the image."""
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, AugMix or AutoAugment as timm names policies; none."""
    erasing: float = setting(0.25, unit="share", least=0, most=1)
    """Probability that a rectangle of a training image is replaced by noise."""
    mixup: float = setting(0.8, unit="alpha", least=0)
    """Mixup of pairs of training images; 0: none. If there is cutmix too, each half of the time."""
    cutmix: float = setting(1.0, unit="alpha", least=0)
    """CutMix; 0: none."""
    smoothing: float = setting(0.1, unit="share", least=0, below=1)
    """Label smoothing."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super().check()
        if self.scale[0] > self.scale[1]:
            raise ConfigError(
                f"scale {self.scale[0]:g} {self.scale[1]:g}",
                expected="the smaller share first",
                fix=f"--scale {self.scale[1]:g} {self.scale[0]:g}",
            )
        if self.width and not self.size:
            raise ConfigError(
                f"width {self.width} without size",
                expected="height and width of the images",
                fix=f"--size {self.width} --width {self.width}",
            )

    @property
    def image_size(self) -> Size | None:
        """The size of the images that is asked for; None: the encoder's."""
        return as_size((self.size, self.width or self.size)) if self.size else None


@dataclass(frozen=True)
class DetectConfig(SupervisedConfig):
    """What `milan detect` does; defaults are ViTDet's for ViT-B (arXiv 2203.16527)."""

    section = "detect"

    data: str = setting("coco", identity=False)
    """Images with COCO's JSON in the folder or in its annotations/, or the JSON."""
    annotations: str | None = setting(None, identity=False)
    """COCO's JSON of the images to train on, if not in the folder of --data."""
    val_data: str | None = setting(None, identity=False)
    """Images to measure on, with their JSON; default: the validation images of --data, else a
    fifth by seed."""
    val_annotations: str | None = setting(None, identity=False)
    """COCO's JSON of --val-data, if it is elsewhere."""
    masks: str = setting("auto", choices=("auto", "none"))
    """auto (train masks too, if the annotations have them), or none (boxes only)."""
    size: int | None = setting(None, unit="pixels", auto=True, least=1)
    """Edge of the square that images are scaled and padded to; auto: 1024. Positions are
    resampled."""
    warmup_epochs: float | None = setting(0.14, unit="epochs", auto=True, least=0)
    """Linear warm-up; auto: a twentieth of the epochs. As published 250 of 184,375 steps."""
    batch_size: int = setting(64, unit="images", least=1)
    """Images of a step, over all devices."""
    lr: float | None = setting(None, unit="a step", auto=True, above=0)
    """Peak learning rate; auto: by the batch size, 1e-4 for 64 images."""
    schedule: str = setting("steps", choices=("steps", "cosine"))
    """Learning rate: a tenth after 89 % and a hundredth after 96 % of the run (steps), or half a
    cosine."""
    layer_decay: float = setting(0.7, unit="times", above=0, most=1)
    """Learning rate of a block, as a share of the next one's."""
    weight_decay: float = setting(0.1, unit="times lr", least=0)
    """AdamW's; none for biases, norms and positions."""
    compile: str = setting("auto", identity=False, choices=("auto", "off"))
    """Not used: each image has another number of regions."""
    scale: tuple[float, float] = setting((0.1, 2.0), unit="times", above=0)
    """Smallest and largest factor by which training images are scaled; what is larger is
    cropped."""
    window: int = setting(14, unit="patches", least=0)
    """Edge of the windows in which all but four blocks attend; 0: every block sees the image."""
    width: int = setting(256, unit="channels", least=8)
    """Width of the feature pyramid and the heads."""
    anchor_scale: float = setting(8.0, unit="strides", above=0)
    """Edge of the anchors on each level of the pyramid (strides 4 to 64): 8 is 32 to 512 pixels."""
    proposals: int = setting(1000, unit="regions", least=1)
    """Largest number of regions of an image that the box head looks at."""
    samples: int = setting(512, unit="regions", least=1)
    """Number of regions of an image that the box head learns from."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super().check()
        if self.scale[0] > self.scale[1]:
            raise ConfigError(
                f"scale {self.scale[0]:g} {self.scale[1]:g}",
                expected="the smaller factor first",
                fix=f"--scale {self.scale[1]:g} {self.scale[0]:g}",
            )
        if self.crop_share != DetectConfig.crop_share:
            raise ConfigError(
                f"crop_share {self.crop_share:g}",
                expected="none: whole images are measured",
                fix="without --crop-share",
            )


@dataclass(frozen=True)
class ZeroShotConfig(LabelledConfig):
    """Settings of classification by words alone. All images of --val-data are measured, else of
    --data, for nothing is fitted."""

    data: str = setting("imagenet", identity=False)
    """Labelled images, measured where --val-data is not given."""
    val_data: str | None = setting(None, identity=False)
    """Labelled images to measure on; default: those of --data."""
    cache: str | None = None
    """Store with the texts of classes; default: the one that the run was trained on. If it has
    none, the teacher's text tower computes them."""
    layer: str | None = None
    """With several teachers in a run, or layers in a store: the one whose features are compared;
    default: the first."""
    teacher: str | None = None
    """A teacher to measure too; its text tower computes the texts of classes that the store lacks.
    Default: the store's, if its weights are at hand."""
    pretrained: str | None = setting(None, auto=True)
    """The teacher's weights, as in extract-targets."""
    teacher_norm: str | None = setting(None, auto=True)
    """The teacher's normalisation: imagenet, own or auto, as in extract-targets."""
    templates: str = setting("stored", choices=("stored", "openai"))
    """Sentences for a class: stored (the 7 that stores have), or openai (the 80 of OpenAI's CLIP,
    which need a text tower: the student's own or the teacher's)."""
    pictures: int = setting(6, unit="classes", least=0, most=12)
    """Classes in the picture of dense maps, with one image of each; 0: no picture."""


@dataclass(frozen=True)
class SegmentConfig(SupervisedConfig):
    """What `milan segment` does; numbers that are not given are the published ones of `protocol`
    (milan/recipes: segment_linear, segment_upernet)."""

    section = "segment"

    checkpoint: str = setting("runs/pretrain", identity=False, several=True)
    """A run's folder, timm:NAME, another library's checkpoint, or random (as timm initialises it);
    with protocol linear also teacher."""
    data: str = setting("ade20k", identity=False)
    """A folder with images and masks in it, or Parquet files with both."""
    val_data: str | None = setting(None, identity=False)
    """Images with masks to measure on; default: a fifth of --data, by seed."""
    crop_share: float = setting(0.875, unit="share", above=0, most=1)
    """Not used: whole images are measured."""
    protocol: str = setting("linear", choices=("linear", "upernet"))
    """linear: BatchNorm and a 1x1 convolution on the frozen encoder (DINOv3); upernet: UPerNet's
    decoder on blocks 4, 6, 8 and 12, all weights trained (MILAN, MAE)."""
    masks: str | None = setting(None, identity=False, auto=True)
    """Folder of the masks, beside images in --data; auto: annotations, masks or labels."""
    mask_column: str = setting("mask", identity=False)
    """Column of the masks in Parquet files."""
    classes: str | None = setting(None, identity=False)
    """Text file with the names of classes, one a line, class 0 first; default: numbers."""
    palette: str | None = setting(None, identity=False)
    """Text file with the meaning of the masks' colours, one a line: red green blue name."""
    ignore: int = setting(255, unit="number", least=-1)
    """Value of mask pixels that do not count; -1: none."""
    reduce_zero_label: bool = False
    """Pixels of value 0 do not count, and 1 is the first class (ADE20K)."""
    size: int | None = setting(None, unit="pixels", auto=True, least=1)
    """Height of crops and windows; auto: 512, or the next multiple of the patch."""
    width: int | None = setting(None, unit="pixels", auto=True, least=1)
    """Width of crops and windows; auto: their height."""
    scale: tuple[float, float] = setting((0.5, 2.0), unit="times", above=0)
    """Smallest and largest size of training images, as multiples of the smallest that a crop fits
    in."""
    compile: str = setting("auto", identity=False, choices=("auto", "off"))
    """Not used: heads have BatchNorm, whose statistics a trial would change."""
    distortion: float = setting(0.5, unit="share", least=0, most=1)
    """Probability of each change of brightness, contrast, saturation and hue."""
    channels: int | None = setting(None, unit="numbers", auto=True, least=1)
    """Width of UPerNet's decoder; auto: the encoder's."""
    auxiliary: float = setting(0.4, unit="times", least=0)
    """Weight of the loss of UPerNet's auxiliary classifier."""
    epochs: int | None = setting(None, unit="epochs", auto=True, least=1)  # type: ignore[assignment]
    """Passes over the images; auto: 32 (linear), 127 (upernet)."""
    batch_size: int | None = setting(None, unit="images", auto=True, least=1)  # type: ignore[assignment]
    """Images of a step, over all devices; auto: 16."""
    lr: float | None = setting(None, unit="a step", auto=True, above=0)
    """Peak learning rate; auto: by the batch size, for 16 images 1e-3 (linear), 1e-4 (upernet)."""
    warmup_epochs: float | None = setting(None, unit="epochs", auto=True, least=0)
    """Linear warm-up; auto: 1.2 of the published epochs, less of fewer."""
    min_lr: float | None = setting(None, unit="a step", auto=True, least=0)  # type: ignore[assignment]
    """Learning rate at the end; auto: 0."""
    layer_decay: float | None = setting(None, unit="times", auto=True, above=0, most=1)  # type: ignore[assignment]
    """Learning rate of a block, as a share of the next one's; auto: 0.65 (upernet)."""
    weight_decay: float | None = setting(None, unit="times lr", auto=True, least=0)  # type: ignore[assignment]
    """AdamW's; auto: 1e-3 (linear), 0.05 (upernet)."""
    drop_path: float | None = setting(None, unit="share", auto=True, least=0, below=1)  # type: ignore[assignment]
    """Probability that the last block is skipped; auto: 0.1 (upernet)."""
    teacher: str | None = setting(None, identity=False)
    """With checkpoint teacher: its name or config, as in extract-targets."""
    pretrained: str | None = setting(None, identity=False, auto=True)
    """With checkpoint teacher: its weights, as in extract-targets."""
    teacher_norm: str | None = setting(None, identity=False, auto=True)
    """With checkpoint teacher: imagenet, own or auto, as in extract-targets."""

    @property
    def takes_teacher(self) -> bool:
        """A frozen encoder may be any."""
        return self.protocol == "linear"

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        super(SegmentConfig, self.published()).check()
        if self.scale[0] > self.scale[1]:
            raise ConfigError(
                f"scale {self.scale[0]:g} {self.scale[1]:g}",
                expected="the smaller number first",
                fix=f"--scale {self.scale[1]:g} {self.scale[0]:g}",
            )
        if self.crop_share != SegmentConfig.crop_share:
            raise ConfigError(
                f"crop_share {self.crop_share:g}",
                expected="none: whole images are measured",
                fix="without --crop-share",
            )

    @property
    def run(self) -> Path:
        """The folder of the run: of each protocol its own, or beside its metrics."""
        own = self.folder / self.section / self.protocol
        return Path(self.out).with_suffix("") if self.out else own

    def recipe_values(self) -> dict[str, Any]:
        """field -> the published value. Raises ConfigError."""
        check_choice("protocol", self.protocol, ("linear", "upernet"))
        return load_recipe(SegmentConfig, self.recipe, f"segment_{self.protocol}")

    def published(self) -> SegmentConfig:
        """With the published numbers where none are given. Raises ConfigError."""
        values = self.recipe_values()
        batch, epochs = self.batch_size or values["batch_size"], self.epochs or values["epochs"]
        values |= {
            "lr": values["lr"] * batch / values["batch_size"],
            "warmup_epochs": values["warmup_epochs"] * epochs / values["epochs"],
        }
        missing = {name: v for name, v in values.items() if getattr(self, name) is None}
        return replace(self, **missing)
