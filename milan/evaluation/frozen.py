"""A frozen encoder, and its features of labelled images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torch

from milan.core.device import MEAN, STD, normalise
from milan.core.progress import Progress
from milan.errors import ConfigError, DataError, ImageFault
from milan.evaluation.protocols import EvaluationConfig
from milan.evaluation.splits import Split
from milan.images.decode import content_digest, decode
from milan.images.source import ImageSource
from milan.images.views import centre_view, render
from milan.models.encoder import create_vit, encode, pooled_features, pretrained_vit
from milan.models.export import load_encoder, read_about


@dataclass(frozen=True)
class Frozen:
    """A frozen network as an evaluation sees it."""

    features: Callable[[torch.Tensor], torch.Tensor]
    """uint8 [B, S, S, 3] on the device to [B, F] float32."""
    size: int
    """S, edge of its input in pixels."""
    name: str


def frozen_encoder(config: EvaluationConfig, device: torch.device) -> Frozen:
    """The encoder that `config.checkpoint` names; features are class token and mean of patches.

    Raises ConfigError for an unknown model and for weights that cannot be fetched, CacheError for a
    run without an encoder. The teacher is no encoder of ours: pipeline.teachers.frozen loads it.
    """
    name = config.checkpoint
    tokens_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    if name == "teacher":
        raise ConfigError(
            "checkpoint teacher without a network",
            expected="frozen=pipeline.teachers.frozen.frozen_teacher(config)",
        )
    if name == "random":
        if config.like:
            shape = read_about(config.like)
            size = shape["input_size"]
            vit = _random(shape["model"], shape["model_args"], size, config.seed)
        else:
            size = int(config.model_args.get("img_size", 224))
            args = {k: v for k, v in config.model_args.items() if k != "img_size"}
            vit = _random(config.model, args, size, config.seed)
    elif name.startswith("timm:"):
        vit = pretrained_vit(name.removeprefix("timm:"))
        size = timm.data.resolve_model_data_config(vit)["input_size"][1]
        tokens_of = _timm_tokens(name, vit, size)
    else:
        vit = load_encoder(name)
        size = vit.patch_embed.img_size[0]
    data_config = timm.data.resolve_model_data_config(vit)
    vit = vit.to(device).eval().requires_grad_(False)
    tokens_of = tokens_of or partial(encode, vit)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, data_config["mean"], data_config["std"])
        return pooled_features(vit, tokens_of(images)).float()

    return Frozen(features, size, name)


def _timm_tokens(model: str, vit: Any, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """images [B, 3, S, S] to tokens as `encode` orders them, by timm's own pass.

    timm's ViTs have positions of many kinds, or tokens that `encode` does not know. Raises
    ConfigError for a model whose output is not one token a patch.
    """

    def tokens(images: torch.Tensor) -> torch.Tensor:
        return getattr(vit, "fc_norm", torch.nn.Identity())(vit.forward_features(images))

    shape: tuple[int, ...] = ()
    if hasattr(vit, "forward_features") and hasattr(vit, "num_prefix_tokens"):
        with torch.inference_mode():
            output = vit.eval().forward_features(torch.zeros(1, 3, size, size))
        shape = tuple(getattr(output, "shape", ()))
    if len(shape) != 3:
        raise ConfigError(
            f"{model} is a {type(vit).__name__}, whose output is not one token a patch",
            expected="a ViT",
            fix="--checkpoint timm:vit_base_patch16_224.augreg_in21k",
        )
    return tokens


def _random(name: str, args: dict[str, Any], size: int, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = create_vit(name, img_size=size, args=args)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": MEAN, "std": STD}
    return vit


def split_features(
    frozen: Frozen,
    split: Split,
    config: EvaluationConfig,
    device: torch.device,
    progress: Progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [m, F] float32 and labels [m] int64, on the CPU, of the images that can be read.

    Images are shown as their central square. Files that cannot be read are counted in a note, and
    so are images to measure on that were fitted on, wherever they are: those of the same bytes.
    Raises DataError if none can be read, or all were fitted on.
    """
    kept: list[int] = []
    rejected: list[str] = []
    parts: list[torch.Tensor] = []
    progress.begin(f"features of {frozen.name}", len(split.rows), "images")
    for positions, pixels in _pixel_batches(split, frozen.size, config, rejected):
        with torch.inference_mode():
            parts.append(frozen.features(torch.from_numpy(pixels).to(device)).cpu().clone())
        kept += positions
        progress.advance(len(kept) + len(rejected))
    progress.end()
    if rejected:
        progress.note(f"rejected files: {len(rejected)}, the first is {rejected[0]}")
    if rejected and not kept:
        raise DataError(f"no image of {split.source} can be read: {rejected[0]}")
    if split.repeated:
        found = f"{split.repeated:,} of {len(kept):,} images to measure on are training images too"
        if split.repeated == len(kept):
            raise DataError(
                f"{found} (the same bytes)", expected="other images to measure on",
                fix="--val-data with images of its own",
            )  # fmt: skip
        progress.note(f"{found} (the same bytes): figures are better than on new images")
    x = torch.cat(parts) if parts else torch.empty(0, 0)
    return x, torch.from_numpy(split.labels[kept])


def _pixel_batches(
    split: Split, size: int, config: EvaluationConfig, rejected: list[str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Positions in the split, and their pixels uint8 [b, S, S, 3]; unreadable images are listed."""
    fitted = split.training.digests if split.training else set()
    split.digests, split.repeated = set(), 0
    threads = config.num_workers or max(1, min(16, os.cpu_count() or 1))
    load = partial(_central_square, split.images, size, config.crop_share)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(split.rows), config.batch_size):
            rows = split.rows[start : start + config.batch_size].tolist()
            positions, pixels = [], []
            for i, (row, image) in enumerate(zip(rows, pool.map(load, rows), strict=True), start):
                if isinstance(image, str):
                    rejected.append(f"row {row}: {image}")
                    continue
                square, digest = image
                split.digests.add(digest)
                split.repeated += digest in fitted
                positions.append(i)
                pixels.append(square)
            if positions:
                yield positions, np.stack(pixels)


def _central_square(
    images: ImageSource, size: int, share: float, row: int
) -> tuple[np.ndarray, str] | str:
    """Pixels uint8 [S, S, 3] of one image and its content digest, or why it cannot be read."""
    try:
        data = images.read(row)
        image = decode(data)
    except ImageFault as fault:
        return str(fault)
    width, height = image.size
    square = render(image, centre_view(height, width, crop_share=share), size=size)
    return square, content_digest(data)
