"""Settings of the commands that use a finished network. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from milan.core.config_fields import check_fields, seed_setting, setting
from milan.errors import ConfigError
from milan.evaluation.config import EvaluationConfig


@dataclass(frozen=True)
class ImagesConfig:
    """Which images a command looks at, and where it runs."""

    data: str = setting("imagenet", identity=False)
    """Images, as extract-targets takes them; labels are not needed."""
    data_root: str | None = setting(None, identity=False)
    """Where data names are looked up."""
    split: str | None = setting(None, identity=False)
    """Which split of --data: train, validation, test, ..., or all; default: train, if any."""
    limit: int | None = setting(None, identity=False, unit="images", least=1)
    """Number of images to use."""
    student_data: str | None = setting(None, identity=False)
    """Of a network that sees files beside the images: the folder of these."""
    batch_size: int | None = setting(None, identity=False, unit="images", auto=True, least=1)
    """Images at once; auto: 64, for a detector 4."""
    num_workers: int | None = setting(None, identity=False, unit="threads", auto=True, least=1)
    """Decoding threads; auto: the cores, at most 16."""
    device: str = setting("auto", identity=False)
    """auto, cuda, cpu, ..."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)


@dataclass(frozen=True)
class PredictConfig(ImagesConfig):
    """What `milan predict` does."""

    checkpoint: str = "runs/pretrain/finetune"
    """Folder of a finished training for a task, or its .safetensors file."""
    devices: int | None = setting(None, identity=False, unit="ranks", auto=True, least=1)
    """Ranks on this machine; auto: one for each GPU."""
    out: str = "predictions.csv"
    """The table, .csv or .parquet. Beside it are the contact sheet (.png), the metrics (.json) and
    the rejected files (.bad-images.csv)."""
    score: float = setting(0.5, unit="share", least=0, most=1)
    """For a detector: smallest score of a box."""
    pictures: int = setting(24, unit="images", least=0)
    """Images on the contact sheet; 0: no sheet."""

    def beside(self, ending: str) -> Path:
        """A file beside the table, of the same name."""
        return Path(self.out).with_suffix(ending)


@dataclass(frozen=True)
class EmbedConfig(ImagesConfig):
    """What `milan embed` does."""

    checkpoint: str = setting("runs/pretrain", identity=False)
    """A run's folder, timm:NAME, another library's checkpoint, random (as timm initialises it), or
    teacher."""
    out: str = setting("embeddings.parquet", identity=False)
    """The file: .parquet, or .npy or .zarr with keys and labels beside it (rows.parquet)."""
    pooling: str = setting("mean", choices=("mean", "token", "patches"))
    """mean (of patches), token (the class token), or patches (all of them, not pooled)."""
    dtype: str = setting("float32", choices=("float32", "float16"))
    """Type of the numbers in the file."""
    crop_share: float = setting(0.875, unit="share", above=0, most=1)
    """Edge of the centre crop that is shown, as a share of the shorter edge (224 of 256)."""
    batch_size: int = setting(256, unit="images", least=1)
    """Images at once."""
    devices: int | None = setting(None, identity=False, unit="ranks", auto=True, least=1)
    """Ranks on this machine; auto: one for each GPU."""
    features: str | None = setting(None, identity=False)
    """Folder where pooled features are kept, for evaluations too; default: frozen_features/ in the
    run's folder. Patches are kept beside --out until it is whole."""
    like: str | None = setting(None, identity=False)
    """With random: the run or timm:NAME whose encoder's shape is taken."""
    model: str = setting("vit_base_patch16_224", identity=False)
    """With random and no --like: a ViT of timm."""
    seed: int = seed_setting()
    """Seed of random weights and of --limit."""
    teacher: str | None = None
    """With checkpoint teacher: its name or config, as in extract-targets."""
    pretrained: str | None = setting(None, auto=True)
    """With checkpoint teacher: its weights, as in extract-targets."""
    teacher_norm: str | None = setting(None, auto=True)
    """With checkpoint teacher: imagenet, own or auto, as in extract-targets."""

    def evaluation(self) -> EvaluationConfig:
        """The same for what computes features."""
        names = (
            "checkpoint", "data", "data_root", "split", "limit", "batch_size", "num_workers",
            "device", "devices", "crop_share", "features", "like", "model", "seed", "teacher",
            "pretrained", "teacher_norm", "student_data",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        return EvaluationConfig(**given, pooling="both")  # --pooling takes its part of them


@dataclass(frozen=True)
class NeighboursConfig:
    """What `milan neighbours` does."""

    where: str = "targets.zarr"
    """A store (its class tokens of view 0 are compared), or a file of milan embed."""
    query: str | None = None
    """An image: its row, its key, or a file with the same bytes."""
    out: str | None = None
    """The sheet (.png); with --duplicates the list (.csv, .parquet). Default: neighbours.png,
    duplicates.csv."""
    images: int = setting(11, unit="images", least=1)
    """Number of nearest images."""
    duplicates: bool = False
    """List all pairs of images that are nearly the same."""
    threshold: float = setting(0.95, unit="cosine", above=0, most=1)
    """With --duplicates: smallest cosine of a pair."""
    layer: str | None = None
    """Layer of a store that has several."""
    data_root: str | None = None
    """Where the images are, if not where the store or the file says."""
    device: str = "auto"
    """auto, cuda, cpu, ...; one only."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)
        if self.duplicates == (self.query is not None):
            raise ConfigError(
                f"an image ({self.query}) and --duplicates"
                if self.duplicates
                else "no image to find the neighbours of",
                expected="an image's row, key or file, or --duplicates for all pairs",
                fix=f"milan neighbours {self.where} " + ("--duplicates" * self.duplicates or "0"),
            )

    @property
    def path(self) -> Path:
        """Where the answer goes."""
        return Path(self.out or ("duplicates.csv" if self.duplicates else "neighbours.png"))
