"""How features are stored: what is exact, what is off by how much, and what never occurs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from milan.errors import CacheError, ConfigError
from milan.store.codecs import CODECS, Codec, codec_of


def there_and_back(codec: Codec, features: torch.Tensor) -> torch.Tensor:
    """Encoded as a store holds it, and decoded."""
    codes, scale = codec.encode(features)
    assert codes.numpy().dtype == codec.dtype
    assert (scale is not None) == codec.scaled
    if scale is not None:
        assert scale.dtype == torch.float32
        assert scale.shape == codes.shape[:-1]
        assert (scale > 0).all()
    return codec.decode(codes, scale)


def plain_int8(channels: int) -> Codec:
    """int8 fitted to channels of equal size: what it does to a token alone."""
    return codec_of("int8").fitted(torch.ones(1, channels))


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_half_survives_float16() -> None:
    """All 63,488 finite halves, subnormals and negative zero among them: bit for bit."""
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = torch.from_numpy(bits[np.isfinite(bits)].reshape(2, 31, -1))
    codec = codec_of("float16")
    codes, scale = codec.encode(halves.float())
    assert scale is None
    assert torch.equal(codes.view(torch.int16), halves.view(torch.int16))
    assert torch.equal(there_and_back(codec, halves.float()), halves.float())
    assert there_and_back(codec, halves).dtype == torch.float32


def test_float16_rounds_to_nearest() -> None:
    """Relative error at most 2^-11 in the normal range."""
    features = gaussian(4, 9, 64)
    error = (there_and_back(codec_of("float16"), features) - features).abs()
    assert (error <= features.abs() * 2**-11 + 2**-25).all()
    assert codec_of("float16").encode(torch.full((1, 1, 1), 1e5))[0].isinf().all()


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_off_by_half_a_step_at_most(factor: float, dtype: torch.dtype) -> None:
    """A step is a 127th of the token's largest channel; -128, the fill value, never occurs."""
    features = (gaussian(8, 5, 96) * factor).to(dtype)
    if not features.isfinite().all():
        features = gaussian(8, 5, 96).to(dtype)
    codec = plain_int8(96)
    codes, scale = codec.encode(features)
    assert scale is not None
    assert codes.min() >= -127
    assert codes.max() <= 127
    back = codec.decode(codes, scale)
    assert back.dtype == torch.float32
    step = features.float().abs().amax(dim=-1, keepdim=True) / 127
    tiny = torch.finfo(torch.float32).tiny
    assert ((back - features.float()).abs() <= 0.5 * step.clamp_min(tiny) * (1 + 1e-5)).all()
    assert codec.fill == -128


def test_the_largest_channel_is_kept() -> None:
    """Of either sign: it becomes 127 steps, so a token's length hardly changes."""
    features = gaussian(3, 4, 32)
    features[0, 0, 5] = -40.0
    codes, _ = plain_int8(32).encode(features)
    assert codes[0, 0, 5] == -127
    assert (codes.int().abs().amax(dim=-1) == 127).all()
    back = there_and_back(plain_int8(32), features)
    largest = features.abs().argmax(dim=-1, keepdim=True)
    assert torch.allclose(back.gather(2, largest), features.gather(2, largest), rtol=1e-6)


def test_each_token_has_its_own_scale() -> None:
    """A loud token must not cost a quiet one its precision."""
    features = gaussian(2, 6, 64)
    loud = features.clone()
    loud[:, 0] *= 1e4
    quiet, after = (there_and_back(plain_int8(64), f)[:, 1:] for f in (features, loud))
    assert torch.equal(quiet, after)


def test_directions_survive() -> None:
    """Only the direction enters the objective: cosine at least 0.9999 on Gaussian rows."""
    for width in (24, 512):
        features = gaussian(16, 8, width)
        cosine = F.cosine_similarity(there_and_back(plain_int8(width), features), features, dim=-1)
        assert cosine.min() >= 0.9999
        half = there_and_back(codec_of("float16"), features)
        assert F.cosine_similarity(half, features, dim=-1).min() >= 1 - 1e-6


def outliers(count: int) -> torch.Tensor:
    """Like CLIP's: two channels far from zero, one that is ten times as loud as the others."""
    features = gaussian(count, 8, 512)
    features[..., 133] += 20
    features[..., 92] -= 8
    features[..., 7] *= 10
    return features


def test_outlier_channels_do_not_take_the_range() -> None:
    """Fitted to a sample, int8 keeps 0.9999 where one scale a token would keep 0.9995."""
    features = outliers(48)
    fitted = codec_of("int8").fitted(features[:16].flatten(0, 1))
    held = features[16:]
    cosine = F.cosine_similarity(there_and_back(fitted, held), held, dim=-1)
    assert cosine.mean() >= 0.99995
    assert cosine.min() >= 0.9998
    plain = F.cosine_similarity(there_and_back(plain_int8(512), held), held, dim=-1)
    assert plain.mean() < 0.9997


def test_a_dead_channel_of_the_sample_may_wake_up() -> None:
    """A channel that was silent in the sample is still stored when it is not."""
    sample = gaussian(64, 32)
    sample[:, 4] = 0
    features = gaussian(2, 3, 32)
    back = there_and_back(codec_of("int8").fitted(sample), features)
    assert back[..., 4].abs().max() > 0
    assert back.isfinite().all()


def test_an_unfitted_codec_does_not_encode() -> None:
    """Its tables are part of the store: without them codes mean nothing."""
    for name in ("int8", "pq:16"):
        with pytest.raises(CacheError, match="was not fitted"):
            codec_of(name).encode(gaussian(1, 2, 64))


@pytest.fixture(scope="module")
def low_rank() -> torch.Tensor:
    """Features with structure, as a teacher's have: 64 channels of 12 hidden ones and a little."""
    hidden = gaussian(60, 20, 12) @ torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    return hidden + 0.1 * gaussian(60, 20, 64)


def test_pq_keeps_directions_by_its_bytes(low_rank: torch.Tensor) -> None:
    """More bytes, nearer; the same fit in any process; faiss's thread count is given back."""
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(2)
    sample, held = low_rank[:40].flatten(0, 1), low_rank[40:]
    means = []
    for size in (16, 32):
        codec = codec_of(f"pq:{size}").fitted(sample)
        codes, _ = codec.encode(held)
        assert codes.shape == (20, 20, size)
        assert codec.tables["codebook"].shape == (size, 256, 64 // size)
        back = there_and_back(codec, held)
        means.append(float(F.cosine_similarity(back, held, dim=-1).mean()))
        again = codec_of(f"pq:{size}").fitted(sample)
        assert all(np.array_equal(again.tables[n], t) for n, t in codec.tables.items())
    assert 0.9 < means[0] < means[1]
    assert faiss.omp_get_max_threads() == 2


def test_pq_chooses_the_nearest_centroid(low_rank: torch.Tensor) -> None:
    """The encoder against faiss's own, and the rotation is orthogonal."""
    faiss = pytest.importorskip("faiss")
    codec = codec_of("pq:16").fitted(low_rank[:40].flatten(0, 1))
    rotation = codec.tables["rotation"].astype(np.float64)
    assert np.allclose(rotation @ rotation.T, np.eye(64), atol=1e-5)
    quantiser = faiss.ProductQuantizer(64, 16, 8)
    faiss.copy_array_to_vector(codec.tables["codebook"].ravel(), quantiser.centroids)
    units = F.normalize(low_rank[40:].flatten(0, 1), dim=1).numpy()
    expected = quantiser.compute_codes(np.ascontiguousarray(units @ codec.tables["rotation"].T))
    codes, _ = codec.encode(low_rank[40:])
    assert (codes.numpy().reshape(-1, 16) == expected).mean() > 0.999  # ties of rounding aside


def test_pq_says_what_it_needs(low_rank: torch.Tensor) -> None:
    """Enough tokens, and pieces that divide the channels."""
    pytest.importorskip("faiss")
    with pytest.raises(ConfigError, match="a sample of 100 tokens"):
        codec_of("pq:16").fitted(gaussian(100, 64))
    with pytest.raises(ConfigError, match=r"pq:64 with 48 channels.*--codec pq:16"):
        codec_of("pq").width(48)


def test_zero_and_tiny_tokens() -> None:
    """Nothing is divided by zero: a zero token stays zero, a subnormal one stays finite."""
    features = torch.zeros(1, 3, 8)
    features[0, 1] = 1e-44
    features[0, 2, 0] = 1e-30
    for codec in (plain_int8(8), codec_of("float16")):
        back = there_and_back(codec, features)
        assert back.isfinite().all()
        assert (back[0, 0] == 0).all()
    assert there_and_back(plain_int8(8), features)[0, 2, 0] == pytest.approx(1e-30, rel=1e-5)


def test_one_channel() -> None:
    """The narrowest token there is."""
    features = torch.tensor([[[3.0], [-2.0], [0.0]]])
    assert torch.allclose(there_and_back(plain_int8(1), features), features)


def test_unknown_codecs_are_refused() -> None:
    """With the nearest name; `pq` alone means 64 bytes a token."""
    assert codec_of("pq") is CODECS["pq:64"]
    assert set(CODECS) == {"int8", "float16", "pq:16", "pq:32", "pq:64", "pq:128"}
    assert all(codec_of(name).name == name for name in CODECS)
    for wrong, near in (("int-8", "int8"), ("float61", "float16"), ("Float16", "float16")):
        with pytest.raises(ConfigError) as error:
            codec_of(wrong)
        assert near in error.value.fix
        assert error.value.expected == " or ".join(CODECS)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_pq_is_decoded_in_float32_under_autocast(half: torch.dtype) -> None:
    """The student trains in half precision; its targets are those of float32, to the bit."""
    draw = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(32, 32, generator=draw))
    book = torch.randn(16, 256, 2, generator=draw)
    codec = codec_of("pq:16").restored({"rotation": rotation.numpy(), "codebook": book.numpy()})
    codes = torch.randint(0, 256, (2, 5, 16), dtype=torch.uint8, generator=draw)
    expected = codec.decode(codes, None)
    with torch.autocast("cpu", half):
        decoded = codec.decode(codes, None)
        assert (decoded @ decoded.mT).dtype == half  # the product is one that autocast casts
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, expected)
