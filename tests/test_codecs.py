"""How features are stored: what is exact, what is off by how much, and what never occurs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from milan.codecs import CODECS, Codec, codec_of
from milan.errors import ConfigError


def there_and_back(codec: Codec, features: torch.Tensor) -> torch.Tensor:
    """Through numpy, as a store holds it."""
    codes, scale = codec.encode(features)
    assert isinstance(codes, np.ndarray)
    assert codes.dtype == codec.dtype
    assert (scale is not None) == codec.scaled
    if scale is not None:
        assert scale.dtype == np.float32
        assert scale.shape == codes.shape[:-1]
        assert (scale > 0).all()
    return codec.decode(torch.from_numpy(codes), None if scale is None else torch.from_numpy(scale))


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_every_half_survives_float16() -> None:
    """All 63,488 finite halves, subnormals and negative zero among them: bit for bit."""
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = torch.from_numpy(bits[np.isfinite(bits)].reshape(2, 31, -1))
    codec = codec_of("float16")
    codes, scale = codec.encode(halves.float())
    assert scale is None
    assert np.array_equal(codes.view(np.int16), halves.numpy().view(np.int16))
    assert torch.equal(there_and_back(codec, halves.float()), halves.float())
    assert there_and_back(codec, halves).dtype == torch.float32


def test_float16_rounds_to_nearest() -> None:
    """Relative error at most 2^-11 in the normal range."""
    features = gaussian(4, 9, 64)
    error = (there_and_back(codec_of("float16"), features) - features).abs()
    assert (error <= features.abs() * 2**-11 + 2**-25).all()
    assert np.isinf(codec_of("float16").encode(torch.full((1, 1, 1), 1e5))[0]).all()


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_off_by_half_a_step_at_most(factor: float, dtype: torch.dtype) -> None:
    """A step is a 127th of the token's largest channel; -128, the fill value, never occurs."""
    features = (gaussian(8, 5, 96) * factor).to(dtype)
    if not features.isfinite().all():
        features = gaussian(8, 5, 96).to(dtype)
    codec = codec_of("int8")
    codes, scale = codec.encode(features)
    assert scale is not None
    assert codes.min() >= -127
    assert codes.max() <= 127
    back = codec.decode(torch.from_numpy(codes), torch.from_numpy(scale))
    assert back.dtype == torch.float32
    step = features.float().abs().amax(dim=-1, keepdim=True) / 127
    tiny = torch.finfo(torch.float32).tiny
    assert ((back - features.float()).abs() <= 0.5 * step.clamp_min(tiny) * (1 + 1e-5)).all()
    assert codec.fill == -128


def test_the_largest_channel_is_kept() -> None:
    """Of either sign: it becomes 127 steps, so a token's length hardly changes."""
    features = gaussian(3, 4, 32)
    features[0, 0, 5] = -40.0
    codes, _ = codec_of("int8").encode(features)
    assert codes[0, 0, 5] == -127
    assert (np.abs(codes.astype(int)).max(axis=-1) == 127).all()
    back = there_and_back(codec_of("int8"), features)
    largest = features.abs().argmax(dim=-1, keepdim=True)
    assert torch.allclose(back.gather(2, largest), features.gather(2, largest), rtol=1e-6)


def test_each_token_has_its_own_scale() -> None:
    """A loud token must not cost a quiet one its precision."""
    features = gaussian(2, 6, 64)
    loud = features.clone()
    loud[:, 0] *= 1e4
    quiet, after = (there_and_back(codec_of("int8"), f)[:, 1:] for f in (features, loud))
    assert torch.equal(quiet, after)


def test_directions_survive() -> None:
    """Only the direction enters the objective: cosine at least 0.9999 on Gaussian rows."""
    for width in (24, 512):
        features = gaussian(16, 8, width)
        cosine = F.cosine_similarity(there_and_back(codec_of("int8"), features), features, dim=-1)
        assert cosine.min() >= 0.9999
        half = there_and_back(codec_of("float16"), features)
        assert F.cosine_similarity(half, features, dim=-1).min() >= 1 - 1e-6


def test_outliers_cost_what_the_step_says() -> None:
    """CLIP has channels ten times as loud as others; the rest loses bits, not the direction."""
    features = gaussian(16, 8, 512)
    features[..., 3] = 10
    back = there_and_back(codec_of("int8"), features)
    assert F.cosine_similarity(back, features, dim=-1).min() >= 0.999
    rest = features[..., 4:]
    assert F.cosine_similarity(back[..., 4:], rest, dim=-1).min() >= 0.999


def test_zero_and_tiny_tokens() -> None:
    """Nothing is divided by zero: a zero token stays zero, a subnormal one stays finite."""
    features = torch.zeros(1, 3, 8)
    features[0, 1] = 1e-44
    features[0, 2, 0] = 1e-30
    for name in CODECS:
        back = there_and_back(codec_of(name), features)
        assert back.isfinite().all()
        assert (back[0, 0] == 0).all()
    assert there_and_back(codec_of("int8"), features)[0, 2, 0] == pytest.approx(1e-30, rel=1e-5)


def test_one_channel() -> None:
    """The narrowest token there is."""
    features = torch.tensor([[[3.0], [-2.0], [0.0]]])
    assert torch.allclose(there_and_back(codec_of("int8"), features), features)


def test_unknown_codecs_are_refused() -> None:
    """With the nearest name; `pq` is for later."""
    assert set(CODECS) == {"int8", "float16"}
    assert all(codec_of(name).name == name for name in CODECS)
    for wrong, near in (("int-8", "int8"), ("float61", "float16"), ("Float16", "float16")):
        with pytest.raises(ConfigError) as error:
            codec_of(wrong)
        assert near in error.value.fix
        assert error.value.expected == "int8 or float16"
