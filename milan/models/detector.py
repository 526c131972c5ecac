"""A detector: torchvision's Mask R-CNN on a plain ViT, as ViTDet has it (Li et al. 2022).

    images of any size ── longest side to S, padded to S x S ── ViT ── [B, E, g, g]
      └── simple feature pyramid: strides 4, 8, 16, 32 of the last block's map alone
            └── torchvision: region proposals, box head, mask head

As in detectron2's ViTDet: no class token, no final norm, LayerNorm in pyramid and heads, two
convolutions in front of the proposals, four and a linear layer in the box head. Without its
relative positions, which no pretrained ViT has: absolute ones are resampled.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.layers import LayerNorm2d, resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from milan.core.bilinear import bilinear
from milan.core.device import MEAN, STD
from milan.core.size import as_size, grid_of
from milan.errors import CacheError, ConfigError
from milan.models.encoder import create_vit
from milan.models.export import CHANNELS, load_whole, read_about
from milan.models.foreign import Weights
from milan.models.weights import POSITIONS

DETECTOR = "detector.safetensors"
"""The file in the folder of a detection run."""
STRIDES = (4, 8, 16, 32)
"""Pixels between two places of each level of the pyramid."""
_LEVELS = ("0", "1", "2", "3")
_COARSEST = 64  # pixels: stride of the level that only proposes regions


@dataclass(frozen=True)
class DetectorSpec:
    """What a detector is; with its weights it is all that load_detector needs."""

    model: str
    """The ViT of timm."""
    classes: tuple[str, ...]
    """Names, in the order of the labels 1, 2, ...; 0 is the background."""
    masks: bool
    """Whether it has a mask head."""
    size: int = 1024
    """Edge S of the square that images are padded to, in pixels."""
    model_args: dict[str, Any] = field(default_factory=dict)
    window: int = 14
    """Edge of the windows of attention, in patches; 0: all blocks see the whole image."""
    width: int = 256
    """Channels of the pyramid and the heads."""
    anchor_scale: float = 8.0
    """Edge of an anchor in strides of its level."""
    proposals: int = 1000
    """Regions that the box head looks at in an image, at most."""
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels: dict[str, Any] | None = None
    """What it sees in place of RGB, as its encoder's file says: images come normalised then."""


class WindowAttention(nn.Module):
    """An attention that sees windows of W x W patches; beyond the edge they are zeros (ViTDet)."""

    def __init__(self, attention: nn.Module, grid: int, window: int) -> None:
        super().__init__()
        self.attention, self.grid, self.window = attention, grid, window

    def forward(self, x: torch.Tensor, **unused: Any) -> torch.Tensor:
        """Tokens [B, g², E] to the same."""
        (b, _, e), g, w = x.shape, self.grid, self.window
        padded = -(-g // w) * w
        count = padded // w
        x = F.pad(x.view(b, g, g, e), (0, 0, 0, padded - g, 0, padded - g))
        x = x.view(b, count, w, count, w, e).transpose(2, 3)
        x = self.attention(x.reshape(-1, w * w, e)).view(b, count, count, w, w, e)
        x = x.transpose(2, 3).reshape(b, padded, padded, e)
        return x[:, :g, :g].reshape(b, g * g, e)


class FeaturePyramid(nn.Module):
    """Maps of all STRIDES from one: transposed convolutions and pooling (ViTDet)."""

    def __init__(self, encoder_width: int, patch: int, width: int) -> None:
        """`patch`: stride of the map, a power of two."""
        super().__init__()
        self.levels = nn.ModuleList(
            _level(encoder_width, patch // stride, stride // patch, width) for stride in STRIDES
        )

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """[B, E, g, g] to maps by name, [B, width, S / stride, S / stride] each, and a coarser one
        for proposals alone."""
        maps = OrderedDict(
            (name, level(x)) for name, level in zip(_LEVELS, self.levels, strict=True)
        )
        maps["pool"] = F.max_pool2d(maps[_LEVELS[-1]], kernel_size=1, stride=2)
        return maps


def _level(channels: int, finer: int, coarser: int, width: int) -> nn.Sequential:
    """One level, `finer` times as fine as the map or `coarser` times as coarse, powers of two."""
    layers: list[nn.Module] = []
    while finer > 1:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels, finer = channels // 2, finer // 2
    if coarser > 1:
        layers.append(nn.MaxPool2d(coarser))
    layers += [
        nn.Conv2d(channels, width, kernel_size=1, bias=False), LayerNorm2d(width),
        nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False), LayerNorm2d(width),
    ]  # fmt: skip
    return nn.Sequential(*layers)


class Backbone(nn.Module):
    """A ViT and its pyramid: images [B, 3, S, S] to maps of width `out_channels`.

    The ViT loses what is not for patches: class token, registers, final norm.
    """

    def __init__(self, vit: Any, spec: DetectorSpec) -> None:
        super().__init__()
        self.encoder, self.out_channels = vit, spec.width
        self.grid = grid = vit.patch_embed.grid_size[0]
        vit.pos_embed = nn.Parameter(vit.pos_embed[:, -(grid**2) :].detach().clone())
        vit.cls_token = vit.reg_token = None
        vit.num_prefix_tokens = 0
        vit.norm = vit.fc_norm = nn.Identity()
        depth = len(vit.blocks)
        whole = {(part + 1) * depth // 4 - 1 for part in range(4)}  # 2, 5, 8 and 11 of twelve
        for number, block in enumerate(vit.blocks):
            if 0 < spec.window < grid and number not in whole:
                block.attn = WindowAttention(block.attn, grid, spec.window)
        self.pyramid = FeaturePyramid(vit.embed_dim, spec.size // grid, spec.width)

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Maps by name, finest first."""
        vit, edge = self.encoder, self.encoder.patch_embed.img_size[0]
        if images.shape[-1] != edge:  # patches of 14 pixels: their map has the stride of 16
            images = F.interpolate(images, (edge, edge), mode="bilinear", antialias=True)
        x = vit.norm_pre(vit.patch_embed(images) + vit.pos_embed)
        for block in vit.blocks:
            x = block(x)
        return self.pyramid(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


class Canvas(GeneralizedRCNNTransform):
    """torchvision's transform, antialiased: longer side to S, padded with the mean colour to S x S.

    Images to train on have been scaled before.
    """

    def resize(self, image: torch.Tensor, target: Any = None) -> tuple[torch.Tensor, Any]:
        """The image [3, H, W] as it lies on the canvas; boxes are not scaled."""
        (height, width), size = image.shape[-2:], self.max_size
        if self.training or max(height, width) == size:
            return image, target
        shape = fitted(height, width, size)
        return F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0], target


def fitted(height: int, width: int, size: float) -> tuple[int, int]:
    """Height and width with the longer side scaled to `size`, at least a pixel each."""
    scale = size / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


class Detector(FasterRCNN):
    """torchvision's detector: images [3, H, W] in 0..1 to boxes, labels, scores and masks; of an
    encoder of other channels [C, H, W], normalised.

    Called as torchvision's FasterRCNN and MaskRCNN are, also for training. `class_names` are those
    of the labels from 1 on.
    """

    def __init__(self, vit: Any, spec: DetectorSpec, *, samples: int = 512) -> None:
        """`vit` is of detector_encoder; `samples` are regions of an image that the box head learns
        from; what is new is drawn by torch's generator."""
        width, classes = spec.width, len(spec.classes) + 1
        sizes = tuple((spec.anchor_scale * stride,) for stride in (*STRIDES, _COARSEST))
        ratios = ((0.5, 1.0, 2.0),) * len(sizes)
        anchors = AnchorGenerator(sizes, ratios)
        box_head = FastRCNNConvFCHead(
            (width, 7, 7), [width] * 4, [4 * width], norm_layer=LayerNorm2d
        )
        super().__init__(
            Backbone(vit, spec),
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=2),
            rpn_pre_nms_top_n_train=2 * spec.proposals, rpn_pre_nms_top_n_test=spec.proposals,
            rpn_post_nms_top_n_train=spec.proposals, rpn_post_nms_top_n_test=spec.proposals,
            box_roi_pool=_pool(7, spec.size),
            box_head=box_head, box_predictor=FastRCNNPredictor(4 * width, classes),
            box_batch_size_per_image=samples,
        )  # fmt: skip
        if spec.masks:  # as MaskRCNN adds them to a FasterRCNN
            heads: Any = self.roi_heads
            heads.mask_roi_pool = _pool(14, spec.size)
            heads.mask_head = MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d)
            heads.mask_predictor = MaskRCNNPredictor(width, width, classes)
        count = len(spec.mean)
        mean = [0.0] * count if spec.channels else list(spec.mean)
        std = [1.0] * count if spec.channels else list(spec.std)
        self.transform = Canvas(spec.size, spec.size, mean, std, size_divisible=spec.size)
        self.spec, self.class_names = spec, list(spec.classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers: the encoder's, and all else behind its last block."""
        return {
            "stem": r"^backbone\.encoder\.(?!blocks)",
            "blocks": r"^backbone\.encoder\.blocks\.(\d+)",
        }

    def no_weight_decay(self) -> set[str]:
        """Names of weights without decay; those of one dimension need no mention."""
        return {"backbone.encoder.pos_embed"}

    def detect(
        self,
        images: list[torch.Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """(detections, losses) of images as they lie on the canvas, in eval mode.

        Detections are in pixels of images of (height, width) `shapes`. With `targets` the losses of
        training, by one pass of the encoder; what they sample is drawn by torch's generator.
        """
        listed, _ = self.transform(images)
        maps, losses = self.backbone(listed.tensors), dict[str, torch.Tensor]()
        heads: Any = self.roi_heads
        if targets:
            self.rpn.train()
            heads.train()
            proposals, losses = self.rpn(listed, maps, targets)
            losses = losses | heads(maps, proposals, listed.image_sizes, targets)[1]
            self.rpn.eval()
            heads.eval()
        proposals, _ = self.rpn(listed, maps)
        detections, _ = heads(maps, proposals, listed.image_sizes)
        return self.transform.postprocess(detections, listed.image_sizes, shapes), losses


def _pool(edge: int, size: int) -> MultiScaleRoIAlign:
    """torchvision's pooling of regions to `edge` x `edge`, that knows the strides of the maps.

    It guesses them at its first call, from maps of the whole canvas and the sizes of the images on
    it: of small images it would take other strides, and keep them.
    """
    pool = MultiScaleRoIAlign(list(_LEVELS), output_size=edge, sampling_ratio=2)
    with torch.device("cpu"):
        maps = {
            name: torch.zeros(1, 1, size // stride, size // stride)
            for name, stride in zip(_LEVELS, STRIDES, strict=True)
        }
        pool(maps, [torch.zeros(1, 4)], [(size, size)])
    return pool


def detector_encoder(spec: DetectorSpec, *, drop_path: float = 0.0) -> Any:
    """The ViT for a Detector, whole, initialised as timm does: to be given weights first.

    Raises ConfigError for a size that does not fit, and as create_vit does.
    """
    args = {k: v for k, v in spec.model_args.items() if k != "img_size"}
    if spec.size % _COARSEST:
        raise ConfigError(
            f"size {spec.size}",
            expected=f"a multiple of {_COARSEST} pixels, the coarsest stride of the pyramid",
            fix=f"--size {max(1, round(spec.size / _COARSEST)) * _COARSEST}",
        )
    patch = _patch_of(spec.model, args)
    stride = 2 ** round(math.log2(patch))
    if stride > spec.size:
        raise ConfigError(
            f"size {spec.size} with patches of {patch} pixels",
            expected="an image of some patches",
            fix=f"--size {_COARSEST * -(-4 * stride // _COARSEST)}",
        )
    args["drop_path_rate"] = drop_path
    size, other = spec.size // stride * patch, bool(spec.channels)
    return create_vit(spec.model, img_size=size, args=args, any_channels=other)


def _patch_of(model: str, args: dict[str, Any]) -> int:
    """Edge of a patch in pixels. Raises ConfigError as create_vit does."""
    if "patch_size" in args:
        return int(args["patch_size"])
    known: Any = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    size = known.input_size[1] if known else 224
    with torch.device("meta"):
        vit = create_vit(model, img_size=size, args=args, any_channels=True)
    return vit.patch_embed.patch_size[0]


def interpolated(weights: Weights, vit: Any) -> Weights:
    """The weights with positions for the grid of a ViT, by bicubic interpolation (ViTDet).

    Of sine-cosine ones too: continued beyond the grid that they were trained on, they would be of
    places that the encoder has never seen.
    """
    state = weights.encoder
    if POSITIONS not in state:
        return weights
    grid, prefix = vit.patch_embed.grid_size, vit.num_prefix_tokens
    prefix = 0 if vit.no_embed_class else prefix
    old = grid_of(state[POSITIONS].shape[1] - prefix, weights.size)
    new = resample_abs_pos_embed(
        state[POSITIONS], list(grid), old_size=list(old), num_prefix_tokens=prefix
    )
    seen = as_size(vit.patch_embed.img_size)
    return replace(weights, encoder=state | {POSITIONS: new}, size=seen)


# --- use ------------------------------------------------------------------------------------------


def load_detector(folder: str | Path) -> Detector:
    """The detector of a `milan detect` (its folder, or a detector.safetensors), in eval mode.

    Called as torchvision's: a list of images [3, H, W] in 0..1, of any sizes, to a list of
    dictionaries with boxes [n, 4] (left, top, right, bottom in pixels), labels [n], scores [n], and
    masks [n, 1, H, W] in 0..1 if it has a mask head. Raises CacheError.
    """
    path = Path(folder)
    path = path / DETECTOR if path.is_dir() else path
    if not path.is_file():
        raise CacheError(
            f"no {DETECTOR} at {folder}",
            expected="the folder of a detection",
            fix="milan detect, which leaves one",
        )
    about = read_about(path)
    names = {f.name for f in fields(DetectorSpec)}
    about |= {"size": about["input_size"], CHANNELS: about.get(CHANNELS)}
    if not about.keys() >= names:
        raise CacheError(f"{path} is no detector", fix="milan detect")
    spec = DetectorSpec(**{name: about[name] for name in names})
    try:
        detector = Detector(detector_encoder(spec), spec)
    except ConfigError as error:
        raise CacheError(
            f"{path} does not fit {spec.model}: {error}", fix="milan detect, which leaves one anew"
        ) from None
    load_whole(detector, path, spec.model)
    return detector.eval()


def on_canvas(image: np.ndarray, size: int) -> np.ndarray:
    """An image, uint8 [H, W, 3] or float32 [H, W, C], with its longer side scaled to `size`."""
    height, width = image.shape[:2]
    return bilinear(image, fitted(height, width, size))


def find_boxes(
    detector: Detector, images: Sequence[Image.Image | np.ndarray], *, score: float = 0.05
) -> list[dict[str, np.ndarray]]:
    """What a detector finds in images, as its run has measured it; on the detector's device.

    Images are RGB: Pillow's, or uint8 [H, W, 3]; for a detector of other channels float32
    [H, W, C], normalised. For each image boxes [n, 4] float32 (left, top, right, bottom in its
    pixels), labels [n] int64 (`detector.class_names[label - 1]`), scores [n] float32 of at least
    `score`, falling, and with a mask head masks [n, H, W] bool.
    """
    device = next(detector.parameters()).device
    size, detector = detector.spec.size, detector.eval()
    arrays = [np.asarray(image) for image in images]
    placed = [torch.from_numpy(on_canvas(image, size).copy()) for image in arrays]
    shapes = [(image.shape[0], image.shape[1]) for image in arrays]
    with torch.no_grad():
        detections, _ = detector.detect([unit(pixels.to(device)) for pixels in placed], shapes)
    chosen = [each["scores"] >= score for each in detections]
    return [
        {
            name: (value[kept, 0] >= 0.5 if name == "masks" else value[kept]).cpu().numpy()
            for name, value in each.items()
        }
        for each, kept in zip(detections, chosen, strict=True)
    ]


def unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in 0..1; float32 [H, W, C] to [C, H, W] as it is."""
    moved = pixels.permute(2, 0, 1)
    return moved if pixels.is_floating_point() else moved.float() / 255
