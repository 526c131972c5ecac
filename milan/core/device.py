"""Device, precision, and the normalisation of pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from milan.errors import ConfigError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's normalisation: the student's, and the published teacher's input."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {first}", fix="--device auto or cpu") from None
    return device


def cpu_count() -> int:
    """CPU cores that this process may use: its affinity mask, where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64; Apple's does not."""
    return device.type != "mps"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast for `precision` (fp32, bf16, fp16) on `device`; nothing for fp32."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r}", expected=", ".join(PRECISIONS))
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [B, S, S, 3] to float32 [B, 3, S, S], (x / 255 - mean) / std, on the same device."""
    channels = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
    # Made on the CPU: making it on the device would wait for all work queued there.
    scale, shift = torch.tensor(channels).T.to(pixels.device, non_blocking=True)
    return torch.addcmul(shift, pixels.float(), scale).permute(0, 3, 1, 2).contiguous()


def denormalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """The pixels, uint8 [B, S, S, 3], that `normalise` would give as `images` [B, 3, S, S]."""
    scale, shift = torch.tensor([std, mean], device=images.device)
    colours = images.float().permute(0, 2, 3, 1) * scale + shift
    return (255 * colours).round().clamp(0, 255).to(torch.uint8)
