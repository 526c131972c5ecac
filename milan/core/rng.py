"""Random numbers by address: every draw is a pure function of (seed, purpose, address).

Nothing is consumed from a stream, so workers, ranks, order and resumes cannot change a draw.
Philox's raw bits are guaranteed by numpy across versions and machines (NEP 19); the distributions
built on them are not, so milan makes its own from the bits.
"""

from __future__ import annotations

from threading import local
from typing import Final

import numpy as np

# A number per purpose. Never change one: it would change the draws of every store and run.
MANIFEST: Final = 1
VIEW: Final = 2
MASK: Final = 3
ORDER: Final = 4
VIEW_TURN: Final = 5
SAMPLE: Final = 6
HELD_OUT: Final = 7
DROPPED: Final = 8
AUGMENTED: Final = 9
MIXED: Final = 10
CORRUPTED: Final = 11
CAPTION: Final = 12
TEACHER: Final = 13

_thread = local()
"""A generator and its state, with nothing drawn yet."""


def bits(seed: int, purpose: int, address: tuple[int, ...], count: int) -> np.ndarray:
    """`count` raw 64-bit words at `address` (at most three non-negative integers); uint64."""
    # The lowest counter word is Philox's own position: 2^64 blocks to every address.
    a, b, c = (*address, 0, 0, 0)[:3]
    # A new generator would first ask the system for a random seed.
    if not hasattr(_thread, "generator"):
        _thread.generator = np.random.Philox(0)
        _thread.state = _thread.generator.state
    _thread.state["state"]["key"] = np.array([seed % 2**64, purpose], np.uint64)
    _thread.state["state"]["counter"] = np.array([0, a, b, c], np.uint64)
    _thread.generator.state = _thread.state
    return _thread.generator.random_raw(count)


def generator(seed: int) -> np.random.Generator:
    """A generator of numpy's, for what need not be addressed: a bootstrap. Any seed of 64 bits."""
    return np.random.Generator(np.random.Philox(seed % 2**64))


def uniforms(seed: int, purpose: int, address: tuple[int, ...], count: int) -> np.ndarray:
    """`count` numbers in (0, 1), 53 bits each, never 0 nor 1; float64."""
    # Half a step up: the logarithm of a draw is finite and strictly negative.
    return ((bits(seed, purpose, address, count) >> np.uint64(11)) + 0.5) * 2.0**-53


def permutation(seed: int, purpose: int, address: tuple[int, ...], n: int) -> np.ndarray:
    """A permutation of range(n), int64; the same with every version (a stable sort of raw bits)."""
    return np.argsort(bits(seed, purpose, address, n), kind="stable")


def mask_noise(
    seed: int, epochs: np.ndarray, rows: np.ndarray, views: np.ndarray, patches: int
) -> np.ndarray:
    """Noise in (0, 1) at the addresses (epoch, row, view), each [B]; float32 [B, N]."""
    # float32 would round some draws to 0 or 1, whose logarithms are no use: keep them inside.
    eps = np.finfo(np.float32).eps
    noise = _uniforms_at(seed, MASK, (rows, views, epochs), patches)
    return np.clip(noise, eps, 1 - eps).astype(np.float32)


def teacher_noise(
    seed: int, epochs: np.ndarray, rows: np.ndarray, views: np.ndarray, teachers: int
) -> np.ndarray:
    """Noise in [0, 1] for each teacher at the addresses (epoch, row, view), each [B]; float32."""
    return _uniforms_at(seed, TEACHER, (rows, views, epochs), teachers).astype(np.float32)


def _uniforms_at(
    seed: int, purpose: int, addresses: tuple[np.ndarray, ...], count: int
) -> np.ndarray:
    """`uniforms` at each of B addresses, given part by part; float64 [B, count]."""
    each = zip(*(part.tolist() for part in addresses), strict=True)
    return np.stack([uniforms(seed, purpose, address, count) for address in each])
