"""The encoder: a ViT of timm, with MAE's positions, that may see some patches only.

B views, N patches = V visible + M masked, P prefix tokens (class token, registers), E width.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from milan.errors import ConfigError, nearest

_UNPOOLED = "--set model.global_pool=avg"


def sincos_positions(width: int, grid: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions [1, 1 + grid², width], float32; the class token's is zero.

    MAE's layout: the first half of the channels encodes the column, the second half the row, each
    half sines then cosines (MAE, util/pos_embed.py). Raises ConfigError unless 4 divides width.
    """
    if width < 4 or width % 4:
        raise ConfigError(f"width {width}", expected="a multiple of 4, for sine-cosine positions")
    omega = 10000 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1) * omega
        halves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(halves, axis=1)
    return torch.from_numpy(np.vstack([np.zeros((1, width)), table])).float()[None]


def build_encoder(name: str, *, img_size: int, args: dict[str, Any] | None = None) -> Any:
    """A timm ViT without head, with frozen sine-cosine positions in place of its own.

    Arguments and errors are `create_vit`'s; `initialise` gives it MAE's initial weights.
    """
    vit = create_vit(name, img_size=img_size, args=args)
    table = sincos_positions(vit.embed_dim, vit.patch_embed.grid_size[0])[:, 1:]
    vit.pos_embed.data.zero_()
    vit.pos_embed.data[:, -table.shape[1] :] = table
    vit.pos_embed.requires_grad_(False)
    return vit


def create_vit(name: str, *, img_size: int, args: dict[str, Any] | None = None) -> Any:
    """A timm ViT without head, initialised as timm does.

    `args` override its arguments (patch_size, embed_dim, depth, num_heads, ...). Raises
    ConfigError: unknown name or argument (the nearest are named), or a ViT of another kind.
    """
    known = timm.list_models("*vit*")
    if not timm.is_model(name):
        raise ConfigError(
            f"unknown model {name!r}", expected="a ViT of timm", fix=nearest(name, known)
        )
    args = dict(args or {})
    allowed = set(inspect.signature(VisionTransformer).parameters)
    for key in args:
        if key not in allowed:
            raise ConfigError(f"unknown model argument {key!r}", fix=nearest(key, allowed))
    try:
        vit = timm.create_model(name, **{"img_size": img_size, "num_classes": 0, **args})
    except (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(
            f"model {name} cannot be built with {args}: {e}",
            expected="a plain ViT of timm, and arguments that it takes",
        ) from None
    why, fix = "", "--model vit_base_patch16_224"
    if not isinstance(vit, VisionTransformer):
        why = f"is a {type(vit).__name__}"
    elif hasattr(vit, "dist_token"):
        why = "has a distillation token"
    elif not isinstance(vit.patch_embed, PatchEmbed):
        why = f"embeds its patches by a {type(vit.patch_embed).__name__}"
    elif vit.attn_pool is not None:
        why, fix = "pools by an attention that pretraining does not train", _UNPOOLED
    elif vit.patch_embed.grid_size[0] != vit.patch_embed.grid_size[1]:
        why = "has a grid that is not square"
    elif vit.patch_embed.num_patches * vit.patch_embed.patch_size[0] ** 2 != img_size**2:
        why = f"has patches of {vit.patch_embed.patch_size[0]} pixels, which do not tile {img_size}"
    elif vit.pos_embed is None:
        why = "has no absolute positions"
    elif not vit.patch_embed.flatten or vit.patch_embed.proj.in_channels != 3:
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


def pretrained_vit(name: str, **args: Any) -> Any:
    """A model of timm with its pretrained weights, without head; `args` are create_model's.

    Raises ConfigError: unknown name, or weights that cannot be fetched.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(
            f"unknown timm model {name!r}", fix=nearest(name, timm.list_models("*vit*"))
        )
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **args)
    except Exception as error:  # hub clients raise many kinds, all for the same reason
        raise ConfigError(
            f"the weights of {name} cannot be fetched: {type(error).__name__}",
            expected="a network, or the weights in the hub's local cache",
        ) from None


def encode(
    vit: Any,
    images: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Tokens after the final norm: [B, P + V, E], class token and registers first.

    `images` [B, 3, S, S] normalised; `visible` [B, V] raster indices, None for all patches.
    Positions are added before patches are dropped (MAE). `recompute` keeps only what goes into
    each block and computes the rest again on the way back. A ViT that averages has its norm
    behind the average: each token gets the same norm.
    """
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
    for block in vit.blocks:
        x = run_block(block, x, recompute=recompute)
    return vit.fc_norm(vit.norm(x))


def pooled_features(vit: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What a probe sees of `encode`'s tokens: class token and mean of patches, [B, 2 E].

    Without a class token the mean alone, [B, E].
    """
    patches = tokens[:, vit.num_prefix_tokens :].mean(dim=1)
    return torch.cat([tokens[:, 0], patches], dim=1) if vit.has_class_token else patches


def _embedded(embed: Any, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The patch embedding of `visible` [B, V] alone: [B, V, E].

    A quarter of the convolution's work; as one product it also takes the fast way back.
    """
    b, c, size, _ = images.shape
    patch = embed.patch_size[0]
    grid = size // patch
    patches = images.view(b, c, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(b, device=images.device)[:, None]
    chosen = patches[image, visible // grid, visible % grid].flatten(2)
    return embed.norm(F.linear(chosen, embed.proj.weight.flatten(1), embed.proj.bias))


def run_block(block: nn.Module, *tokens: torch.Tensor, recompute: bool) -> torch.Tensor:
    """One block; with `recompute` its activations are not kept but computed again backwards."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *tokens, use_reentrant=False)
    return block(*tokens)
