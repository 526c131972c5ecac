"""A frozen encoder as evaluations see it: which one, and the features that it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch

from milan.core.device import MEAN, STD, normalise, seeded_weights
from milan.core.size import Size, as_size, height_width
from milan.errors import ConfigError
from milan.evaluation.config import EvaluationConfig
from milan.images.channels import Channels
from milan.models.encoder import (
    create_vit,
    encode,
    pooled_features,
    pretrained_vit,
    size_argument,
    unpretrained_vit,
)
from milan.models.export import CHANNELS, load_encoder, read_about
from milan.models.state_dict import weights_digest
from milan.models.weights import find_weights, is_foreign

_TIMM = "timm:"
FEATURES = {
    "pooled": "class token and mean of patches",
    "blocks": "class tokens of the last 4 blocks and mean of patches",
    "patches": "patches, float16",
    "tokens": "class token and patches, float16",
}
"""Sets of features, as EvaluationConfig.feature_set names them, in words that are part of a
network's identity."""
TOKENS = ("patches", "tokens")
"""Those of them that are not pooled: [B, T, E]."""
_BLOCKS = 4
TOKEN, MEAN_OF_PATCHES = "class token", "mean of patches"


@dataclass(frozen=True)
class Frozen:
    """A frozen network as an evaluation sees it."""

    features: Callable[[torch.Tensor], torch.Tensor]
    """uint8 [B, H, W, 3] on the device to [B, F] float32 there; patches to [B, N, E] float16."""
    size: Size
    """Of its input in pixels."""
    name: str
    identity: dict[str, Any] | None = None
    """All that determines its features, as JSON; None: nobody knows, so none are kept."""
    tokens: Callable[[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor]] | None = None
    """The same pixels to the class token [B, E], if it has one, and the patches [B, N, E], float32:
    `features` are the first and the mean of the others. None: it gives features only."""
    parts: tuple[str, ...] = ("features",)
    """What the F features are, part by part, all of one width; first those of blocks, in order."""
    directions: bool = True
    """Whether the length of a patch says nothing: then a mean is that of unit vectors, in texts'
    space."""
    said: str = ""
    """How a checkpoint of others was read, in a line."""
    channels: Channels | None = None
    """What it sees in place of pictures' RGB: its functions take float32 [B, C, H, W] then, as
    Channels.centre_crop gives them."""

    def blank(self, device: torch.device) -> torch.Tensor:
        """An input of one image, all zeros."""
        if self.channels:
            return torch.zeros(1, self.channels.count, *height_width(self.size), device=device)
        return torch.zeros(1, *height_width(self.size), 3, dtype=torch.uint8, device=device)

    @property
    def words(self) -> str:
        """What its features are, in words."""
        return " and ".join(dict.fromkeys(self.parts))


def frozen_encoder(config: EvaluationConfig, device: torch.device) -> Frozen:
    """The encoder that `config.checkpoint` names; features are those of `config.feature_set`.

    Raises ConfigError for an unknown model, and weights that cannot be fetched or are of another
    model; CacheError for a run without an encoder. The teacher is no encoder of ours:
    pipeline.teachers.frozen loads it.
    """
    name = config.checkpoint
    if name == "teacher":
        raise ConfigError(
            "checkpoint teacher without a network",
            expected="its network, which the command `milan` loads by itself",
            fix="frozen=pipeline.teachers.frozen.frozen_teacher(config, device)",
        )
    trained, said = "both", ""
    channels: dict[str, Any] | None = None
    if name == "random":
        vit, built, trained, channels = _random(config)
    elif name.startswith(_TIMM):
        vit, built = pretrained_vit(name.removeprefix(_TIMM)), {"timm": name}
    elif is_foreign(name):
        vit, built, said = _foreign(config)
    else:
        vit, about = load_encoder(name), read_about(name)
        built = {"model": about["model"], "model_args": about["model_args"]}
        trained, channels = about.get("pooling", trained), about.get(CHANNELS)
    data_config = timm.data.resolve_model_data_config(vit)
    size = _size(name, data_config["input_size"], bool(channels))
    own_pass = "timm" in built
    tokens_of = _timm_tokens(name, vit, size) if own_pass else partial(encode, vit)
    config.check_width(vit.num_features)
    vit = vit.eval().requires_grad_(False)
    wanted = config.feature_set
    mean_alone = vit.cls_token is None or _pooling(config, trained) == "mean"
    identity = built | {
        "weights": weights_digest(vit),
        "mean": list(data_config["mean"]),
        "std": list(data_config["std"]),
        "size": size,
        "features": FEATURES[wanted]
        if wanted == "patches" or vit.cls_token is None or not mean_alone
        else f"{MEAN_OF_PATCHES} alone, {wanted}",
    }
    identity |= {CHANNELS: channels} if channels else {}
    token = () if mean_alone else (TOKEN,)
    if wanted == "blocks":
        with torch.inference_mode():
            shape = data_config["input_size"]
            blocks = len(_last_blocks(vit, tokens_of, torch.zeros(1, *shape)))
        parts = (*token * blocks, MEAN_OF_PATCHES) if token else (MEAN_OF_PATCHES,) * blocks
    else:
        parts = (*token, MEAN_OF_PATCHES) if wanted == "pooled" else (wanted,)
    vit = vit.to(device)

    def pooled(every: torch.Tensor) -> torch.Tensor:
        return pooled_features(vit, every, mean_alone=mean_alone)

    def seen(pixels: torch.Tensor) -> torch.Tensor:
        return pixels if channels else normalise(pixels, data_config["mean"], data_config["std"])

    def found(pixels: torch.Tensor) -> torch.Tensor:
        return tokens_of(seen(pixels))

    def tokens(pixels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        every = found(pixels).float()
        first = None if vit.cls_token is None else every[:, 0]
        return first, every[:, vit.num_prefix_tokens :]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        if wanted in TOKENS:
            first, patches = tokens(pixels)
            return tokens_side_by_side(None if mean_alone else first, patches, wanted)
        if wanted == "pooled":
            return pooled(found(pixels)).float()
        every = _last_blocks(vit, tokens_of, seen(pixels))
        if not token:
            return torch.cat([pooled(block) for block in every], dim=1).float()
        before = [block[:, 0] for block in every[:-1]]
        return torch.cat([*before, pooled(every[-1])], dim=1).float()

    law = Channels.if_any(channels)
    return Frozen(features, size, name, identity, tokens, parts, said=said, channels=law)


def tokens_side_by_side(
    first: torch.Tensor | None, patches: torch.Tensor, wanted: str
) -> torch.Tensor:
    """The `wanted` one of TOKENS, float16 [B, T, E], of class token [B, E], if any, and patches."""
    if wanted == "patches" or first is None:
        return patches.half()
    return torch.cat([first[:, None], patches], dim=1).half()


def _last_blocks(
    vit: Any, tokens_of: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> list[torch.Tensor]:
    """Tokens of the last 4 blocks, or as many as there are, each [B, T, E] after the final norm, as
    DINOv2's linear evaluation has them; of the last `tokens_of`'s own."""
    passed: list[torch.Tensor] = []
    blocks = list(getattr(vit, "blocks", []))[-_BLOCKS:]
    hooks = [b.register_forward_hook(lambda *call: passed.append(call[2])) for b in blocks]
    try:
        last = tokens_of(images)
    finally:
        for hook in hooks:
            hook.remove()
    layers = [last]
    for x in passed[-2::-1]:
        if not torch.is_tensor(x) or x.shape != last.shape:
            break
        for norm in ("norm", "fc_norm"):
            x = getattr(vit, norm, torch.nn.Identity())(x)
        layers.insert(0, x)
    return layers


def _size(name: str, shape: tuple[int, int, int], any_channels: bool) -> Size:
    """The size of a network's input [channels, height, width]. Raises ConfigError."""
    if shape[0] != 3 and not any_channels:
        raise ConfigError(
            f"{name} takes pixels of {shape[0]} channels",
            expected="RGB images",
            fix="--checkpoint timm:vit_base_patch16_224.augreg_in21k",
        )
    return as_size(shape[1:])


def _timm_tokens(model: str, vit: Any, size: Size) -> Callable[[torch.Tensor], torch.Tensor]:
    """images [B, 3, H, W] to tokens as `encode` orders them, by timm's own pass.

    timm's ViTs have positions of many kinds, or tokens that `encode` does not know. Raises
    ConfigError for a model whose output is not one token a patch.
    """

    def tokens(images: torch.Tensor) -> torch.Tensor:
        return getattr(vit, "fc_norm", torch.nn.Identity())(vit.forward_features(images))

    shape: tuple[int, ...] = ()
    if hasattr(vit, "forward_features") and hasattr(vit, "num_prefix_tokens"):
        with torch.inference_mode():
            output = vit.eval().forward_features(torch.zeros(1, 3, *height_width(size)))
        shape = tuple(getattr(output, "shape", ()))
    if len(shape) != 3:
        raise ConfigError(
            f"{model} is a {type(vit).__name__}, whose output is not one token a patch",
            expected="a ViT",
            fix="--checkpoint timm:vit_base_patch16_224.augreg_in21k",
        )
    return tokens


def _foreign(config: EvaluationConfig) -> tuple[Any, dict[str, Any], str]:
    """(the ViT in a checkpoint of others, what it was built by, how it was read)."""
    weights = find_weights(config.checkpoint, flag="--checkpoint", model=config.model)
    vit = create_vit(weights.model, img_size=weights.size, args=weights.args)
    vit.load_state_dict(weights.encoder)
    built = {"model": weights.model, "model_args": weights.args}
    return _described(vit, weights.mean, weights.std), built, weights.said


def _described(vit: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """A ViT that says what images it takes."""
    size = (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": mean, "std": std, "input_size": size}
    return vit


def _pooling(config: EvaluationConfig, trained: str) -> str:
    """mean or both, where `trained` is what the pretraining trained."""
    return trained if config.pooling == "auto" else config.pooling


def _random(config: EvaluationConfig) -> tuple[Any, dict[str, Any], str, dict[str, Any] | None]:
    """(a ViT as timm initialises it, what it was built by, the pooling of what it is like, and the
    channels)."""
    like, pooling, channels = config.like or "", "both", None
    if is_foreign(like):
        weights = find_weights(like, flag="--like", model=config.model)
        name, args, size = weights.model, dict(weights.args), weights.size
    elif like and not like.startswith(_TIMM):
        about = read_about(like)
        name, args, size = about["model"], about["model_args"], about["input_size"]
        pooling, channels = about.get("pooling", pooling), about.get(CHANNELS)
    else:
        name, args = config.model, dict(config.model_args)
        size = size_argument(args)
        args.pop("img_size", None)
    with seeded_weights(config.seed):
        if like.startswith(_TIMM):
            return unpretrained_vit(like.removeprefix(_TIMM)), {"timm": like}, pooling, None
        vit = create_vit(name, img_size=size, args=args, any_channels=bool(channels))
    built = {"model": name, "model_args": args}
    return _described(vit, MEAN, STD), built, pooling, channels
