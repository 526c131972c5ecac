"""Targets of another grid: a thing stays where it is in the view."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import STUDENT
from torch.nn import functional as F

import milan
from milan.config import PretrainConfig
from milan.core.rng import mask_noise
from milan.data.dataset import CachedDataset
from milan.data.loader import training_loader
from milan.data.order import order_of
from milan.data.sampler import StepSampler
from milan.errors import ConfigError
from milan.models.student import Student
from milan.objectives.resample import resampled_attention, resampled_features
from milan.store.cache import TargetCache
from milan.training.build import Settings, resolve_defaults, student_of

PAIRS = [(16, 14), (7, 14), (14, 16), (16, 4), (4, 6), (5, 5), (1, 3)]
"""Patches along an edge, the teacher's and the student's."""


def ramp(grid: int) -> torch.Tensor:
    """Tokens [1, 1 + N, 3]: x and y of each patch's centre as a share of the view, and one."""
    centres = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    patches = torch.stack([x, y, torch.ones_like(x)], dim=-1).reshape(1, -1, 3)
    return torch.cat([torch.full((1, 1, 3), 7.0), patches], dim=1)


@pytest.mark.parametrize(("old", "new"), PAIRS[:-1])
def test_a_gradient_stays_where_it_is(old: int, new: int) -> None:
    """No flip, no transpose, no half-pixel shift: inside, a ramp is the other grid's ramp."""
    got, expected = resampled_features(ramp(old), new * new, 1), ramp(new)
    assert got.shape == expected.shape
    assert torch.equal(got[:, 0], ramp(old)[:, 0])
    assert torch.allclose(got[..., 2][:, 1:], torch.ones(1, new * new), atol=1e-6)
    # At the edges there is nothing beyond to interpolate with, for any filter.
    reach = max(old / new, 1)
    inner = (expected[0, 1:, :2] * old >= reach - 0.5 + 1e-3) & (
        expected[0, 1:, :2] * old <= old - reach + 0.5 - 1e-3
    )
    assert inner.any()
    # A filter of fractional width, sampled, is off by less than a tenth of a patch.
    bound = 1e-5 if old <= new or old % new == 0 else 0.1 / old
    assert (got - expected)[0, 1:, :2][inner].abs().max() < bound


@pytest.mark.parametrize(("teacher", "student"), [(14, 16), (32, 16), (16, 14), (16, 32)])
def test_a_gradient_image_seen_in_patches_of_two_sizes(teacher: int, student: int) -> None:
    """What the teacher's patches saw, resampled, is what the student's patches see, in place."""
    x = torch.linspace(0, 1, 224)
    image = torch.stack([x.expand(224, 224), x[:, None].expand(224, 224), x.square() + x[:, None]])

    def seen(patch: int) -> torch.Tensor:
        tokens = F.avg_pool2d(image[None], patch).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens], dim=1)

    new = 224 // student
    got = resampled_features(seen(teacher), new * new, 1)[:, 1:].view(new, new, 3)
    apart = (got - seen(student)[:, 1:].view(new, new, 3)).abs()
    # At the edges there is nothing beyond to interpolate with.
    edge = -(-teacher // student)
    assert apart[edge:-edge, edge:-edge].max() < 0.25 * max(teacher, student) / 224
    assert apart.max() < max(teacher, student) / 224


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_features_are_torchs_bilinear(old: int, new: int) -> None:
    """The same filter as torch's, half-pixel centres, antialiased where the grid gets coarser."""
    features = torch.randn(2, 1 + old * old, 5, generator=torch.Generator().manual_seed(0))
    grid = features[:, 1:].transpose(1, 2).reshape(2, 5, old, old)
    theirs = F.interpolate(
        grid, size=(new, new), mode="bilinear", align_corners=False, antialias=new < old
    )
    got = resampled_features(features, new * new, 1)[:, 1:]
    assert (got - theirs.flatten(2).transpose(1, 2)).abs().max() < 1e-5


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_attention_is_spread_over_its_area(old: int, new: int) -> None:
    """Positive, the same sum, the same mass in every corner; within a patch it is even."""
    weights = torch.randn(3, old * old, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    weights[:, 0] = 1e-30
    got = resampled_attention(weights, new * new, 1)
    assert got.shape == (3, new * new)
    assert (got > 0).all()
    assert torch.allclose(got.sum(dim=1), weights.sum(dim=1), atol=1e-6)
    if old % 2 == new % 2 == 0:
        for rows in (slice(None, 1), slice(1, None)):
            a = weights.view(3, 2, old // 2, 2, old // 2)[:, rows, :, :1].sum((1, 2, 3, 4))
            b = got.view(3, 2, new // 2, 2, new // 2)[:, rows, :, :1].sum((1, 2, 3, 4))
            assert torch.allclose(a, b, atol=1e-6)
    if new % old == 0:
        for axis in (0, 1):
            before = (weights * ramp(old)[0, 1:, axis]).sum(dim=1)
            after = (got * ramp(new)[0, 1:, axis]).sum(dim=1)
            assert torch.allclose(before, after, atol=1e-6)


def test_halves_are_not_computed_in_halves() -> None:
    """Training calls it under autocast; a density in bfloat16 would lose a hundredth."""
    weights = torch.rand(1, 49) + 0.01
    expected = resampled_attention(weights, 196, 1), resampled_features(ramp(7), 196, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got = resampled_attention(weights, 196, 1), resampled_features(ramp(7), 196, 1)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def settings_of(patch: int, **changes: object) -> Settings:
    args = {**STUDENT["model_args"], "patch_size": patch}
    config = PretrainConfig(
        model_args=args, decoder=STUDENT["decoder"], batch_size=8, epochs=1, **changes
    )  # type: ignore[arg-type]
    return resolve_defaults(config, torch.device("cpu"))


@pytest.mark.parametrize("patch", [4, 16])
@pytest.mark.parametrize("objective", ["milan", "pixels"])
def test_student_of_another_grid_trains(cache: TargetCache, patch: int, objective: str) -> None:
    """Noise of the student's patches, targets resampled; the loss is that of the definition."""
    settings = settings_of(patch, objective=objective, mask_ratio=0.5)
    dataset = CachedDataset(cache)
    student = student_of(settings, cache)
    assert student.patches == (32 // patch) ** 2 != cache.spec.tokens - 1
    order = order_of(cache, seed=0, batch_size=8)
    sampler = StepSampler(order, start=0, stop=1, micro=8)
    (batch,) = training_loader(
        dataset, sampler, features=objective == "milan", num_workers=0, patches=student.patches
    )
    rows, views = batch.rows.numpy(), batch.views.numpy()
    noise = mask_noise(0, rows * 0, rows, views, student.patches)
    assert torch.equal(batch.noise, torch.from_numpy(noise))
    objective = settings.objective(cache)
    loss = objective.loss(objective.predict(student, batch))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_a_run_on_another_grid(store: Path, tmp_path: Path) -> None:
    """`pretrain` itself: the encoder that it leaves has the student's patches."""
    run = tmp_path / "run"
    milan.pretrain(
        str(store), out=str(run), epochs=2, batch_size=8, num_workers=0, lr=1e-3,
        model_args={**STUDENT["model_args"], "patch_size": 4}, decoder=STUDENT["decoder"],
    )  # fmt: skip
    assert milan.load_encoder(run).patch_embed.grid_size == (8, 8)


def test_patches_that_do_not_tile_the_view(cache: TargetCache) -> None:
    """Still refused, before anything is written."""
    with pytest.raises(ConfigError, match="do not tile 32"):
        student_of(settings_of(5), cache)
    with pytest.raises(ConfigError, match="visible"):
        student_of(settings_of(16, mask_ratio=0.9), cache)


def test_what_a_student_is_asked_about_its_patches(cache: TargetCache) -> None:
    """With the model's other arguments: they may be what makes a student of it."""
    siglip = {**STUDENT["model_args"], "global_pool": "avg"}
    del siglip["patch_size"]
    config = PretrainConfig("", model="vit_base_patch16_siglip_224", model_args=siglip)

    def student(**changes: Any) -> Student:
        return student_of(resolve_defaults(replace(config, **changes), torch.device("cpu")), cache)

    assert student(objective="pixels").patches == 4
    with pytest.raises(ConfigError, match="global_pool=avg"):
        student(model_args={"depth": 1})
    with pytest.raises(ConfigError, match="img_size=224; expected: 32"):
        student(model_args=siglip | {"img_size": 224})
