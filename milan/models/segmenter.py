"""A segmenter: an encoder with a head that names a class for every pixel.

The head of protocol `linear` is a BatchNorm and a 1x1 convolution on the last patches after the
encoder's norm (DINOv3, eval/segmentation). That of `upernet` is UPerNet's decoder by
segmentation-models-pytorch, on a pyramid of four blocks' patches at 4, 2, 1 and 1/2 times their
grid (BEiT and MAE, Feature2Pyramid). H x W: pixels of a window; h x w: its patches; C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional as F

from milan.core.bilinear import bilinear
from milan.core.device import network_input
from milan.core.size import Size, as_size
from milan.errors import CacheError, ConfigError, ImageFault
from milan.models.encoder import VIT_MODULES, create_vit, module_of
from milan.models.export import CHANNELS, load_whole, read_about

SEGMENTER = "segmenter.safetensors"
"""The file in the folder of a segmentation."""
PROTOCOLS = ("linear", "upernet")
_BLOCKS = (4, 6, 8, 12)  # of 12: what the pyramid is built from (BEiT, MAE)
_DROPOUT = 0.1
_ROWS = 64  # of an image, whose classes are decided at once
_OVERLAP = 2 / 3  # a window's step, as a share of its edge: 341 of 512
_LONGEST = 10  # windows along a side: 3 x 200 pixels would else become 512 x 34,133
_NO_SMP = "pip install 'milan-pretrain[dense]'"


class Segmenter(nn.Module):
    """An encoder and a head: normalised images [B, 3, H, W] to logits [B, C, H, W], float32.

    `window` is (H, W); `class_names`, `mean`, `std` and `colours` say what goes in and comes out.
    An encoder of other channels than RGB takes [B, C, H, W], normalised by mean and std of each.
    """

    def __init__(self, encoder: Any, head: Head, *, window: tuple[int, int], frozen: bool) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.window, self.frozen = window, frozen
        self.class_names: list[str] = []
        self.mean: tuple[float, ...] = (0.0, 0.0, 0.0)
        self.std: tuple[float, ...] = (1.0, 1.0, 1.0)
        self.colours: list[list[int]] = []
        """Of the classes in pictures: red, green, blue."""

    def forward(self, images: torch.Tensor) -> Any:
        """Logits at the size of the images; in training a list, of which the first counts most."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = feature_maps(self.encoder, images, self.head.blocks, norm=self.head.norm)
        outputs = [enlarged(logits, images.shape[-2:]) for logits in self.head(maps)]
        return outputs if self.training else outputs[0]

    def train(self, mode: bool = True) -> Segmenter:
        """A frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self


def feature_maps(
    encoder: Any, images: torch.Tensor, blocks: Sequence[int], *, norm: bool
) -> list[torch.Tensor]:
    """The patches after some blocks (from 0), [B, E, h, w] each; with `norm` after the norm."""
    taken = sorted(set(blocks))
    maps = encoder.forward_intermediates(
        images, indices=taken, norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    return [maps[taken.index(block)] for block in blocks]


def enlarged(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Logits [B, C, h, w] at (H, W), float32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


class LinearHead(nn.Module):
    """BatchNorm, dropout and a 1x1 convolution on one map (DINOv3)."""

    norm = True
    """Of the encoder: its maps come after it."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.blocks = (depth - 1,)
        self.batchnorm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.conv = _classifier(width, classes)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """[B, E, h, w] to logits [B, C, h, w]."""
        return [self.conv(self.dropout(self.batchnorm(maps[0])))]


class UPerNetHead(nn.Module):
    """A pyramid of four blocks, UPerNet's decoder, and a classifier; beside it an auxiliary one.

    The auxiliary classifier sees the third map, only in training (BEiT, MAE: FCN, 256 channels).
    """

    norm = False

    def __init__(self, width: int, depth: int, classes: int, decoder_width: int) -> None:
        super().__init__()
        decoder = _upernet_decoder()
        self.blocks = tuple(max(1, round(block * depth / 12)) - 1 for block in _BLOCKS)
        self.pyramid = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(width, width, 2, 2), nn.BatchNorm2d(width), nn.GELU(),
                nn.ConvTranspose2d(width, width, 2, 2),
            ),
            nn.ConvTranspose2d(width, width, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ])  # fmt: skip
        # Of its list of maps the decoder leaves out the first two: those at full and half size.
        self.decoder = decoder(
            [0, 0] + 4 * [width], encoder_depth=5, decoder_channels=decoder_width
        )
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classifier = _classifier(decoder_width, classes)
        self.auxiliary = nn.Sequential(
            nn.Conv2d(width, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Dropout2d(_DROPOUT), nn.Conv2d(256, classes, 1),
        )  # fmt: skip

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four maps [B, E, h, w] to logits [B, C, 4 h, 4 w]; in training [B, C, h, w] as well."""
        levels = [change(map_) for change, map_ in zip(self.pyramid, maps, strict=True)]
        logits = self.classifier(self.dropout(self.decoder([None, None, *levels])))
        return [logits, self.auxiliary(levels[2])] if self.training else [logits]


Head = LinearHead | UPerNetHead


def _classifier(width: int, classes: int) -> nn.Conv2d:
    """A 1x1 convolution, drawn as mmsegmentation and DINOv3 do."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _upernet_decoder() -> Any:
    try:
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ImportError as error:
        raise ConfigError(
            f"protocol upernet needs segmentation-models-pytorch: {error}", fix=_NO_SMP
        ) from None
    return UPerNetDecoder


def build_head(protocol: str, encoder: Any, classes: int, *, width: int | None = None) -> Head:
    """The head of `protocol` for an encoder; `width`: of UPerNet's decoder, default its own."""
    own, depth = encoder.num_features, len(encoder.blocks)
    if protocol == "linear":
        return LinearHead(own, depth, classes)
    return UPerNetHead(own, depth, classes, width or own)


def create_encoder(
    model: str, args: dict[str, Any], *, size: Size, any_channels: bool = False
) -> Any:
    """A ViT of timm without head, as timm initialises it, for images of `size`.

    Of RGB, unless it may have `any_channels`. Raises ConfigError for a model whose blocks cannot be
    looked at.
    """
    args = {k: v for k, v in args.items() if k != "img_size"}
    try:
        if module_of(model) in VIT_MODULES:
            vit = create_vit(model, img_size=size, args=args, any_channels=any_channels)
        else:
            vit = timm.create_model(model, num_classes=0, img_size=size, **args)
        parts = ("forward_intermediates", "set_input_size", "blocks", "num_features")
        if not all(hasattr(vit, part) for part in parts):
            raise TypeError(f"a {type(vit).__name__}, which is no ViT")
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model {model}: {error}",
            expected="a ViT of timm that takes images of any size",
            fix="--checkpoint timm:vit_base_patch16_224.augreg_in21k",
        ) from None
    return vit


def set_window(vit: Any, window: tuple[int, int]) -> None:
    """Make a ViT one for windows of (H, W) pixels; load its weights afterwards (`resampled`).

    Raises ConfigError for windows that its patches do not tile.
    """
    patch = vit.patch_embed.patch_size
    if all(edge % p == 0 for edge, p in zip(window, patch, strict=True)):
        vit.set_input_size(img_size=window)
        return
    height, width = (max(p, round(edge / p) * p) for edge, p in zip(window, patch, strict=True))
    raise ConfigError(
        f"windows of {window[1]} x {window[0]} pixels, and patches of {patch[1]} x {patch[0]}",
        expected="multiples of the patch",
        fix=f"--size {height}" + (f" --width {width}" if window[0] != window[1] else ""),
    )


def load_segmenter(folder: str | Path) -> Segmenter:
    """The segmenter of `milan segment` (its folder, or a segmenter.safetensors), in eval mode.

    `predict_masks` names the classes of whole images; `class_names` are their names. Raises
    CacheError, and ConfigError where a library is missing.
    """
    path = Path(folder)
    path = path / SEGMENTER if path.is_dir() else path
    if not path.is_file():
        raise CacheError(
            f"no {SEGMENTER} at {folder}",
            expected="the folder of a segmentation",
            fix="milan segment, which leaves one",
        )
    about = read_about(path)
    if "decoder_width" not in about:
        raise CacheError(f"{path} is no segmenter", fix="milan segment")
    if about["model"].startswith("teacher "):
        raise CacheError(
            f"{path} is a head, and its encoder the {about['model']}",
            expected="a ViT of timm",
            fix="milan segment --checkpoint FOLDER, that of the teacher's config.json and weights",
        )
    window, names = (about["window"][0], about["window"][1]), about["classes"]
    encoder = create_encoder(
        about["model"], about["model_args"], size=as_size(about["native_size"]),
        any_channels=CHANNELS in about,
    )  # fmt: skip
    set_window(encoder, window)
    head = build_head(about["protocol"], encoder, len(names), width=about["decoder_width"])
    segmenter = Segmenter(prepared(encoder, head), head, window=window, frozen=True)
    load_whole(segmenter, path, about["model"])
    segmenter.class_names, segmenter.colours = names, about["colours"]
    segmenter.mean, segmenter.std = tuple(about["mean"]), tuple(about["std"])
    return segmenter.eval().requires_grad_(False)


def prepared(encoder: Any, head: Head) -> Any:
    """The encoder without what its maps do not pass: a norm without a use gets no gradient.

    A ViT that averages has its norm behind the average: each patch gets the same norm.
    """
    averaged = getattr(encoder, "fc_norm", nn.Identity())
    if not isinstance(averaged, nn.Identity):
        encoder.norm, encoder.fc_norm = averaged, nn.Identity()
    if not head.norm:
        encoder.norm = nn.Identity()
    return encoder


# --- whole images ---------------------------------------------------------------------------------


def predict_masks(
    segmenter: Segmenter,
    images: Iterator[np.ndarray] | Sequence[np.ndarray],
    *,
    at_once: int = 8,
) -> Iterator[np.ndarray]:
    """The class of every pixel of each image, uint8 [H, W, 3] (RGB) to int64 [H, W]; of an encoder
    of other channels float32 [H, W, C], normalised.

    Images of any size: each is scaled until a window just fits in, windows slide over it in steps
    of two thirds, `at_once` are looked at together, and their logits are averaged. On the device
    of the segmenter, which is in eval mode. Raises ImageFault for a strip, as `fitted_size` does.
    """
    for pixels in images:
        scaled = fitted(pixels, segmenter.window)
        yield predict_scaled(segmenter, scaled, pixels.shape[:2], at_once=at_once)


@torch.inference_mode()
def predict_scaled(
    segmenter: Segmenter, scaled: np.ndarray, size: Sequence[int], *, at_once: int = 8
) -> np.ndarray:
    """As predict_masks, of one image that is `fitted` to the window and was of (H, W) pixels."""

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return segmenter(network_input(pixels, segmenter.mean, segmenter.std))

    pixels = torch.from_numpy(scaled).to(next(segmenter.parameters()).device)
    seen = slide(logits, pixels, segmenter.window, at_once=at_once)
    return classes_at(seen, size).cpu().numpy()


def fitted(pixels: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """An image, uint8 [H, W, 3] or float32 [H, W, C], scaled so that a window just fits in; its
    shape stays. Raises ImageFault as `fitted_size`."""
    height, width = pixels.shape[:2]
    size = fitted_size(height, width, window)
    if size == (height, width):
        return np.ascontiguousarray(pixels)
    return bilinear(pixels, size).copy()


def fitted_size(height: int, width: int, window: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image in which a window just fits.

    Raises ImageFault for a strip: the logits of 10 windows side by side take gigabytes already.
    """
    scale = max(window[0] / height, window[1] / width)
    size = max(window[0], round(height * scale)), max(window[1], round(width * scale))
    if any(edge > _LONGEST * part for edge, part in zip(size, window, strict=True)):
        raise ImageFault(
            "strip",
            f"{width} x {height} pixels would be scaled to {size[1]:,} x {size[0]:,} for windows "
            f"of {window[1]} x {window[0]}, and a side may have {_LONGEST} of them; cut the image "
            "into parts",
        )
    return size


def starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover `length` pixels in steps of two thirds."""
    step = max(1, int(window * _OVERLAP))
    count = -(-max(length - window, 0) // step) + 1
    return [min(i * step, length - window) for i in range(count)]


def slide(
    logits: Callable[[torch.Tensor], torch.Tensor],
    pixels: torch.Tensor,
    window: tuple[int, int],
    *,
    at_once: int,
) -> torch.Tensor:
    """Logits [C, h, w] of an image, as `fitted` has it: the mean over the windows that see a pixel.

    `logits` takes windows of it, [B, H, W, 3] or more channels, and gives [B, C, H, W].
    """
    height, width = pixels.shape[:2]
    corners = [(y, x) for y in starts(height, window[0]) for x in starts(width, window[1])]
    total, seen = pixels.new_zeros(()), pixels.new_zeros((height, width), dtype=torch.float32)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        cut = [pixels[y : y + window[0], x : x + window[1]] for y, x in some]
        scores = logits(torch.stack(cut)).float()
        if not total.ndim:
            total = scores.new_zeros((scores.shape[1], height, width))
        for (y, x), part in zip(some, scores, strict=True):
            total[:, y : y + window[0], x : x + window[1]] += part
            seen[y : y + window[0], x : x + window[1]] += 1
    return total / seen


def classes_at(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The best class [H, W], int64, of logits [C, h, w] interpolated to (H, W).

    In stripes: all logits of a large photograph would take gigabytes.
    """
    height, width = size[0], size[1]
    at = (torch.arange(height, device=logits.device) + 0.5) * logits.shape[1] / height - 0.5
    at = at.clamp(0, logits.shape[1] - 1)
    above, share = at.floor().long(), at.frac()
    below = (above + 1).clamp(max=logits.shape[1] - 1)
    stripes = []
    for rows in torch.arange(height, device=logits.device).split(_ROWS):
        weight = share[rows][None, :, None]
        mixed = logits[:, above[rows]] * (1 - weight) + logits[:, below[rows]] * weight
        stripes.append(enlarged(mixed[None], (len(rows), width))[0].argmax(dim=0))
    return torch.cat(stripes)
