"""How features are stored: float16, int8 with a scale a token, or product-quantised directions.

Only the direction of a feature enters the objective; float16 and int8 keep its length too. Codes
travel to the training device and are decoded there. int8 and pq are fitted to a sample of the
features before the first is stored; their tables are kept in the store as arrays of `codec/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from milan.core.device import kept_copy
from milan.errors import CacheError, ConfigError, nearest

PQ_BYTES = (16, 32, 64, 128)
"""What `pq:N` may be: bytes a token."""
_CENTROIDS = 256  # one byte a code
_TOKENS_AT_ONCE = 4096  # whose distances to all centroids are in memory together


@dataclass(frozen=True)
class Codec(ABC):
    """Encodes features into what a store keeps and decodes them; `fitted` before it encodes."""

    name: str
    """Its name in a store's spec."""
    dtype: str
    """Of the stored codes."""
    fill: float
    """Fill value of the array. Never read: the records say which rows exist."""
    scaled: bool = False
    """Whether there is a scale per token."""
    coded: bool = False
    """Whether a code is an index into tables, not a channel."""
    tables: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    """What was fitted to the sample, by name."""

    def width(self, channels: int) -> int:
        """Codes per token."""
        return channels

    def fitted(self, features: torch.Tensor) -> Codec:
        """The codec for features like these [n, C], float32: a sample of tokens."""
        return self

    def restored(self, tables: dict[str, np.ndarray]) -> Codec:
        """The codec with the tables that a store keeps."""
        return replace(self, tables=tables)

    @abstractmethod
    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features [B, T, C], finite, to codes [B, T, width] and scales [B, T] (or None).

        On the device of the features, which nobody waits for.
        """

    @abstractmethod
    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Codes [B, T, width] to features [B, T, C], float32, on the device of the codes."""

    def to(self, device: torch.device) -> None:
        """Have the tables on `device`, as `decode` would at its first call there."""
        for name in self.tables:
            self._table(name, device)

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        # Copied to a device once; these copies are not sent to other processes.
        if name not in self.tables:
            raise CacheError(f"codec {self.name} has no {name}: it was not fitted")
        copies = self.__dict__.setdefault("_copies", {})
        table = self.tables[name]
        return kept_copy(copies, (name, device), lambda: torch.from_numpy(table.copy()), device)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_copies"}


@dataclass(frozen=True)
class Float16(Codec):
    """Half precision: what the published teacher computes in. 2 bytes a channel."""

    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Rounded to the nearest half; values beyond 65504 are the caller's to refuse."""
        return features.to(torch.float16), None

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Exact: every half is a float."""
        return codes.float()


@dataclass(frozen=True)
class Int8(Codec):
    """Symmetric int8: feature = code * scale * channel. 1 byte a channel.

    `channel` [C] is each channel's root mean square in the sample. CLIP's features have a few
    channels that are many times the others; divided by it, they do not take the range from the
    rest (docs/decisions.md has the figures). Then the largest channel of a token becomes 127.
    -128 never occurs. 1 - cosine is about 3e-5.
    """

    def fitted(self, features: torch.Tensor) -> Int8:
        rms = features.float().square().mean(dim=0).sqrt()
        # A channel that is almost 0 in the sample may be large elsewhere.
        rms = rms.clamp_min(float(rms.square().mean().sqrt()) * 1e-2 or 1.0)
        return replace(self, tables={"channel": rms.cpu().numpy().astype(np.float32)})

    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes in -127..127 and scales > 0."""
        features = features.float() / self._table("channel", features.device)
        tiny = torch.finfo(torch.float32).tiny
        scale = (features.abs().amax(dim=-1) / 127).clamp_min(tiny)
        codes = (features / scale[..., None]).round().clamp(-127, 127).to(torch.int8)
        return codes, scale

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """code * scale * channel."""
        assert scale is not None
        return codes.float() * scale[..., None] * self._table("channel", codes.device)


@dataclass(frozen=True)
class ProductQuantised(Codec):
    """Product quantisation of unit vectors (Jegou et al. 2011): M bytes a token, no length.

    A direction is rotated (`rotation` [C, C], orthogonal) and cut into M pieces; a code says which
    of 256 centroids (`codebook` [M, 256, C / M]) is nearest to a piece. Decoding looks pieces up,
    rotates back, and gives vectors near length 1. The rotation shares the variance out evenly
    (parametric OPQ, Ge et al. 2013, section 3.2) where that is nearer to the sample than none.
    """

    size: int = 64
    """M"""

    def width(self, channels: int) -> int:
        if channels % self.size:
            fits = [f"pq:{m}" for m in PQ_BYTES if channels % m == 0]
            raise ConfigError(
                f"--codec {self.name} with {channels} channels",
                expected="a number of pieces that divides them",
                fix=f"--codec {fits[-1] if fits else 'int8'}",
            )
        return self.size

    def fitted(self, features: torch.Tensor) -> ProductQuantised:
        """Trained by faiss in one thread: its results differ between numbers of threads."""
        try:
            import faiss
        except ImportError:
            raise ConfigError(
                f"--codec {self.name} needs faiss", fix="pip install 'milan-pretrain[pq]'"
            ) from None
        if len(features) < _CENTROIDS:
            raise ConfigError(
                f"--codec {self.name} with a sample of {len(features)} tokens",
                expected=f"at least {_CENTROIDS}: more images",
                fix="--codec int8",
            )
        channels = features.shape[1]
        sample = torch.nn.functional.normalize(features.float(), dim=1).cpu().numpy()
        plain = np.eye(channels, dtype=np.float32)
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            tried = [self._trained(sample, r) for r in (plain, _balancing(sample, self.size))]
        finally:
            faiss.omp_set_num_threads(threads)
        return max(tried, key=lambda pair: pair[0])[1]

    def _trained(self, sample: np.ndarray, rotation: np.ndarray) -> tuple[float, ProductQuantised]:
        """(mean cosine, codec) with centroids trained by faiss after `rotation`."""
        import faiss

        quantiser = faiss.ProductQuantizer(sample.shape[1], self.width(sample.shape[1]), 8)
        quantiser.cp.min_points_per_centroid = 1
        turned = np.ascontiguousarray(sample @ rotation.T)
        quantiser.train(turned)
        book = faiss.vector_to_array(quantiser.centroids).reshape(self.size, _CENTROIDS, -1)
        back: np.ndarray = quantiser.decode(quantiser.compute_codes(turned))  # type: ignore
        cosine = float(((back * turned).sum(1) / np.linalg.norm(back, axis=1)).mean())
        return cosine, replace(self, tables={"rotation": rotation, "codebook": book.copy()})

    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The nearest centroid of every piece of the unit vector."""
        book = self._table("codebook", features.device)  # [M, 256, d]
        rotation = self._table("rotation", features.device)
        half_norms = book.square().sum(-1) / 2  # [M, 256]
        units = torch.nn.functional.normalize(features.float().flatten(0, -2), dim=1)
        codes = []
        for part in units.split(_TOKENS_AT_ONCE):
            pieces = (part @ rotation.T).view(len(part), self.size, -1).transpose(0, 1)
            closeness = torch.baddbmm(half_norms[:, None], pieces, book.transpose(1, 2), beta=-1)
            codes.append(closeness.argmax(-1).T.to(torch.uint8))
        return torch.cat(codes).view(*features.shape[:-1], self.size), None

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Look up and rotate back, in float32 also under autocast."""
        book = self._table("codebook", codes.device)
        first = torch.arange(self.size, device=codes.device) * _CENTROIDS
        pieces = torch.nn.functional.embedding(codes.long() + first, book.flatten(0, 1))
        with torch.autocast(codes.device.type, enabled=False):
            return pieces.flatten(-2) @ self._table("rotation", codes.device)


def _balancing(sample: np.ndarray, pieces: int) -> np.ndarray:
    """An orthogonal [C, C] after which all `pieces` have about the same product of variances."""
    values, vectors = np.linalg.eigh(np.cov(sample.astype(np.float64), rowvar=False))
    size = len(values) // pieces
    weight = np.log(np.maximum(values, values.max() * 1e-9))
    weight -= weight.min() - 1  # all positive, so that the fullest piece is the largest sum
    members: list[list[int]] = [[] for _ in range(pieces)]
    for i in np.argsort(-values, kind="stable").tolist():
        free = (m for m in members if len(m) < size)
        min(free, key=lambda m: weight[m].sum()).append(i)
    return np.ascontiguousarray(vectors[:, np.concatenate(members)].T, np.float32)


@dataclass(frozen=True)
class NoTargets(Codec):
    """No features and no attention: a store of views and token ids (`--targets none`)."""

    def encode(self, features: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Nothing [B, T, 0]."""
        return features[..., :0], None

    def decode(self, codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Raises CacheError: there is nothing to decode."""
        raise CacheError("a store without targets has no features", fix="--objective rils")


NO_TARGETS = NoTargets("none", "int8", fill=0)
CODECS: dict[str, Codec] = {
    "int8": Int8("int8", "int8", fill=-128, scaled=True),
    "float16": Float16("float16", "float16", fill=float("nan")),
    **{
        f"pq:{size}": ProductQuantised(f"pq:{size}", "uint8", fill=0, coded=True, size=size)
        for size in PQ_BYTES
    },
}


def codec_of(name: str) -> Codec:
    """The codec called `name`. Raises ConfigError with the nearest known name."""
    name = "pq:64" if name == "pq" else name
    if name == NO_TARGETS.name:
        return NO_TARGETS
    if name not in CODECS:
        raise ConfigError(
            f"unknown codec {name!r}", expected=" or ".join(CODECS), fix=nearest(name, CODECS)
        )
    return CODECS[name]
