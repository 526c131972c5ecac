"""The detector: the pyramid of any patch, windows, learning rates by layer, positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from milan.errors import CacheError, ConfigError
from milan.evaluation.config import DetectConfig
from milan.models.detector import (
    STRIDES,
    Detector,
    DetectorSpec,
    WindowAttention,
    detector_encoder,
    interpolated,
    load_detector,
)
from milan.models.encoder import create_vit
from milan.models.foreign import Weights
from milan.models.weights import resampled
from milan.training.supervised import parameter_groups


def spec_of(patch: int, **changes: Any) -> DetectorSpec:
    args = {"patch_size": patch, "embed_dim": 32, "depth": 4, "num_heads": 2}
    small: dict[str, Any] = {"size": 64, "width": 8, "window": 0, "proposals": 20} | changes
    return DetectorSpec("vit_tiny_patch16_224", ("a", "b"), masks=True, model_args=args, **small)


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_the_pyramid_has_its_strides(patch: int) -> None:
    """Strides 4, 8, 16, 32 exactly, by which torchvision places anchors and regions."""
    spec = spec_of(patch)
    detector = Detector(detector_encoder(spec), spec).eval()
    with torch.no_grad():
        maps = detector.backbone(torch.randn(1, 3, 64, 64))
    assert [64 / maps[str(level)].shape[-1] for level in range(4)] == list(STRIDES)
    assert maps["pool"].shape[-1] == 1
    heads: Any = detector.roi_heads
    for pool in (heads.box_roi_pool, heads.mask_roi_pool):  # whatever images come first
        assert pool.scales == [1 / stride for stride in STRIDES]
    assert {m.shape[1] for m in maps.values()} == {8}


def test_learning_rates_by_layer() -> None:
    """0.7^(13 - layer) for the 12 blocks of ViT-B; pyramid and heads have the whole rate (ViTDet,
    get_vit_lr_decay_rate)."""
    spec = DetectorSpec("vit_base_patch16_224", ("a",), masks=True, size=1024)
    with torch.device("meta"):
        detector = Detector(detector_encoder(spec), spec)
    names = {id(p): name for name, p in detector.named_parameters()}
    seen = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(detector, DetectConfig())
        for parameter in group["params"]
    }
    assert seen.keys() == dict(detector.named_parameters()).keys()
    for name, (scale, decay) in seen.items():
        layer = 13
        if name.startswith("backbone.encoder."):
            part = name.removeprefix("backbone.encoder.")
            layer = int(part.split(".")[1]) + 1 if part.startswith("blocks.") else 0
        assert scale == pytest.approx(0.7 ** (13 - layer)), name
        dimensions = dict(detector.named_parameters())[name].ndim
        assert decay == (0 if dimensions == 1 or name.endswith("pos_embed") else 0.1), name
    windows = [
        isinstance(block.attn, WindowAttention) for block in detector.backbone.encoder.blocks
    ]
    assert [n for n, has in enumerate(windows) if not has] == [2, 5, 8, 11]


def test_windows_are_attended_one_by_one() -> None:
    """A grid of 5 in windows of 2: what lies beyond the edge is zero, and cut off again."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attention(x, x, x)[0]

    x = torch.randn(2, 25, 8)
    found = WindowAttention(Attention(), grid=5, window=2)(x).view(2, 5, 5, 8)
    padded = torch.zeros(2, 6, 6, 8)
    padded[:, :5, :5] = x.view(2, 5, 5, 8)
    for row in range(0, 6, 2):
        for column in range(0, 6, 2):
            window = padded[:, row : row + 2, column : column + 2].reshape(2, 4, 8)
            expected = attention(window, window, window)[0].view(2, 2, 2, 8)
            rows, columns = min(5, row + 2) - row, min(5, column + 2) - column
            part = found[:, row : row + rows, column : column + columns]
            assert torch.allclose(part, expected[:, :rows, :columns], atol=1e-6)


def test_a_canvas_is_as_torchvision_pads() -> None:
    """Any image is scaled to the edge; detections come back in its own pixels, and inside."""
    spec = spec_of(16)
    torch.manual_seed(0)
    detector = Detector(detector_encoder(spec), spec).eval()
    detector.roi_heads.score_thresh = 0.0
    images = [torch.rand(3, 5, 5), torch.rand(3, 1, 90), torch.rand(3, 200, 100)]
    listed, _ = detector.transform(images)
    assert listed.image_sizes == [(64, 64), (1, 64), (64, 32)]
    assert listed.tensors.shape == (3, 3, 64, 64)
    assert (listed.tensors[2][..., 32:] == 0).all()  # the mean colour
    with torch.no_grad():
        found = detector(images)
    for image, one in zip(images, found, strict=True):
        height, width = image.shape[-2:]
        assert len(one["boxes"])
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"][:, 2] <= width).all()
        assert (one["boxes"][:, 3] <= height).all()
        assert one["masks"].shape[1:] == (1, height, width)


def test_positions_are_interpolated() -> None:
    """A plane of positions stays a plane on a finer grid, class token's left as it is."""
    spec = spec_of(16, size=128)
    vit = detector_encoder(spec)
    plane = torch.arange(4.0)[:, None] + 10 * torch.arange(4.0)
    state = {
        "pos_embed": torch.cat(
            [torch.full((1, 1, 32), 7.0), plane.view(1, 16, 1).expand(1, 16, 32)], 1
        )
    }
    new = interpolated(Weights(state, "x", 32), vit).encoder["pos_embed"]
    assert new.shape == (1, 65, 32)
    assert (new[:, 0] == 7).all()
    inner = new[0, 1:, 0].view(8, 8)[2:6, 2:6]
    assert torch.allclose(inner.diff(dim=0), torch.full((3, 4), 0.5), atol=0.1)
    assert torch.allclose(inner.diff(dim=1), torch.full((4, 3), 5.0), atol=0.5)


def test_positions_of_wide_images() -> None:
    """Of 4 x 9 patches on 6 x 6, which are as many: interpolated once, then left as they are."""
    args = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    vit = create_vit("vit_base_patch16_224", img_size=48, args=args)
    along = torch.arange(9.0).expand(4, 9).reshape(1, 36, 1).expand(1, 36, vit.embed_dim)
    state = {"pos_embed": torch.cat([torch.zeros(1, 1, vit.embed_dim), along], dim=1)}
    known = interpolated(Weights(state, "x", (32, 72)), vit)
    new = known.encoder["pos_embed"]
    grid = new[0, 1:, 0].view(6, 6)
    assert torch.allclose(grid[0], grid[5], atol=1e-5)
    assert (grid.diff(dim=1) > 1).all()
    assert known.size == 48
    assert torch.equal(resampled(known.encoder, vit, known.size)["pos_embed"], new)


def test_what_does_not_fit(tmp_path: Any) -> None:
    """One line each."""
    with pytest.raises(ConfigError, match="size 100; expected: a multiple of 64") as error:
        detector_encoder(spec_of(16, size=100))
    assert error.value.fix == "--size 128"
    with pytest.raises(ConfigError, match="size 64 with patches of 128 pixels"):
        detector_encoder(spec_of(128))
    with pytest.raises(CacheError, match=r"no detector\.safetensors"):
        load_detector(tmp_path)
