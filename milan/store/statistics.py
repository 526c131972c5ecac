"""Statistics of a teacher's features, by which targets are normalised (`--target-norm`).

Measured once, on seeded views of a layer's first generation, which growth does not change, and kept
beside the generations: `statistics/GENERATION-DIGEST.safetensors`, so that all runs on the store
have the same numbers. C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from milan.core import rng
from milan.core.atomic import sync_folder, write_bytes
from milan.core.paths import AnyPath, is_local, names_in, read_file
from milan.store.cache import TargetCache

FOLDER = "statistics"
"""In a store, and in the folder of a run that needs them."""
_TOKENS, _LEAST_VIEWS, _AT_ONCE = 40_000, 128, 32
_SHOWN = 16  # characters of a digest in a file's name


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of all tokens of some views: the class token is one of T."""

    mean: np.ndarray
    """[C] float32"""
    deviation: np.ndarray
    """[C] float32, of each channel."""
    axes: np.ndarray
    """[C, C] float32, orthonormal: a row for each principal axis, the largest variance first."""
    views: np.ndarray
    """[1] int64: of how many."""

    @cached_property
    def content(self) -> bytes:
        """A file of them."""
        names = ("mean", "deviation", "axes", "views")
        return save({name: np.ascontiguousarray(getattr(self, name)) for name in names})

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.content).hexdigest()


_known: WeakKeyDictionary[TargetCache, Statistics] = WeakKeyDictionary()


def statistics_of(cache: TargetCache) -> Statistics:
    """Those that were settled for an open layer, else those kept with its store, else measured.

    Writes nothing. Raises CacheError for a store without targets, or damage.
    """
    if cache not in _known:
        _known[cache] = find(cache.path / FOLDER, cache) or measured(cache)
    return _known[cache]


def settle(cache: TargetCache, statistics: Statistics) -> None:
    """What `statistics_of` says of a layer from now on, in this process."""
    _known[cache] = statistics


def measured(cache: TargetCache) -> Statistics:
    """Of 40,000 tokens or more where there are so many, in float64; the same whenever asked."""
    first = cache.generations[0]
    rows = cache.good_rows(with_dropped=True)
    rows = rows[first.holds_rows(rows)]
    count = max(_LEAST_VIEWS, -(-_TOKENS // cache.spec.tokens))
    rows = np.sort(rows[rng.permutation(0, rng.SAMPLE, (5,), len(rows))[:count]])
    drawn = rng.bits(0, rng.SAMPLE, (6,), len(rows)) % np.uint64(first.spec.views)
    views = first.spec.first_view + drawn.astype(np.int64)
    channels, tokens = cache.spec.channels, 0
    total = torch.zeros(channels, dtype=torch.float64)
    products = torch.zeros(channels, channels, dtype=torch.float64)
    for at in range(0, len(rows), _AT_ONCE):
        part = slice(at, at + _AT_ONCE)
        targets = cache.read(rows[part], views[part])
        assert targets.codes is not None
        scale = None if targets.scale is None else torch.from_numpy(targets.scale)
        features = cache.codec.decode(torch.from_numpy(targets.codes), scale)
        flat = features.flatten(0, 1).double()
        total, products, tokens = total + flat.sum(0), products + flat.T @ flat, tokens + len(flat)
    mean = total / tokens
    covariance = products / tokens - torch.outer(mean, mean)
    _, axes = torch.linalg.eigh(covariance)
    axes = axes.T.flip(0)
    # Either sign of an axis is one: without a rule, libraries would differ.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    return Statistics(
        mean.float().numpy(), deviation.float().numpy(), (axes * largest.sign()).float().numpy(),
        np.array([len(rows)]),
    )  # fmt: skip


# --- files ----------------------------------------------------------------------------------------


def find(folder: AnyPath, cache: TargetCache) -> Statistics | None:
    """Those of a layer in a folder of them; None if there are none, or none that is whole."""
    wanted = cache.generations[0].entry.digest[:_SHOWN]
    return next((statistics for _, statistics in _whole(folder, wanted)), None)


def find_digest(folder: AnyPath, digest: str) -> Statistics | None:
    """Those of a digest in a folder of them; None if there are none, or they are not whole."""
    return next(
        (statistics for _, statistics in _whole(folder, "") if statistics.digest == digest), None
    )


def _whole(folder: AnyPath, start: str) -> Iterator[tuple[str, Statistics]]:
    """Files of a folder whose content is what their name says, in order of names."""
    names: list[str] = []
    with suppress(OSError):
        names = sorted(names_in(folder))
    for name in names:
        if not (name.startswith(start) and name.endswith(".safetensors")):
            continue
        with suppress(OSError, KeyError, SafetensorError):
            content = read_file(folder / name)
            stated = name.removesuffix(".safetensors").rpartition("-")[2]
            if hashlib.sha256(content).hexdigest().startswith(stated):
                yield name, Statistics(**load(content))


def keep(statistics: Statistics, cache: TargetCache, folder: AnyPath) -> bool:
    """Write them into a folder unless they are there; False if it cannot be written."""
    if find(folder, cache):
        return True
    if not is_local(folder):
        return False
    start = cache.generations[0].entry.digest[:_SHOWN]
    name = f"{start}-{statistics.digest[:_SHOWN]}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        write_bytes(folder / name, statistics.content)
        sync_folder(folder)
    except OSError:
        return find(folder, cache) is not None  # another run wrote them at the same time
    return True
