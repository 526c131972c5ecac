"""What is exported: a network of timm, in eval mode, and what is known of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from milan.core.size import Size, height_width
from milan.errors import ConfigError
from milan.models.classifier import CLASSIFIER, POOLING, load_classifier
from milan.models.encoder import create_vit
from milan.models.export import CHANNELS, ENCODER, load_encoder, pools_mean, read_about
from milan.models.layouts import State
from milan.models.weights import find_weights, is_foreign, resampled
from milan.training.trained import load_student

_OTHERS = ("segmenter.safetensors", "detector.safetensors")


@dataclass(frozen=True)
class Source:
    """A network to export."""

    network: Any
    """A VisionTransformer of timm on the CPU, in eval mode, for images of `size`."""
    model: str
    """Its name in timm."""
    args: dict[str, Any]
    """Its arguments, pooling among them, without size and classes."""
    size: Size
    trained_size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_share: float
    """Centre crop shown, as a share of the shorter edge."""
    about: dict[str, Any]
    """What its file says of its origin."""
    folder: Path | None
    """The run's, if it is a run."""
    classes: tuple[str, ...] = ()
    """Of a classifier, in the order of its outputs; empty: an encoder."""
    said: str = ""
    """How a checkpoint of others was read, in a line."""
    decoder: State = field(default_factory=dict)
    """The student's, where the run has it."""

    @property
    def state(self) -> State:
        """Its weights under timm's names."""
        return {k: v.detach().contiguous() for k, v in self.network.state_dict().items()}

    @property
    def channels(self) -> str:
        """What it sees in place of RGB, as --student-channels has it; empty: RGB."""
        spelled = (self.about.get(CHANNELS) or {"spelled": "rgb"})["spelled"]
        return "" if spelled == "rgb" else spelled

    @property
    def input(self) -> str:
        """What its input is, in words."""
        height, width = height_width(self.size)
        if not self.channels:
            return f"float32 [B, 3, {height}, {width}], RGB, (pixel / 255 - mean) / std"
        count = self.network.patch_embed.proj.in_channels
        what = f"channels {self.channels} of the files, (sample - mean) / std"
        return f"float32 [B, {count}, {height}, {width}], {what}"

    @property
    def averages(self) -> bool:
        """Whether its vector is the mean of patches; else it is the class token."""
        return self.network.global_pool == "avg"


def open_source(checkpoint: str, size: int | None) -> Source:
    """The network of a run or of a checkpoint of others, for images of `size`; default: its own.

    Raises ConfigError and CacheError as those who read it do.
    """
    path = Path(checkpoint)
    if is_foreign(checkpoint) or checkpoint.startswith("timm:"):
        weights = find_weights(checkpoint, flag="RUN", model="vit_base_patch16_224")
        vit = create_vit(weights.model, img_size=weights.size, args=weights.args)
        vit.load_state_dict(weights.encoder)
        about = {"model": weights.model, "model_args": weights.args, "input_size": weights.size,
                 "mean": weights.mean, "std": weights.std}  # fmt: skip
        return _source(
            vit, about, size, folder=None, said=weights.said, decoder=weights.decoder or {}
        )
    if path.is_dir() and not (path / ENCODER).exists():
        other = next((name for name in _OTHERS if (path / name).exists()), None)
        if other and not (path / CLASSIFIER).exists():
            raise ConfigError(
                f"{path} holds a {other.partition('.')[0]}, which no other library opens",
                expected="a pretraining or a fine-tuning",
                fix="milan export of the run that it started from",
            )
    file = path / CLASSIFIER if path.is_dir() else path
    if file.is_file() and "classes" in read_about(file):
        vit = load_classifier(path)
        return _source(vit, read_about(file), size, folder=file.parent)
    vit, about = load_encoder(path), read_about(path)
    folder = path if path.is_dir() else path.parent
    return _source(vit, about, size, folder=folder, decoder=_decoder(folder, about))


def _decoder(folder: Path, about: dict[str, Any]) -> State:
    """The decoder of a run that predicts one teacher's features, if its checkpoint is there."""
    if (
        about.get("objective") != "milan"
        or "teachers" in about
        or not (folder / "checkpoints").is_dir()
    ):
        return {}
    with suppress(ConfigError):  # it predicts relations of tokens
        return load_student(folder).student.decoder.state_dict()
    return {}


def _source(
    trained: Any, about: dict[str, Any], size: int | None, *, folder: Path | None, said: str = "",
    decoder: State | None = None,
) -> Source:  # fmt: skip
    args = {k: v for k, v in about["model_args"].items() if k not in ("img_size", "num_classes")}
    classes = tuple(about.get("classes", ()))
    if classes:
        args["global_pool"] = POOLING[about["pooling"]]
    elif "objective" in about and "global_pool" not in args:
        # The norm stays where training had it: before the average.
        mean = pools_mean(about) or trained.cls_token is None
        args |= {"global_pool": "avg", "fc_norm": False} if mean else {"global_pool": "token"}
    own = about["input_size"]
    vit = create_vit(about["model"], img_size=size or own, args=args, any_channels=True)
    if classes:
        vit.reset_classifier(len(classes))
    vit.load_state_dict(resampled(trained.state_dict(), vit, own))
    return Source(
        vit.eval().requires_grad_(False), about["model"], args, size or own, own,
        tuple(about["mean"]), tuple(about["std"]), about.get("crop_share", 0.875), about, folder,
        classes, said, decoder if decoder and (size or own) == own else {},
    )  # fmt: skip


def example(source: Source, count: int = 2) -> torch.Tensor:
    """Images [count, channels, H, W] of noise, as the network sees them."""
    generator = torch.Generator().manual_seed(0)
    channels = source.network.patch_embed.proj.in_channels
    return torch.randn(count, channels, *height_width(source.size), generator=generator)
