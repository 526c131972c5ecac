"""The settings of `milan extract-targets`. Flags and help are made of it: no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from milan.core.config_fields import check_fields, seed_setting, setting
from milan.core.size import Size, as_size
from milan.errors import ConfigError

if TYPE_CHECKING:
    from milan.images.views import ViewSpec


@dataclass(frozen=True)
class ExtractConfig:
    """The settings of `milan extract-targets`; the fields are its flags."""

    data: str
    """A path, a URL (s3://…), or a name below --data-root, else $MILAN_DATA, else ./data."""
    out: str = "targets.zarr"
    """The store: a path, or s3://bucket/name.zarr."""
    data_root: str | None = None
    """Where data names are looked up."""
    split: str | None = None
    """Which split of the data: train, validation, test, ..., or all; default: train, if any."""
    teacher: str = "ViT-B-16-quickgelu"
    """An open_clip name, timm:NAME, hf-hub:…, local-dir:…, timm:local-dir:… (a folder that `milan
    export --format timm` wrote), or a model config (JSON)."""
    pretrained: str | None = setting(None, auto=True)
    """The teacher's weights: a tag, a file, or none (random weights, and the store says so). Auto:
    the model's own, for the default teacher and timm: models."""
    teacher_norm: str | None = setting(None, auto=True)
    """Normalisation of pixels: imagenet, or own (the teacher's). Auto: own, but imagenet for the
    default teacher, as published."""
    teacher_layer: int | None = setting(None, unit="block", least=1)
    """Store the tokens of this block of the teacher, from 1, before norm and projection; default:
    the teacher's output."""
    img_size: int | None = setting(None, unit="pixels", auto=True, least=1, most=4096)
    """Edge of a view, or its height; auto: the teacher's."""
    img_width: int | None = setting(None, unit="pixels", auto=True, least=1, most=4096)
    """Width of a view; auto: its height."""
    views: int = setting(4, unit="views", least=1, most=10_000)
    """K, views of each image."""
    scale: tuple[float, float] = setting((0.2, 1.0), unit="share", above=0, most=1)
    """Smallest and largest area of a crop, as a share of the image."""
    ratio: tuple[float, float] | None = setting(None, unit="ratio", above=0)
    """Smallest and largest width / height of a crop; default: 3/4 and 4/3 of the view's own."""
    hflip: float = setting(0.5, unit="probability", least=0, most=1)
    """Probability of a horizontal flip."""
    bands: tuple[int, int, int] | None = setting(None, unit="number", least=1)
    """The channels that are red, green and blue, in files that have more, such as 4 3 2."""
    band_range: tuple[float, float] | None = setting(None, unit="of a sample")
    """With --bands: the samples that become 0 and 255 in every image, such as 0 3000."""
    codec: str = "int8"
    """int8 (1 byte a channel), float16 (2 bytes), or pq:16 ... pq:128 (bytes a token)."""
    store_views: str = "none"
    """Store the rendered views too: none, jpeg:95 or webp. Training then needs no original
    images."""
    texts: bool = False
    """Store the teacher's text features of captions and classes too."""
    targets: str = setting("teacher", choices=("teacher", "none"))
    """teacher, or none: store views and token ids of captions only, for --objective rils. Then
    --teacher names the tokenizer, and no weights are needed."""
    captions: int | None = setting(None, unit="captions", auto=True, least=1, most=64)
    """With --targets none: captions stored of each image, the first ones; auto: as many as any
    image has."""
    min_cosine: float | None = setting(None, unit="cosine", least=-1, most=1)
    """Smallest mean cosine allowed between stored and teacher features; below it nothing is
    written."""
    extend: bool = False
    """Add the targets of another teacher or codec to an existing store."""
    drop_missing: bool = False
    """Leave out stored images that were deleted from the data; nothing is rewritten."""
    executor: str = setting("auto", choices=("auto", "ray", "local"))
    """ray, or local (the same work in this process); auto: local for one copy, else ray."""
    address: str | None = None
    """A running Ray cluster to join; default: $RAY_ADDRESS, else Ray on this machine."""
    replicas: int | None = setting(None, unit="copies", auto=True, least=1)
    """Copies of the teacher; auto: one per GPU, one on CPU."""
    num_workers: int | None = setting(None, unit="threads", auto=True, least=1)
    """Decoding threads of each copy; auto: its share of the cores, at most 16."""
    device: str = "auto"
    """auto, cuda, cpu, ..."""
    precision: str = "auto"
    """fp32, bf16, fp16; auto: fp16 on CUDA, as published, else fp32."""
    batch_size: int | None = setting(None, unit="views", auto=True, least=1)
    """Views in a forward pass of the teacher; auto: 256 on CUDA, else 64."""
    shard_size: int = setting(1024, unit="rows", least=1)
    """Rows of a block: the unit of work, of files and of resuming."""
    seed: int = seed_setting()
    """Seed of the order of rows and of the crops."""
    limit: int | None = setting(None, unit="images", least=1)
    """Number of images to use, the first of the shuffled order."""
    max_bad: str = setting("0", unit="images or %")
    """Rejected files allowed: a number, or a percentage such as 0.1%."""
    yes: bool = False
    """Do not ask before a store of more than 100 GB."""
    offline: bool = False
    """Never use the network."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)
        kind, _, quality = self.store_views.partition(":")
        if self.store_views not in ("none", "webp") and not (
            kind == "jpeg" and quality.isdecimal() and 1 <= int(quality) <= 100
        ):
            raise ConfigError(
                f"--store-views {self.store_views}", expected="none, webp, or jpeg:95 (1 to 100)"
            )
        if self.targets == "none" and self.teacher_layer is not None:
            raise ConfigError(
                f"--teacher-layer {self.teacher_layer} with --targets none",
                expected="a teacher that gives targets",
                fix="without one of the two",
            )
        allowed_bad(self.max_bad, 1)
        if self.img_width and not self.img_size:
            raise ConfigError(
                f"--img-width {self.img_width} without --img-size",
                expected="height and width of a view, as the teacher sees it",
                fix=f"--img-size 224 --img-width {self.img_width}",
            )
        if self.band_range and not self.bands:
            raise ConfigError(
                f"--band-range {' '.join(f'{x:g}' for x in self.band_range)} without --bands",
                expected="both, for files of more channels than a picture's",
                fix="--bands 4 3 2",
            )

    @property
    def view_size(self) -> Size | None:
        """The size of a view that is asked for, in pixels; None: the teacher's."""
        if self.img_size is None:
            return None
        return as_size((self.img_size, self.img_width or self.img_size))

    def view_spec(self, size: Size) -> ViewSpec:
        """The views that are drawn, of `size` pixels. Raises ConfigError."""
        from milan.images.views import ViewSpec, ratio_for

        ratio = self.ratio or ratio_for(size)
        return ViewSpec(size, self.scale, ratio, self.hflip, self.seed, self.bands, self.band_range)


@dataclass(frozen=True)
class DoctorConfig(ExtractConfig):
    """The settings of `milan doctor`: those of an extraction, of which none is needed."""

    data: str = ""
    """A path, a URL (s3://…), or a name below --data-root; looked at if it is named."""


def allowed_bad(text: str, rows: int) -> int:
    """How many of `rows` files may be rejected by `--max-bad text`. Raises ConfigError."""
    text = str(text).strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                return int(share * rows)
        elif int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise ConfigError(f"--max-bad {text}", expected="a number such as 10, or a share such as 0.1%")
