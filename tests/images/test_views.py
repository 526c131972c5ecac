"""The law of views: pure, the same on every machine, torchvision's in law and in pixels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from milan.errors import ConfigError
from milan.images.views import View, ViewSpec, centre_view, checksum, render, view_of

# (seed, row, view, height, width) -> (top, left, height, width, flip); never to be changed: stores
# and runs were made with these.
GOLDEN = {
    (0, 0, 0, 480, 640): (27, 206, 436, 389, 0),
    (0, 0, 1, 480, 640): (37, 194, 425, 408, 0),
    (0, 1, 0, 480, 640): (146, 134, 277, 283, 1),
    (1, 0, 0, 480, 640): (38, 5, 441, 338, 1),
    (7, 123456, 3, 333, 500): (13, 155, 280, 257, 0),
    (2**31, 2_999_999, 7, 1024, 768): (148, 140, 598, 583, 0),
    (3, 5, 2, 28, 28): (2, 0, 16, 15, 1),
    (0, 9, 0, 1, 1): (0, 0, 1, 1, 1),
    (0, 9, 0, 1, 3000): (0, 1499, 1, 1, 1),
    (0, 9, 1, 3000, 1): (1499, 0, 1, 1, 0),
    (11, 42, 1, 2999, 3000): (1217, 905, 1752, 1463, 1),
}


def picture(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """Noise: the content on which resizing rules differ most."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def crops(count: int, height: int, width: int, spec: ViewSpec) -> np.ndarray:
    """[count, 5]: views of as many rows."""
    views = [view_of(spec, row, view=row % 7, height=height, width=width) for row in range(count)]
    return np.array([view.numbers() for view in views])


@pytest.mark.parametrize("address", GOLDEN)
def test_views_are_frozen(address: tuple[int, ...]) -> None:
    """A store made elsewhere, or last year, must be replayed exactly."""
    seed, row, view, height, width = address
    spec = ViewSpec(seed=seed)
    drawn = view_of(spec, row, view=view, height=height, width=width)
    assert drawn.numbers() == GOLDEN[address]
    assert drawn == view_of(spec, row, view=view, height=height, width=width)
    assert View.of(np.array(drawn.numbers(), np.int32)) == drawn


def test_views_need_no_state() -> None:
    """Seeding, drawing other views before, or another process change nothing."""
    spec = ViewSpec(seed=7)
    first = [view_of(spec, 5, view=v, height=300, width=200).numbers() for v in range(4)]
    np.random.seed(3)  # noqa: NPY002 - the point is that it does not matter
    torch.manual_seed(3)
    for row in range(20):
        view_of(spec, row, view=0, height=100, width=100)
    backwards = [view_of(spec, 5, view=v, height=300, width=200).numbers() for v in (3, 2, 1, 0)]
    assert backwards[::-1] == first
    assert len(set(first)) == 4
    code = (
        "from milan.images.views import ViewSpec, view_of\n"
        "print([view_of(ViewSpec(seed=7), 5, view=v, height=300, width=200).numbers()"
        " for v in range(4)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(first)


def test_a_view_depends_on_its_address_only() -> None:
    """Neither K nor shard size nor the rendered size is an argument; every part of it counts."""
    spec = ViewSpec(seed=1)
    drawn = view_of(spec, 3, view=2, height=300, width=300)
    assert drawn == view_of(ViewSpec(size=32, seed=1), 3, view=2, height=300, width=300)
    others = [
        view_of(ViewSpec(seed=2), 3, view=2, height=300, width=300),
        view_of(spec, 2, view=3, height=300, width=300),
        view_of(spec, 3, view=1, height=300, width=300),
        view_of(spec, 3, view=2, height=301, width=299),
    ]
    assert drawn not in others


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.2, 1.0)), (224, 224, (0.08, 1.0)), (700, 300, (0.2, 0.6))],
)
def test_law_is_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    """Areas, ratios, places: means and quantiles of 4,000 draws are RandomResizedCrop's."""
    count, spec = 4000, ViewSpec(scale=scale, seed=5)
    ours = crops(count, height, width, spec)[:, :4].astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [
            RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio))
            for _ in range(count)
        ],
        float,
    )

    def figures(crop: np.ndarray) -> np.ndarray:
        top, left, h, w = crop.T
        # Where a crop may lie depends on its size: its place is told as a share of the room left.
        rows, columns = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return np.stack([h * w / (height * width), np.log(w / h), top / rows, left / columns])

    # Two draws of one law differ by at most this share of the ranks (Kolmogorov-Smirnov, 0.1 %).
    for a, b in zip(figures(ours), figures(theirs), strict=True):
        assert abs(a.mean() - b.mean()) < 5 * b.std() * (2 / count) ** 0.5
        grid = np.sort(np.concatenate([a, b]))
        gap = [np.searchsorted(np.sort(x), grid, side="right") / count for x in (a, b)]
        assert np.abs(gap[0] - gap[1]).max() < 1.95 * (2 / count) ** 0.5


def test_flips_are_as_likely_as_asked() -> None:
    """And independent of the crop: the first number of an address is the flip's own."""
    for share in (0.0, 0.3, 0.5, 1.0):
        flips = crops(4000, 100, 100, ViewSpec(hflip=share))[:, 4]
        assert abs(flips.mean() - share) < 0.03
    drawn = crops(4000, 100, 100, ViewSpec())
    for column in range(4):
        assert abs(np.corrcoef(drawn[:, column], drawn[:, 4])[0, 1]) < 0.06


def test_crops_stay_inside() -> None:
    """Pillow pads a crop outside the picture with black and says nothing."""
    generator = np.random.default_rng(2)
    sizes = generator.integers(1, 3001, (400, 2)).tolist()
    sizes += [[1, 1], [1, 2], [2, 1], [1, 3000], [3000, 1], [3, 3], [2, 3000], [3000, 7]]
    for row, (height, width) in enumerate(sizes):
        for spec in (ViewSpec(seed=1), ViewSpec(scale=(1, 1)), ViewSpec(scale=(1e-6, 1e-6))):
            view = view_of(spec, row, view=row % 3, height=height, width=width)
            assert view.height >= 1
            assert view.width >= 1
            assert 0 <= view.top <= height - view.height
            assert 0 <= view.left <= width - view.width


@pytest.mark.parametrize(
    ("height", "width"), [(10, 3000), (3000, 10), (1, 3000), (3000, 1), (100, 999), (999, 100)]
)
def test_fallback_is_torchvisions(height: int, width: int) -> None:
    """Of a very long picture no crop of its area fits: the largest central one is taken."""
    spec = ViewSpec(scale=(0.9, 1.0))
    torch.manual_seed(0)
    theirs = RandomResizedCrop.get_params(
        torch.empty(3, height, width), list(spec.scale), list(spec.ratio)
    )
    ours = view_of(spec, 1, view=0, height=height, width=width)
    assert ours.numbers()[:4] == tuple(theirs)


def test_fallback_of_a_fitting_picture_is_all_of_it() -> None:
    """The third branch of torchvision's fallback: ratio within limits, no try fits."""
    spec = ViewSpec(scale=(1.0, 1.0), ratio=(0.5, 1.0))
    found = {view_of(spec, r, view=0, height=90, width=90).numbers()[:4] for r in range(50)}
    assert found == {(0, 0, 90, 90)}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("view", "size"),
    [
        ((0, 0, 60, 80), 32),  # smaller
        ((11, 7, 9, 13), 32),  # larger
        ((11, 7, 32, 32), 32),  # as it is
        ((59, 79, 1, 1), 8),
        ((3, 0, 50, 2), 16),
    ],
)
def test_pixels_are_torchvisions(view: tuple[int, int, int, int], size: int, flip: bool) -> None:
    """To the last bit: crop, resize with antialiased bicubic, flip, on a PIL image."""
    image = picture()
    theirs = tv.resized_crop(image, *view, [size, size], InterpolationMode.BICUBIC)
    theirs = np.asarray(tv.hflip(theirs) if flip else theirs)
    ours = render(image, View(*view, flip), size=size)
    assert ours.dtype == np.uint8
    assert ours.shape == (size, size, 3)
    assert ours.flags.c_contiguous
    assert np.array_equal(ours, theirs)


def test_what_lies_outside_a_crop_does_not_show() -> None:
    """Pillow's `resize(box=…)` would look past the edge of the crop; render does not."""
    image = picture()
    other = picture(seed=1)
    other.paste(image.crop((20, 10, 50, 40)), (20, 10))
    view = View(10, 20, 30, 30, True)
    assert np.array_equal(render(image, view, size=16), render(other, view, size=16))


def test_a_flip_is_a_mirror() -> None:
    """Left becomes right after resizing: a mirrored view is the plain one, mirrored."""
    plain = render(picture(), View(5, 6, 40, 50, False), size=24)
    mirrored = render(picture(), View(5, 6, 40, 50, True), size=24)
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert not np.array_equal(mirrored, plain)


def test_checksum_sees_one_pixel() -> None:
    """It is the proof of a replay: CRC-32C, another for one step of one channel."""
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert checksum(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    for at in ((0, 0, 0), (3, 3, 2), (1, 2, 1)):
        changed = pixels.copy()
        changed[at] += 1
        assert checksum(changed) != checksum(pixels)
    assert checksum(np.ascontiguousarray(pixels[:, ::-1])) != checksum(pixels)


def test_law_survives_json() -> None:
    """A spec read back from a store equals the one that wrote it."""
    import json

    spec = ViewSpec(size=96, scale=(1, 1), ratio=(0.5, 2), hflip=0, seed=9)
    law = json.loads(json.dumps(spec.law()))
    assert ViewSpec.from_law(law) == spec
    assert law == json.loads(json.dumps(ViewSpec.from_law(law).law()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0, 1)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.5)},
        {"ratio": (2, 1)},
        {"ratio": (0, 1)},
        {"hflip": 1.5},
        {"hflip": -0.1},
        {"size": 0},
        {"scale": (float("nan"), 1)},
    ],
)
def test_impossible_laws_are_refused(wrong: dict) -> None:
    """Else every crop would be the fallback, or a negative number of pixels."""
    with pytest.raises(ConfigError):
        ViewSpec(**wrong)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (1, 1), (30, 200), (200, 31)])
def test_centre_view(height: int, width: int) -> None:
    """A central square inside the picture; 224 of 256."""
    view = centre_view(height, width)
    assert view.height == view.width == max(1, round(min(height, width) * 0.875))
    assert abs(view.top - (height - view.height - view.top)) <= 1
    assert abs(view.left - (width - view.width - view.left)) <= 1
    assert not view.flip
