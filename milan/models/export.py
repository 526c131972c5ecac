"""The encoder in the form others use: encoder.safetensors, which timm loads as it is.

The header says what is needed to use it (model, arguments, mean, std, input size) and where it
comes from. No pickles: nothing here can run code when it is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise

from milan.core.size import as_size, height_width
from milan.errors import CacheError
from milan.models.encoder import build_encoder
from milan.models.state_dict import check_fetched, unwrapped

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

ENCODER = "encoder.safetensors"
"""The file in a run's folder."""
CHANNELS = "channels"
"""What a file says of an encoder that sees other channels than pictures' RGB."""
_NO_TOKEN = ("pixels", "rils")
"""Objectives whose loss does not see the class token."""
_NEEDED = {"model", "model_args", "mean", "std", "input_size"}


def save_encoder(path: Path, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write the weights of an encoder (`whole_weights`) with what is needed to use it.

    `about`: model (timm name), model_args, mean, std, input_size, and whatever tells its origin;
    kept as JSON strings in the header.
    """
    write_weights(path, weights, {k: json.dumps(v) for k, v in about.items()})


def write_weights(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all: the same bytes for the same weights."""
    data = serialise(weights, metadata=metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(_same_header(data))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _same_header(data: bytes) -> bytes:
    """A safetensors file with its header's keys in order.

    The library writes metadata in an order that changes from call to call; the same weights must
    be the same bytes, or DVC takes them for others.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)  # the format's alignment of what follows
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]


def load_whole(network: Any, file: Path, model: str) -> None:
    """Load all weights of a network from its file, of a ViT `model`. Raises CacheError."""
    try:
        network.load_state_dict(unwrapped(load_file(file)), strict=True)
    except (SafetensorError, RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise CacheError(f"{file} does not fit {model}: {first}") from None


def is_whole(file: Path) -> bool:
    """Whether a file of weights is there, as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def read_about(run: str | Path) -> dict[str, Any]:
    """What an encoder.safetensors (or the run that holds it) says of itself in its header."""
    path = encoder_file(run)
    check_fetched(path, CacheError)
    try:
        with safe_open(path, framework="pt") as file:
            about = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise CacheError(
            f"{path} is damaged: {error}",
            fix="the line of the training that wrote it: it writes it anew",
        ) from None
    if not about.keys() >= _NEEDED:
        raise CacheError(
            f"{path} was not written by milan", expected="an encoder of milan pretrain"
        )
    about["input_size"] = as_size(about["input_size"])
    if not isinstance(about.get(CHANNELS, {}), dict):  # version 1.0: of a segmenter, its width
        about["decoder_width"] = about.pop(CHANNELS)
    return about


def is_ours(path: Path) -> bool:
    """Whether a file says of itself what `save_encoder` writes; a damaged one may be."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).keys() >= _NEEDED
    except (SafetensorError, OSError):
        return path.name == ENCODER


def encoder_file(run: str | Path) -> Path:
    """The encoder of a run's folder, or the file itself. Raises CacheError if there is none."""
    path = Path(run)
    others = sorted(file.name for file in path.glob("*.safetensors")) if path.is_dir() else []
    path = path / ENCODER if path.is_dir() else path
    if not path.is_file():
        if others:  # a network that was trained for a task
            raise CacheError(
                f"no {ENCODER} in {run}, which holds {', '.join(others)}",
                expected="the folder of a finished pretraining: its encoder is asked for",
                fix=f"the run that it was trained from; or milan predict {run} FOLDER",
            )
        raise CacheError(
            f"no {ENCODER} at {run}",
            expected="the folder of a finished pretraining, or timm:NAME",
            fix="milan pretrain, which leaves one in its --out",
        )
    return path


def encoder_weights(run: str | Path) -> dict[str, torch.Tensor]:
    """The weights in an encoder.safetensors (or the run that holds it), by the encoder's names."""
    path = encoder_file(run)
    try:
        return unwrapped(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise CacheError(
            f"{path} is damaged: {error}",
            fix="the line of the training that wrote it: it writes it anew",
        ) from None


def load_encoder(run: str | Path) -> VisionTransformer:
    """The pretrained encoder of a run (its folder, or an encoder.safetensors), in eval mode.

    A timm VisionTransformer; `timm.data.resolve_model_data_config` gives its mean, std and size. An
    image becomes its class token, or the mean of its patches where training left the class token
    alone (`pools_mean`). Raises CacheError, ConfigError.
    """
    about, weights = read_about(run), encoder_weights(run)
    size = about["input_size"]
    encoder = build_encoder(about["model"], img_size=size, args=about["model_args"])
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise CacheError(
            f"{encoder_file(run)} does not fit {about['model']}: {first}",
            expected="its own weights",
        ) from None
    encoder.pretrained_cfg = {
        **encoder.pretrained_cfg,
        "mean": tuple(about["mean"]),
        "std": tuple(about["std"]),
        "input_size": (encoder.patch_embed.proj.in_channels, *height_width(size)),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    if "global_pool" not in about["model_args"] and pools_mean(about):
        encoder.global_pool = "avg"
    return encoder.eval()


def pools_mean(about: Mapping[str, Any]) -> bool:
    """Whether the loss of an encoder's training did not see its class token.

    `about` is what its file says (`read_about`). The norm is before the average, as in training.
    """
    return about.get("pooling") == "mean" or about.get("objective") in _NO_TOKEN
