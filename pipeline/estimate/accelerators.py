"""What an accelerator is assumed to do where it is not here to be measured, with the sources.

The rates are views a second of CLIP's ViT-B/16 at 224 pixels in mixed precision by torch. Other
teachers take longer in proportion to their operations. None was measured with milan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from milan.core.size import height_width
from milan.errors import ConfigError, nearest
from pipeline.teachers.load import Teacher

_FLOP: Final = 35.2e9
"""Operations of a view through ViT-B/16: 17.58 G multiply-adds (timm)."""
_SHARE: Final = 0.35
"""Of a data sheet's matrix rate. The measured cards reach 0.56 to 0.69; those with more arithmetic
for each byte of memory bandwidth will reach less."""


@dataclass(frozen=True)
class Accelerator:
    """A rate and where it comes from."""

    views_per_second: float
    source: str


def _timm(rate: float, torch_version: str) -> Accelerator:
    """As timm publishes for vit_base_patch16_clip_quickgelu_224 in results/ of its repository."""
    return Accelerator(
        rate, f"measured by timm, torch {torch_version}, results/benchmark-infer-amp"
    )


def _data_sheet(tflops: float) -> Accelerator:
    """`tflops`: half-precision products with float32 sums, dense, as NVIDIA states them."""
    rate = _SHARE * tflops * 1e12 / _FLOP
    return Accelerator(rate, f"{_SHARE:.0%} of the {tflops:g} TFLOP/s of NVIDIA's data sheet")


ACCELERATORS: Final[dict[str, Accelerator]] = {
    "rtx3090": _timm(1387, "2.4"),
    "rtx4090": _timm(2692, "2.9.1"),
    "rtx5090": _timm(3358, "2.9.1"),
    "rtx-pro-6000-max-q": _timm(3816, "2.9.1"),
    "t4": _data_sheet(65),
    "l4": _data_sheet(121),
    "v100": _data_sheet(125),
    "a100": _data_sheet(312),
    "h100": _data_sheet(989),
    "h200": _data_sheet(989),
}


def accelerator_of(name: str) -> Accelerator:
    """The one called `name`. Raises ConfigError with the nearest known name."""
    if name.lower() not in ACCELERATORS:
        raise ConfigError(
            f"--accelerator {name}", expected=", ".join(ACCELERATORS),
            fix=nearest(name.lower(), ACCELERATORS) or "--images-per-second, as measured there",
        )  # fmt: skip
    return ACCELERATORS[name.lower()]


def teacher_seconds_on(accelerator: Accelerator, teacher: Teacher) -> float:
    """Seconds of `teacher` for a view, by its operations."""
    return view_flop(teacher) / _FLOP / accelerator.views_per_second


def view_flop(teacher: Teacher) -> float:
    """Operations of a view: products of matrices, counted on tensors without memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counted:
        teacher.forward(torch.zeros(1, 3, *height_width(teacher.size), device=teacher.device))
    return float(counted.get_total_flops())
