"""What pretraining was worth: a linear probe on frozen features."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch.nn import functional as F

from milan.config import ProbeConfig
from milan.core import rng
from milan.core.config_resolver import from_call
from milan.core.device import MEAN, STD, normalise, pick_device
from milan.core.paths import AnyPath
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError, DataError, ImageFault, nearest
from milan.images.decode import decode
from milan.images.manifest import Manifest, build_manifest, data_root, resolve_data
from milan.images.source import ImageSource
from milan.images.views import centre_view, render
from milan.models.encoder import create_vit, encode, pooled_features
from milan.models.export import load_encoder, read_about

_L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # strengths tried on a tenth of the training images
_HELD_OUT = 10  # one image in ten chooses the strength


@dataclass(frozen=True)
class Frozen:
    """A frozen network as a probe sees it."""

    features: Callable[[torch.Tensor], torch.Tensor]
    """uint8 [B, S, S, 3] on the device to [B, F] float32."""
    size: int
    """S, edge of its input in pixels."""
    name: str


def frozen_encoder(config: ProbeConfig, device: torch.device) -> Frozen:
    """The encoder that `config.checkpoint` names; features are class token and mean of patches."""
    name = config.checkpoint
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
        model = name.removeprefix("timm:")
        if not timm.is_model(model.split(".")[0]):
            raise ConfigError(
                f"unknown timm model {model!r}", fix=nearest(model, timm.list_models("*vit*"))
            )
        try:
            vit = timm.create_model(model, pretrained=True, num_classes=0)
        except Exception as error:  # hub clients raise many kinds; all mean: not to be had
            raise ConfigError(
                f"the weights of {model} cannot be fetched: {type(error).__name__}",
                expected="a network, or the weights in the hub's local cache",
            ) from None
        size = timm.data.resolve_model_data_config(vit)["input_size"][1]
    else:
        vit = load_encoder(name)
        size = vit.patch_embed.img_size[0]
    cfg = timm.data.resolve_model_data_config(vit)
    vit = vit.to(device).eval().requires_grad_(False)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        images = normalise(pixels, cfg["mean"], cfg["std"])
        return pooled_features(vit, encode(vit, images)).float()

    return Frozen(features, size, name)


def _random(name: str, args: dict[str, Any], size: int, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = create_vit(name, img_size=size, args=args)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": MEAN, "std": STD}
    return vit


def linear_probe(
    checkpoint: str | ProbeConfig = "runs/pretrain",
    *,
    frozen: Frozen | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a linear classifier on frozen features and measure it.

    `checkpoint` and `settings` are the command's arguments (ProbeConfig's fields); `frozen` takes
    another network's features in the checkpoint's place. Multinomial logistic regression on
    standardised features, fitted to convergence (L-BFGS), its L2 strength chosen on a tenth of
    the training images. Returns top1, top5 (percent), counts, and the strength. Raises MilanError.
    """
    config = from_call(ProbeConfig, "checkpoint", checkpoint, settings)
    progress = progress or NoProgress()
    config.check()
    device = pick_device(config.device)
    frozen = frozen or frozen_encoder(config, device)
    began = time.perf_counter()
    source = resolve_data(config.data, config.data_root)
    train = build_manifest(source, seed=config.seed, limit=config.limit)
    x, y = _features(frozen, source, train, config, device, progress)
    if config.val_data:
        val_source = resolve_data(config.val_data, config.data_root)
        val = build_manifest(val_source, seed=config.seed, limit=config.limit)
        vx, vy = _features(frozen, val_source, val, config, device, progress)
        vy = _same_classes(train, val, vy)
    else:
        mix = torch.from_numpy(rng.permutation(config.seed, rng.SAMPLE, (0,), len(y)))
        cut = max(1, len(y) // 5)
        vx, vy, x, y = x[mix[:cut]], y[mix[:cut]], x[mix[cut:]], y[mix[cut:]]
    if len(y) < 2:
        raise DataError(f"{len(y)} images to fit on", expected="2 and more, and some to measure on")
    classes = int(max(y.max(), vy.max())) + 1
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, vx = ((x - mean) / std).to(device), ((vx - mean) / std).to(device)
    y, vy = y.to(device), vy.to(device)
    strength = _choose_strength(x, y, classes)
    weight, bias = fit_logistic(x, y, classes, l2=strength)
    top = (vx @ weight + bias).topk(min(5, classes), dim=1).indices == vy[:, None]
    return {
        "checkpoint": frozen.name,
        "top1": round(100 * top[:, 0].float().mean().item(), 2),
        "top5": round(100 * top.any(dim=1).float().mean().item(), 2),
        "classes": classes,
        "features": x.shape[1],
        "train_images": len(y),
        "val_images": len(vy),
        "l2": strength,
        "seconds": round(time.perf_counter() - began, 1),
    }


def fit_logistic(
    x: torch.Tensor, y: torch.Tensor, classes: int, *, l2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression: x [n, F], y [n] to weight [F, classes], bias [classes].

    Minimises mean cross-entropy + l2/2 |weight|², from zero, by L-BFGS: no rate to tune.
    """
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-5, tolerance_change=1e-7,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _choose_strength(x: torch.Tensor, y: torch.Tensor, classes: int) -> float:
    # Rows are in the manifest's permuted order, so every tenth is a fair sample.
    held = torch.arange(len(y), device=y.device) % _HELD_OUT == 0
    if held.sum() < 2 or (~held).sum() < 2:
        return _L2[1]
    scores = []
    for l2 in _L2:
        weight, bias = fit_logistic(x[~held], y[~held], classes, l2=l2)
        right = (x[held] @ weight + bias).argmax(dim=1) == y[held]
        scores.append(right.float().mean().item())
    return _L2[int(np.argmax(scores))]


def _same_classes(train: Manifest, val: Manifest, labels: torch.Tensor) -> torch.Tensor:
    """Labels of `val` as numbers of `train`, matched by class name where both have names."""
    if train.classes is None or val.classes is None or train.classes == val.classes:
        return labels
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in val.classes if name not in number]
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of --val-data are not in --data, the first is {unknown[0]!r}",
            expected="the same class names in both",
        )
    return torch.tensor([number[name] for name in val.classes])[labels]


def _features(
    frozen: Frozen,
    source: AnyPath,
    manifest: Manifest,
    config: ProbeConfig,
    device: torch.device,
    progress: Progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, F] and labels [n] of all images that can be read."""
    labels = manifest.labels()
    if (labels < 0).any():
        raise DataError(
            f"{source} has {int((labels < 0).sum())} images without a label",
            expected="class folders, a `label` column, or .cls members of tars",
        )
    images = ImageSource(manifest, data_root(source))
    kept: list[int] = []
    faults: list[str] = []
    out: list[torch.Tensor] = []
    progress.begin(f"features of {frozen.name}", len(manifest), "images")
    for rows, pixels in _pixel_batches(images, len(manifest), frozen.size, config, faults):
        with torch.inference_mode():
            out.append(frozen.features(torch.from_numpy(pixels).to(device)).cpu().clone())
        kept += rows
        progress.advance(len(kept) + len(faults))
    progress.end()
    if faults:
        progress.note(f"{len(faults)} images left out: the first is {faults[0]}")
    if not kept:
        raise DataError(f"no image of {source} can be read: {faults[0] if faults else 'none'}")
    return torch.cat(out), torch.from_numpy(labels[kept])


def _pixel_batches(
    images: ImageSource, count: int, size: int, config: ProbeConfig, faults: list[str]
) -> Iterator[tuple[list[int], np.ndarray]]:
    threads = config.num_workers or max(1, min(16, os.cpu_count() or 1))
    load = partial(_centre, images, size, config.crop_share)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, config.batch_size):
            rows, pixels = [], []
            batch = range(start, min(count, start + config.batch_size))
            for row, result in zip(batch, pool.map(load, batch), strict=True):
                if isinstance(result, str):
                    faults.append(f"row {row}: {result}")
                else:
                    rows.append(row)
                    pixels.append(result)
            if rows:
                yield rows, np.stack(pixels)


def _centre(images: ImageSource, size: int, share: float, row: int) -> np.ndarray | str:
    try:
        image = decode(images.read(row))
    except ImageFault as fault:
        return str(fault)
    width, height = image.size
    return render(image, centre_view(height, width, crop_share=share), size=size)
