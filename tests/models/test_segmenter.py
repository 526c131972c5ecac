"""The segmenter's parts: positions for any grid, the pyramid, windows over whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from milan.errors import CacheError, ConfigError
from milan.evaluation.iou import Areas, agreement, areas, confusion
from milan.models.encoder import build_encoder, create_vit, encode, sincos_positions
from milan.models.segmenter import (
    Segmenter,
    build_head,
    classes_at,
    create_encoder,
    fitted,
    load_segmenter,
    predict_masks,
    prepared,
    set_window,
    slide,
    starts,
)
from milan.models.weights import resampled

ARGS: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize("window", [(32, 64), (64, 32), (16, 64), (48, 48)])
def test_positions_for_any_grid(window: tuple[int, int]) -> None:
    """Learned ones as timm resamples them; sine-cosine ones are computed for the grid.

    16 x 64 has as many patches as the 32 x 32 that it was made for.
    """
    made = create_vit("vit_tiny_patch16_224", img_size=32, args=ARGS)
    ours = create_encoder("vit_tiny_patch16_224", ARGS, size=32)
    set_window(ours, window)
    ours.load_state_dict(resampled(made.state_dict(), ours, 1), strict=True)
    theirs = create_vit("vit_tiny_patch16_224", img_size=32, args=ARGS)
    theirs.load_state_dict(made.state_dict())
    theirs.set_input_size(img_size=window)
    images = torch.randn(1, 3, *window)
    made.dynamic_img_size = made.patch_embed.dynamic_img_pad = True
    with torch.no_grad():
        expected = theirs.eval().forward_features(images)
        assert torch.equal(ours.eval().forward_features(images), expected)
    sincos = build_encoder("vit_tiny_patch16_224", img_size=32, args=ARGS)
    found = resampled(sincos.state_dict(), ours, 1)["pos_embed"]
    grid = window[0] // 8, window[1] // 8
    assert torch.allclose(found[:, 1:], sincos_positions(32, grid)[:, 1:], atol=1e-6)


def test_maps_are_patches_in_place() -> None:
    """The map of the last block is what `encode` gives, patch by patch, at rows and columns."""
    vit = create_encoder("vit_tiny_patch16_224", ARGS, size=32)
    set_window(vit, (16, 40))
    head = build_head("linear", vit, 3)
    seen: list[torch.Tensor] = []
    head.batchnorm.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    segmenter = Segmenter(prepared(vit, head), head, window=(16, 40), frozen=True).eval()
    images = torch.randn(2, 3, 16, 40)
    with torch.no_grad():
        logits = segmenter(images)
        tokens = encode(vit.eval(), images)[:, 1:]
    assert logits.shape == (2, 3, 16, 40)
    assert (seen[0] - tokens.transpose(1, 2).reshape(2, 32, 2, 5)).abs().max() < 1e-5
    assert segmenter.train().encoder.training is False


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3)), (1, (0, 0, 0, 0))],
)
def test_blocks_of_the_pyramid(depth: int, blocks: tuple[int, ...]) -> None:
    """4, 6, 8 and 12 of 12 (MAE, mmsegmentation), scaled to other depths; the sizes are right."""
    with torch.device("meta"):
        vit = create_encoder("vit_tiny_patch16_224", {**ARGS, "depth": depth}, size=32)
    head = build_head("upernet", vit, 5, width=16).train()
    assert head.blocks == blocks
    if depth == 4:
        maps = [torch.randn(2, 32, 5, 7) for _ in range(4)]
        logits, auxiliary = head(maps)
        assert (logits.shape, auxiliary.shape) == ((2, 5, 20, 28), (2, 5, 5, 7))
        assert [len(head.eval()(maps))] == [1]


def test_a_whole_image_by_windows() -> None:
    """Windows cover every pixel; a network that sees single pixels says the same in any window."""
    for length, window in ((512, 512), (513, 512), (2000, 512), (64, 16)):
        places = starts(length, window)
        covered = np.zeros(length, bool)
        for at in places:
            assert 0 <= at <= length - window
            covered[at : at + window] = True
        assert covered.all()
    assert starts(1024, 512) == [0, 341, 512]
    pixels = torch.randint(0, 256, (45, 70, 3), dtype=torch.uint8)
    weight = torch.randn(4, 3)

    def by_pixel(windows: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhwc,kc->bkhw", windows.float(), weight)

    found = slide(by_pixel, pixels, (32, 32), at_once=3)
    assert torch.allclose(found, by_pixel(pixels[None])[0], atol=1e-2)
    whole = F.interpolate(found[None], size=(150, 201), mode="bilinear", align_corners=False)[0]
    same = (classes_at(found, (150, 201)) == whole.argmax(dim=0)).float().mean()
    assert same > 0.999


def test_images_of_any_size() -> None:
    """Smaller than a patch, long, as large as a window: a class for every pixel of each."""
    vit = create_encoder("vit_tiny_patch16_224", ARGS, size=32)
    head = build_head("linear", vit, 3)
    segmenter = Segmenter(prepared(vit, head), head, window=(32, 32), frozen=True).eval()
    sizes = [(3, 5), (1, 1), (32, 32), (40, 400), (300, 33)]
    images = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    for size, mask in zip(sizes, predict_masks(segmenter, images), strict=True):
        assert mask.shape == size
        assert mask.dtype == np.int64
        assert 0 <= mask.min() <= mask.max() < 3
    assert fitted(images[0], (32, 32)).shape == (32, 53, 3)
    assert fitted(images[2], (32, 32)) is not None


def test_windows_that_patches_do_not_tile(tmp_path: Path) -> None:
    """Refused with the nearest that they do; so are models that are no ViTs, and no segmenter."""
    vit = create_encoder("vit_tiny_patch16_224", ARGS, size=32)
    with pytest.raises(ConfigError, match=r"windows of 60 x 36 .* try: --size 32 --width 64"):
        set_window(vit, (36, 60))
    with pytest.raises(ConfigError, match="resnet18"):
        create_encoder("resnet18", {}, size=32)
    with pytest.raises(CacheError, match=r"no segmenter.safetensors"):
        load_segmenter(tmp_path)


def test_figures_are_torchmetrics() -> None:
    """Image by image as over all pixels at once; the interval holds the figure."""
    generator = torch.Generator().manual_seed(0)
    truth = [torch.randint(-1, 4, (20, 30), generator=generator) for _ in range(12)]
    named = [
        torch.where(torch.rand(t.shape, generator=generator) < 0.6, t.clamp(min=0), 1)
        for t in truth
    ]
    counts = [confusion(n, t, 6) for n, t in zip(named, truth, strict=True)]
    images = Areas(*(np.stack(c) for c in zip(*(areas(c.numpy()) for c in counts), strict=True)))
    found = agreement(torch.stack(counts).sum(dim=0).numpy(), images)
    everything = torch.cat([n.flatten() for n in named]), torch.cat([t.flatten() for t in truth])
    jaccard = MulticlassJaccardIndex(6, ignore_index=-1)
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=-1)
    assert found.miou == pytest.approx(100 * float(jaccard(*everything)), abs=1e-4)
    assert found.pixel_accuracy == pytest.approx(100 * float(accuracy(*everything)), abs=1e-4)
    assert found.iou[4:] == [None, None]
    assert found.accuracy[0] == pytest.approx(
        100 * float((everything[0] == 0)[everything[1] == 0].float().mean()), abs=1e-3
    )
    low, high = found.interval
    assert low < found.miou < high
    assert high - low < 10


def test_a_norm_behind_the_average() -> None:
    """Of a ViT that averages each patch gets that norm, as `encode` has it."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, global_pool="avg", **ARGS
    ).eval()
    nn.init.normal_(vit.fc_norm.weight)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = encode(vit, images)[:, 1:]
        head = build_head("linear", vit, 2)
        maps = prepared(vit, head).forward_intermediates(
            images, indices=[1], norm=True, intermediates_only=True
        )
    assert (maps[0].flatten(2).transpose(1, 2) - expected).abs().max() < 1e-5
