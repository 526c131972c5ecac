"""How features are stored: float16 as the teacher said them, int8 with a scale a token.

Only the direction of a feature enters the objective, yet both codecs keep its length too. Codes
travel to the training device and are decoded there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from milan.errors import ConfigError, nearest


class Codec(Protocol):
    """Turns features into what a store keeps, and back."""

    @property
    def name(self) -> str:
        """What the store calls it."""

    @property
    def dtype(self) -> str:
        """Of the stored codes."""

    @property
    def fill(self) -> float:
        """What absent chunks would read as: a value that no encoded feature is made of alone."""

    @property
    def scaled(self) -> bool:
        """Whether there is a scale a token."""

    def encode(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Features [B, T, C], finite, to codes [B, T, C] and scales [B, T] (or None)."""

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Codes [B, T, C] to features [B, T, C], float32, on the device of the codes."""


@dataclass(frozen=True)
class Float16:
    """Half precision: what the published teacher computes in. 2 bytes a channel."""

    name: str = "float16"
    dtype: str = "float16"
    fill: float = float("nan")
    scaled: bool = False

    def encode(self, features: torch.Tensor) -> tuple[np.ndarray, None]:
        """Rounded to the nearest half; values beyond 65504 are the caller's to refuse."""
        return features.to(torch.float16).cpu().numpy(), None

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Exact: every half is a float."""
        return codes.float()


@dataclass(frozen=True)
class Int8:
    """Symmetric int8, one float32 scale a token: feature = code * scale. 1 byte a channel.

    The largest channel of a token becomes 127, so the error of a channel is at most half a scale
    step; 1 - cosine is about 3e-5 on Gaussian rows. -128 never occurs.
    """

    name: str = "int8"
    dtype: str = "int8"
    fill: float = -128
    scaled: bool = True

    def encode(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Codes in -127..127 and scales > 0."""
        features = features.float()
        tiny = torch.finfo(torch.float32).tiny
        scale = (features.abs().amax(dim=-1) / 127).clamp_min(tiny)
        codes = (features / scale[..., None]).round().clamp(-127, 127).to(torch.int8)
        return codes.cpu().numpy(), scale.cpu().numpy()

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """code * scale."""
        assert scale is not None
        return codes.float() * scale[..., None]


CODECS: dict[str, Codec] = {"int8": Int8(), "float16": Float16()}


def codec_of(name: str) -> Codec:
    """The codec called `name`. Raises ConfigError with the nearest known name."""
    if name not in CODECS:
        raise ConfigError(
            f"unknown codec {name!r}", expected=" or ".join(CODECS), fix=nearest(name, CODECS)
        )
    return CODECS[name]
