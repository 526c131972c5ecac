"""What a prediction is compared with, against literal restatements of the equations."""

from __future__ import annotations

import math

import pytest
import torch

from milan.objectives.features import feature_regression
from milan.objectives.pixels import patchify, pixel_regression


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(prediction: torch.Tensor, features: torch.Tensor) -> float:
    """MILAN eq. 1, token by token: squared distance of unit vectors, mean over all tokens."""
    total = 0.0
    for p, f in zip(
        prediction.double().flatten(0, 1), features.double().flatten(0, 1), strict=True
    ):
        p, f = p / p.norm(), f / f.norm()
        total += (p - f).square().sum().item()
    return total / (prediction.shape[0] * prediction.shape[1])


def test_feature_regression_is_the_equation() -> None:
    """And stays within 0 (same direction) and 4 (opposite)."""
    prediction, features = randn(3, 5, 8), randn(3, 5, 8, seed=1)
    loss = feature_regression(prediction, features)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(prediction, features), abs=1e-6)
    assert feature_regression(features, features).item() == pytest.approx(0, abs=1e-6)
    assert feature_regression(-features, features).item() == pytest.approx(4, abs=1e-6)


@pytest.mark.parametrize(
    "wrong", [[0], [1, 2], [3, 4, 5, 6], [0, 3], list(range(7))],
    ids=["class", "visible", "masked", "class and masked", "all"],
)  # fmt: skip
def test_all_tokens_weigh_alike(wrong: list[int]) -> None:
    """Class, visible and masked tokens: each wrong one costs 4 / T, wherever it stands."""
    features = randn(2, 7, 8)
    prediction = features.clone()
    prediction[:, wrong] *= -1
    expected = 4 * len(wrong) / 7
    assert feature_regression(prediction, features).item() == pytest.approx(expected, abs=1e-6)
    prediction = features.clone()
    prediction[0, wrong] *= -1  # in one of two views
    assert feature_regression(prediction, features).item() == pytest.approx(expected / 2, abs=1e-6)
    loss = feature_regression(prediction.requires_grad_(), features)
    loss.backward()
    assert prediction.grad is not None


def test_gradient_reaches_every_token() -> None:
    """A token without gradient would be predicted by chance."""
    prediction = randn(2, 7, 8).requires_grad_()
    feature_regression(prediction, randn(2, 7, 8, seed=1)).backward()
    assert prediction.grad is not None
    assert (prediction.grad.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("factor", [17.0, 1e-3, 1e4])
def test_only_directions_matter(factor: float) -> None:
    """int8's scales, or a teacher's temperature, must not change the loss."""
    prediction, features = randn(2, 5, 16), randn(2, 5, 16, seed=1)
    loss = feature_regression(prediction, features)
    assert feature_regression(prediction, features * factor).item() == pytest.approx(
        loss.item(), abs=1e-6
    )
    assert feature_regression(prediction * factor, features).item() == pytest.approx(
        loss.item(), abs=1e-6
    )


def test_zero_vectors_are_finite() -> None:
    """Loss and gradient: a zero has no direction, and counts as at right angles."""
    prediction, features = randn(1, 4, 8), randn(1, 4, 8, seed=1)
    prediction[0, 0], features[0, 1], prediction[0, 2], features[0, 2] = 0, 0, 0, 0
    prediction.requires_grad_()
    loss = feature_regression(prediction, features)
    loss.backward()
    assert math.isfinite(loss.item())
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    right_angles = feature_regression(torch.zeros(1, 3, 4), torch.ones(1, 3, 4))
    assert right_angles.item() == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_compared_in_float32(dtype: torch.dtype) -> None:
    """Squares of a half overflow at 256: long features must not become infinite."""
    prediction, features = (100 * randn(2, 5, 512, seed=s) for s in (0, 1))
    prediction, features = prediction.to(dtype), features.to(dtype)
    loss = feature_regression(prediction, features)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(prediction, features), abs=1e-5)
    mixed = feature_regression(prediction.float(), features)
    assert mixed.item() == pytest.approx(loss.item(), abs=1e-6)


# --- pixels: restated from facebookresearch/mae, models_mae.py ------------------------------------


def mae_patchify(imgs: torch.Tensor, p: int) -> torch.Tensor:
    h = w = imgs.shape[2] // p
    x = imgs.reshape(shape=(imgs.shape[0], 3, h, p, w, p))
    x = torch.einsum("nchpwq->nhwpqc", x)
    return x.reshape(shape=(imgs.shape[0], h * w, p**2 * 3))


def mae_loss(imgs: torch.Tensor, pred: torch.Tensor, mask: torch.Tensor, p: int) -> torch.Tensor:
    """forward_loss with norm_pix_loss; mask: 0 is keep, 1 is remove."""
    target = mae_patchify(imgs, p)
    mean = target.mean(dim=-1, keepdim=True)
    var = target.var(dim=-1, keepdim=True)
    target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = (pred - target) ** 2
    loss = loss.mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def hidden_patches(count: int, patches: int) -> torch.Tensor:
    """[B, N] bool, rows of unequal numbers of masked patches."""
    return randn(count, patches, seed=3) > torch.linspace(-1, 0.5, count)[:, None]


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (24, 4), (8, 8)])
def test_pixels_are_maes(size: int, patch: int) -> None:
    """The same number as MAE's code, and its patchify to the bit."""
    images = randn(3, 3, size, size)
    patches = (size // patch) ** 2
    hidden = hidden_patches(3, patches)
    hidden[0, 0] = True
    prediction = randn(3, 1 + patches, patch * patch * 3, seed=2)
    assert torch.equal(patchify(images, patch), mae_patchify(images, patch))
    ours = pixel_regression(prediction, images, hidden, patch=patch)
    theirs = mae_loss(images, prediction[:, 1:], hidden.float(), patch)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert pixel_regression(prediction.half(), images, hidden, patch=patch).dtype == torch.float32


def test_patches_are_where_they_are() -> None:
    """Raster order, rows before columns, colours last: patch 1 is right of patch 0."""
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    expected = images[1, :, 0:4, 4:8].permute(1, 2, 0).reshape(-1)
    assert torch.equal(patches[1, 1], expected)


def test_only_masked_patches_count() -> None:
    """What the student sees would be copied; the class token is not looked at."""
    images, hidden = randn(2, 3, 32, 32), hidden_patches(2, 16)
    target = patchify(images, 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    exact = torch.cat([randn(2, 1, 192), target], dim=1)
    loss = pixel_regression(exact, images, hidden, patch=8)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    seen = exact.clone()
    seen[:, 1:][~hidden] += 100
    seen[:, 0] += 100
    assert pixel_regression(seen, images, hidden, patch=8).item() == pytest.approx(0, abs=1e-9)
    one = exact.clone()
    row, patch = hidden.nonzero()[0].tolist()
    one[row, 1 + patch] += 3
    expected = 9 / hidden.sum().item()
    assert pixel_regression(one, images, hidden, patch=8).item() == pytest.approx(expected)


def test_flat_patches_are_finite() -> None:
    """A patch of one colour has no variance: white borders are common."""
    loss = pixel_regression(
        torch.zeros(1, 5, 48), torch.ones(1, 3, 8, 8), torch.ones(1, 4).bool(), patch=4
    )
    assert loss.item() == pytest.approx(0, abs=1e-6)
