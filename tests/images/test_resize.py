"""The compiled resize has Pillow's values, and leaves to Pillow what it has not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from milan.core.size import Size, height_width
from milan.images import resize as resizing
from milan.images.resize import resize
from milan.images.views import View, render

compiled = pytest.mark.skipif(resizing._library() is None, reason="installed without a compiler")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """What a process found out about its Pillow is found out again."""
    for known in (resizing._rule, resizing._tried):
        known.cache_clear()
    yield
    for known in (resizing._rule, resizing._tried):
        known.cache_clear()


def pillows(pixels: np.ndarray, size: Size, flip: bool) -> np.ndarray:
    height, width = height_width(size)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[:, ::-1] if flip else np.asarray(resized)


SHAPES = [
    (1, 1, 8), (1, 40, 8), (40, 1, 8), (8, 8, 8), (8, 30, 8), (30, 8, 8), (3, 5, 32), (120, 90, 1),
    (33, 65, 32), (34, 33, 32), (35, 33, 32), (64, 48, 32), (65, 48, 32), (500, 375, 224),
    (375, 500, 224), (224, 300, 224), (300, 224, 224), (201, 180, 224), (900, 90, 32),
]  # fmt: skip


@compiled
@pytest.mark.parametrize("flip", [False, True])
def test_the_values_are_pillows(flip: bool) -> None:
    """Of noise, which meets every rounding: smaller, oblong, either direction first, one pixel."""
    rng = np.random.default_rng(7)
    random = [(*rng.integers(1, 90, 2), int(rng.integers(1, 50))) for _ in range(60)]
    wide = [(h, w, (int(a), int(b))) for h, w, a, b in rng.integers(1, 70, (150, 4))]
    for height, width, size in [*SHAPES, *random, *wide]:
        whole = rng.integers(0, 256, (height + 2, width + 3, 3), np.uint8)
        cut = whole[1 : 1 + height, 2 : 2 + width]
        ours = resize(cut, size, flip=flip)
        assert ours is not None
        assert np.array_equal(ours, pillows(cut, size, flip)), (height, width, size)
    turned = whole.swapaxes(0, 1)[:, ::-1]
    assert np.array_equal(resize(turned, 16), pillows(turned, 16, False))


@compiled
def test_both_orders_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's before 13 too; one that follows no rule resizes by itself."""
    first, second = resizing._RULES
    tall = np.random.default_rng(0).integers(0, 256, (90, 30, 3), np.uint8)
    followed = resizing._rule()
    assert followed is not None
    monkeypatch.setattr(resizing, "_RULES", (second, first))
    resizing._rule.cache_clear()
    assert resizing._rule() == 1 - followed
    assert np.array_equal(resize(tall, 20), pillows(tall, 20, False))
    monkeypatch.setattr(resizing, "_RULES", (lambda rows, columns: rows[0] < columns[0],))
    resizing._rule.cache_clear()
    assert resize(tall, 20) is None


@compiled
def test_weights_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one size: by the last bit of one weight that counts."""
    right = resizing._weights

    def wrong(inputs: int, outputs: int, flip: bool = False) -> resizing._Weights:
        weights = right(inputs, outputs, flip)
        if inputs == 70:
            weights.arrays[1][3] += 1 << 14
        return weights

    monkeypatch.setattr(resizing, "_weights", wrong)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 60, 3), np.uint8)
    assert resize(pixels, 20) is None
    assert resize(pixels[:69], 20) is not None
    view = View(0, 0, 70, 60, True)
    assert np.array_equal(render(pixels, view, size=20), pillows(pixels, 20, True))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow renders the same view."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 60, 3), np.uint8)
    view = View(3, 4, 60, 50, True)
    expected = render(pixels, view, size=20)
    monkeypatch.setattr(resizing, "_library", lambda: None)
    resizing._rule.cache_clear()
    assert resize(pixels, 20) is None
    assert np.array_equal(render(pixels, view, size=20), expected)
    assert np.array_equal(render(Image.fromarray(pixels), view, size=20), expected)


def test_other_pixels_are_pillows() -> None:
    """Grey ones, and those with transparency."""
    for mode in ("L", "RGBA"):
        image = Image.effect_noise((50, 40), 80).convert(mode)
        assert render(image, View(0, 0, 40, 50, False), size=16).shape[:2] == (16, 16)
