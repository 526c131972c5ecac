"""Linear probe: how well a linear classifier on frozen features tells classes apart."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from milan.core.config_resolver import from_call
from milan.core.device import pick_device
from milan.core.progress import NoProgress, Progress
from milan.errors import DataError
from milan.evaluation.frozen import Frozen, frozen_encoder, split_features
from milan.evaluation.meaning import chance, doubts
from milan.evaluation.protocols import EvaluationConfig
from milan.evaluation.splits import open_splits

_L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # strengths tried on a tenth of the training images
_TENTH = 10
_TOP = 5


def linear_probe(
    checkpoint: str | EvaluationConfig = "runs/pretrain",
    *,
    frozen: Frozen | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a linear classifier on frozen features and measure it.

    `checkpoint` and `settings` are the command's arguments (EvaluationConfig's fields); `frozen`
    takes another network's features in the checkpoint's place. Multinomial logistic regression on
    standardised features, fitted to convergence (L-BFGS), its L2 strength chosen on a tenth of
    the training images. Returns top1, top5 and chance (percent; top5 is None with 5 classes and
    less), counts (repeated_images: of the validation images, those that are training images too),
    and the strength. Raises MilanError.
    """
    config = from_call(EvaluationConfig, "checkpoint", checkpoint, settings, "linear_probe")
    progress = progress or NoProgress()
    config.check()
    device = pick_device(config.device)
    frozen = frozen or frozen_encoder(config, device)
    began = time.perf_counter()
    train, val = open_splits(config, progress)
    x, y = split_features(frozen, train, config, device, progress)
    if len(y) < 2:
        raise DataError(f"{len(y)} images to fit on", expected="2 and more, and some to measure on")
    val_x, val_y = split_features(frozen, val, config, device, progress)
    numbers, y = torch.unique(y, return_inverse=True)  # of the classes that can be told apart
    classes = len(numbers)
    if classes < 2:
        raise DataError(
            f"all {len(y)} images to fit on are of one class", expected="at least two classes"
        )
    for doubt in doubts(y.numpy(), val_y.numpy()):
        progress.note(doubt)
    found = torch.searchsorted(numbers, val_y).clamp(max=classes - 1)
    val_y = torch.where(numbers[found] == val_y, found, -1)
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x, val_x = ((x - mean) / std).to(device), ((val_x - mean) / std).to(device)
    y, val_y = y.to(device), val_y.to(device)
    strength = _choose_strength(x, y, classes)
    weight, bias = fit_logistic(x, y, classes, l2=strength)
    correct = (val_x @ weight + bias).topk(min(_TOP, classes), dim=1).indices == val_y[:, None]
    if classes <= _TOP:
        progress.note(f"top-5 is left out: with {classes} classes it means nothing")
    return {
        "checkpoint": frozen.name,
        "top1": round(100 * correct[:, 0].float().mean().item(), 2),
        "top5": round(100 * correct.any(dim=1).float().mean().item(), 2)
        if classes > _TOP
        else None,
        "chance": round(chance(y.cpu().numpy(), val_y.cpu().numpy()), 2),
        "classes": classes,
        "features": x.shape[1],
        "train_images": len(y),
        "val_images": len(val_y),
        "repeated_images": val.repeated,
        "l2": strength,
        "seconds": round(time.perf_counter() - began, 1),
    }


def fit_logistic(
    x: torch.Tensor, y: torch.Tensor, classes: int, *, l2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression: x [n, F], y [n] to weight [F, classes], bias [classes].

    Minimises mean cross-entropy + l2/2 |weight|², from zero, by L-BFGS: no learning rate to tune.
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
    tenth = torch.arange(len(y), device=y.device) % _TENTH == 0
    if tenth.sum() < 2 or (~tenth).sum() < 2:
        return _L2[1]
    scores = []
    for l2 in _L2:
        weight, bias = fit_logistic(x[~tenth], y[~tenth], classes, l2=l2)
        correct = (x[tenth] @ weight + bias).argmax(dim=1) == y[tenth]
        scores.append(correct.float().mean().item())
    return _L2[int(np.argmax(scores))]
