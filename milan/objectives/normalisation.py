"""Normalisation of a teacher's features before a student predicts them (`--target-norm`).

none          as they are
layernorm     each token to mean 0 and variance 1 over its channels, without weights: data2vec
              (arXiv 2202.03555, the images' targets), MaskAlign (2211.08887, target_norm whiten)
standardise   each channel to mean 0 and variance 1 over the store
phi-s         rotated so that every channel has the same variance, then one factor for all: PHI-S
              (arXiv 2410.01680, section 2.4): y = H U (x - mean) / s, U the principal axes, H an
              orthonormal Hadamard matrix, s^2 the mean variance

B views, T tokens, C channels. The last two are affine, by the store's statistics, and are undone
exactly; of layernorm only the direction comes back, but for the mean over channels.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional as F

from milan.core.device import kept_copy
from milan.errors import ConfigError
from milan.store.statistics import Statistics

MEASURED: Final = ("standardise", "phi-s")
"""Those that need statistics."""
_EPS = 1e-6
_LEAST = 1e-2  # of the typical deviation: a channel that is constant in the sample may vary


class Affine:
    """x -> W (x - mean), and back."""

    def __init__(self, kind: str, statistics: Statistics) -> None:
        """`kind` is standardise or phi-s. Raises ConfigError: no Hadamard matrix of C is known."""
        deviation = statistics.deviation.astype(np.float64)
        typical = float(np.sqrt(np.mean(deviation**2))) or 1.0
        self.mean = statistics.mean
        if kind == "phi-s":
            turned = hadamard(len(deviation)) @ statistics.axes.astype(np.float64)
            weight, back = turned / typical, turned.T * typical
        else:
            deviation = np.maximum(deviation, _LEAST * typical)
            weight, back = np.diag(1 / deviation), np.diag(deviation)
        self.weight, self.back = weight.astype(np.float32), back.astype(np.float32)
        """[C, C] each, to be multiplied from the left."""
        self._copies: dict[Any, torch.Tensor] = {}

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, T, C] as they are predicted, float32 also under autocast."""
        mean, weight = self.table("mean", features.device), self.table("weight", features.device)
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - mean) @ weight.T

    def restored(self, prediction: torch.Tensor) -> torch.Tensor:
        """A prediction [B, T, C] as the teacher's features."""
        mean, back = self.table("mean", prediction.device), self.table("back", prediction.device)
        with torch.autocast(prediction.device.type, enabled=False):
            return prediction.float() @ back.T + mean

    def to(self, device: torch.device) -> None:
        """Have the tables on `device`."""
        for name in ("mean", "weight", "back"):
            self.table(name, device)

    def table(self, name: str, device: torch.device) -> torch.Tensor:
        """mean, weight or back on a device, copied once."""
        array: np.ndarray = getattr(self, name)
        return kept_copy(self._copies, (name, device), lambda: torch.from_numpy(array), device)


def layer_norm(features: torch.Tensor) -> torch.Tensor:
    """Each token of [B, T, C] to mean 0 and variance 1, float32."""
    return F.layer_norm(features.float(), features.shape[-1:], eps=_EPS)


def hadamard(size: int) -> np.ndarray:
    """An orthonormal matrix [size, size] whose entries all have the same square, float64.

    Sylvester's doubling of Paley's two constructions (1933), which give all sizes of the known
    ViTs. Raises ConfigError for a size that they do not give.
    """
    small, doublings = size, 0
    while True:
        made = _paley(small)
        if made is not None:
            break
        if small % 2:
            raise ConfigError(
                f"target_norm phi-s with a teacher of {size} channels",
                expected="a number of channels of which a Hadamard matrix is known",
                fix="--target-norm standardise",
            )
        small, doublings = small // 2, doublings + 1
    for _ in range(doublings):
        made = np.block([[made, made], [made, -made]])
    return made / size**0.5


def _paley(size: int) -> np.ndarray | None:
    """A Hadamard matrix of 1, 2, q + 1 or 2 (q + 1) rows, q a prime; None of another size."""
    if size in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:size, :size]
    if _is_prime(size - 1) and size % 4 == 0:
        core = _conference(size - 1)
        core[1:, 0] = -1
        return np.eye(size) + core
    if size % 4 == 0 and _is_prime(size // 2 - 1) and size // 2 % 4 == 2:
        core = _conference(size // 2 - 1)
        same, other = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(core, same) + np.kron(np.eye(len(core)), other)
    return None


def _conference(q: int) -> np.ndarray:
    """[q + 1, q + 1]: ones at the edges, and whether i - j is a square modulo q; zero diagonal."""
    residue = -np.ones(q)
    residue[np.unique(np.arange(1, q) ** 2 % q)] = 1
    residue[0] = 0
    matrix = np.ones((q + 1, q + 1))
    matrix[0, 0] = 0
    matrix[1:, 1:] = residue[(np.arange(q)[:, None] - np.arange(q)) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % d for d in range(2, int(number**0.5) + 1))
