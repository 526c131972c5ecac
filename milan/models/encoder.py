"""The encoder: a ViT of timm, with MAE's positions, that may see some patches only.

B views, N patches = V visible + M masked, P prefix tokens (class token, registers), E width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from milan.core.size import Size, as_size, height_width, size_in_words
from milan.core.waiting import stalled_connections_fail
from milan.errors import ConfigError, nearest

_DEFAULT = "vit_base_patch16_224"
VIT_MODULES = ("vision_transformer", "deit")
"""Modules of timm whose models may be plain ViTs."""
_UNPOOLED = "--set model.global_pool=avg"


def sincos_positions(width: int, grid: int | tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions [1, 1 + N, width], float32; the class token's is zero.

    `grid`: rows and columns of the N patches, or one number for both.

    MAE's layout: the first half of the channels encodes the column, the second half the row, each
    half sines then cosines (MAE, util/pos_embed.py). Raises ConfigError unless 4 divides width.
    """
    if width < 4 or width % 4:
        raise ConfigError(
            f"embed_dim {width}",
            expected="a multiple of 4, for sine-cosine positions",
            fix=f"embed_dim={max(4, width + -width % 4)}",
        )
    omega = 10000 ** -(np.arange(width // 4) / (width / 4))
    height, long = (grid, grid) if isinstance(grid, int) else grid
    rows, columns = np.meshgrid(np.arange(height), np.arange(long), indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1) * omega
        halves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(halves, axis=1)
    return torch.from_numpy(np.vstack([np.zeros((1, width)), table])).float()[None]


def build_encoder(name: str, *, img_size: Size, args: dict[str, Any] | None = None) -> Any:
    """A timm ViT without head, with frozen sine-cosine positions in place of its own.

    Arguments and errors are `create_vit`'s; `initialise` gives it MAE's initial weights.
    """
    vit = create_vit(name, img_size=img_size, args=args, any_channels=True)
    table = sincos_positions(vit.embed_dim, vit.patch_embed.grid_size)[:, 1:]
    vit.pos_embed.data.zero_()
    vit.pos_embed.data[:, -table.shape[1] :] = table
    vit.pos_embed.requires_grad_(False)
    return vit


def create_vit(
    name: str, *, img_size: Size, args: dict[str, Any] | None = None, any_channels: bool = False
) -> Any:
    """A timm ViT without head, initialised as timm does; of RGB, unless it may have `any_channels`.

    `args` override its arguments (patch_size, embed_dim, depth, num_heads, ...); `norm_eps`, which
    timm does not have, is the eps of all norms. Raises ConfigError: unknown name or argument (the
    nearest are named), or a ViT of another kind.
    """
    if not timm.is_model(name):
        raise unknown_vit(f"unknown model {name!r}", name)
    if module_of(name) not in VIT_MODULES:
        raise unknown_vit(f"model {name} is no plain ViT", name)
    args = dict(args or {})
    allowed = {*inspect.signature(VisionTransformer).parameters, "norm_eps"}
    for key in args:
        if key not in allowed:
            raise ConfigError(f"unknown model argument {key!r}", fix=nearest(key, allowed))
    given = dict(args)
    try:
        if "norm_eps" in args:
            args["norm_layer"] = _norms(float(args.pop("norm_eps")))
        vit = timm.create_model(name, **{"img_size": img_size, "num_classes": 0, **args})
    except (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(
            f"model {name} cannot be built with {given}: {e}",
            expected="a plain ViT of timm, and arguments that it takes",
        ) from None
    why, fix = "", f"--model {_DEFAULT}"
    if not isinstance(vit, VisionTransformer):
        why = f"is a {type(vit).__name__}"
    elif not len(vit.blocks):
        why, fix = "has no block", "--set model.depth=1, or more"
    elif hasattr(vit, "dist_token"):
        why = "has a distillation token"
    elif not isinstance(vit.patch_embed, PatchEmbed):
        why = f"embeds its patches by a {type(vit.patch_embed).__name__}"
    elif vit.attn_pool is not None:
        why, fix = "pools by an attention that pretraining does not train", _UNPOOLED
    elif vit.patch_embed.patch_size[0] != vit.patch_embed.patch_size[1]:
        why, fix = "has patches that are not square", "--set model.patch_size=16"
    elif any(edge % vit.patch_embed.patch_size[0] for edge in vit.patch_embed.img_size):
        patch, seen = vit.patch_embed.patch_size[0], as_size(vit.patch_embed.img_size)
        why = f"has patches of {patch} px, which do not tile {size_in_words(seen)}"
        fix = f"--set model.patch_size={_tiling(seen, patch)}"
    elif vit.pos_embed is None:
        why = "has no absolute positions"
    elif not vit.patch_embed.flatten or not (any_channels or vit.patch_embed.proj.in_channels == 3):
        why = "takes pictures of any size, or not of three colours"
    elif vit.pos_drop.p or not all(isinstance(m, nn.Identity) for m in (vit.patch_drop, vit.head)):
        why = "drops tokens by itself, or has a classifier"
    if why:
        raise ConfigError(
            f"model {name} {why}",
            expected="a plain ViT of timm with absolute positions",
            fix=fix,
        )
    return vit


def size_argument(args: Mapping[str, Any], default: Size = 224) -> Size:
    """The size that `img_size` among a ViT's arguments says. Raises ConfigError."""
    given = args.get("img_size", default)
    edges = given if isinstance(given, list | tuple) else [given]
    if len(edges) not in (1, 2) or not all(type(edge) is int and edge > 0 for edge in edges):
        raise ConfigError(
            f"model argument img_size={given!r}",
            expected="pixels: one number, or height and width",
            fix="--set model.img_size=224",
        )
    return as_size(edges if len(edges) == 2 else edges[0])


def _norms(eps: float) -> Any:
    """The layer of all norms of a ViT. Raises ValueError."""
    if not 0 <= eps < 1:
        raise ValueError("norm_eps is from 0 to 1")
    return partial(nn.LayerNorm, eps=eps)


def pretrained_vit(name: str, **args: Any) -> Any:
    """A model of timm with its pretrained weights, without head; `args` are create_model's.

    Raises ConfigError: unknown name, or weights that cannot be fetched.
    """
    _check_known(name)
    try:
        with stalled_connections_fail():
            return timm.create_model(name, pretrained=True, num_classes=0, **args)
    except Exception as error:  # hub clients raise many kinds, all for the same reason
        raise ConfigError(
            f"the weights of {name} cannot be fetched: {type(error).__name__}",
            expected="a network, or the weights in the hub's local cache",
        ) from None


def unpretrained_vit(name: str) -> Any:
    """The model that `pretrained_vit` gives, initialised as timm does. Raises ConfigError."""
    _check_known(name)
    return timm.create_model(name, pretrained=False, num_classes=0)


def _check_known(name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        raise unknown_vit(f"unknown timm model {name!r}", name, "timm:")


def unknown_vit(found: str, name: str, before: str = "--model ") -> ConfigError:
    """The error for a name that is no ViT of timm, with the one most like it."""
    known = [model for module in VIT_MODULES for model in timm.list_models(module=module)]
    near = nearest(name, known, count=1) or _DEFAULT
    return ConfigError(found, expected="a ViT of timm", fix=before + near)


def module_of(name: str) -> str:
    """The module of timm that a known model is of."""
    return timm.models.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]


def _tiling(size: Size, patch: int) -> int:
    """The largest patch up to `patch` that tiles a size with 7 x 7 patches or more, if any."""
    edge = math.gcd(*height_width(size))
    fits = [p for p in range(1, min(patch, edge) + 1) if edge % p == 0]
    return max([p for p in fits if min(height_width(size)) // p >= 7] or fits)


def encode(
    vit: Any,
    images: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Tokens after the final norm: [B, P + V, E], class token and registers first.

    `images` [B, channels, H, W] normalised; `visible` [B, V] raster indices, None for all patches.
    Positions are added before patches are dropped (MAE). `recompute` keeps only what goes into
    each block and computes the rest again on the way back. A ViT that averages has its norm
    behind the average: each token gets the same norm.
    """
    return encode_all(vit, images, visible, recompute=recompute)[0]


def encode_all(
    vit: Any,
    images: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    recompute: bool = False,
    blocks: Sequence[int] = (),
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`encode`, and the tokens [B, P + V, E] behind some `blocks`, ascending; the first is 1."""
    positions = vit.pos_embed[:, -vit.patch_embed.num_patches :]
    if visible is None:
        x = vit.patch_embed(images) + positions
    else:
        x = _embedded(vit.patch_embed, images, visible) + positions[0][visible]
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    if prefix:
        tokens = torch.cat(prefix, dim=1)
        if not vit.no_embed_class:
            tokens = tokens + vit.pos_embed[:, : tokens.shape[1]]
        x = torch.cat([tokens.expand(len(x), -1, -1), x], dim=1)
    x = vit.norm_pre(x)
    behind: list[torch.Tensor] = []
    for number, block in enumerate(vit.blocks, start=1):
        x = run_block(block, x, recompute=recompute)
        if number in blocks:
            behind.append(x)
    return vit.fc_norm(vit.norm(x)), behind


def pooled_features(vit: Any, tokens: torch.Tensor, *, mean_alone: bool = False) -> torch.Tensor:
    """What a probe sees of `encode`'s tokens: class token and mean of patches, [B, 2 E].

    Without a class token, and where nothing else is wanted, the mean alone, [B, E].
    """
    patches = tokens[:, vit.num_prefix_tokens :].mean(dim=1)
    alone = mean_alone or vit.cls_token is None
    return patches if alone else torch.cat([tokens[:, 0], patches], dim=1)


def _embedded(embed: Any, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The patch embedding of `visible` [B, V] alone: [B, V, E].

    A quarter of the convolution's work; as one product it also takes the fast way back.
    """
    b, c, height, width = images.shape
    patch = embed.patch_size[0]
    rows, columns = height // patch, width // patch
    patches = images.view(b, c, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(b, device=images.device)[:, None]
    chosen = patches[image, visible // columns, visible % columns].flatten(2)
    return embed.norm(F.linear(chosen, embed.proj.weight.flatten(1), embed.proj.bias))


def run_block(block: nn.Module, *tokens: torch.Tensor, recompute: bool) -> torch.Tensor:
    """One block; with `recompute` its activations are not kept but computed again backwards."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *tokens, use_reentrant=False)
    return block(*tokens)
