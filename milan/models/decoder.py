"""The decoder: predicts tokens from the visible ones, by prompting (MILAN) or plainly (MAE).

B views, N patches = V visible + M masked, T = 1 + N tokens with the class token first (T = N
where the encoder has none), E encoder width, D decoder width, C target width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from milan.core.device import product_dtype
from milan.errors import ConfigError, nearest
from milan.models.encoder import run_block, sincos_positions
from milan.models.masking import Mask

DECODERS: Final = ("prompt", "mae")
PUBLISHED: Final = {"embed_dim": 512, "depth": 8, "num_heads": 16, "mlp_ratio": 4.0}
"""The published decoder, of ViT-B and ViT-L (MILAN, models_milan.py)."""
_HEAD: Final = 32  # channels of a published head
_EPS: Final = 1e-6


def decoder_arguments(encoder_width: int, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """All arguments of a decoder; those that are not `given` fit an encoder of width E.

    D is two thirds of E, in heads of 32 channels, and at most the published 512: so it is for ViT-B
    (E = 768) and above, 256 for ViT-S, 128 for ViT-Ti. Blocks and mlp_ratio are as published.
    Raises ConfigError for an unknown argument, or one that is no number above 0.
    """
    given = given or {}
    for key, value in given.items():
        if key not in PUBLISHED:
            raise ConfigError(
                f"unknown decoder argument {key!r}",
                expected="one of " + ", ".join(PUBLISHED),
                fix=nearest(key, PUBLISHED),
            )
        kind = (int, float) if key == "mlp_ratio" else int
        if not isinstance(value, kind) or value <= 0:
            raise ConfigError(
                f"decoder argument {key} = {value!r}",
                expected="a number above 0",
                fix=f"--set decoder.{key}={PUBLISHED[key]:g}, as published, or without it",
            )
    fitting = _HEAD * max(1, round(encoder_width * 2 / 3 / _HEAD))
    width = given.get("embed_dim", min(fitting, PUBLISHED["embed_dim"]))
    heads = next(n for n in range(max(1, width // _HEAD), 0, -1) if width % n == 0)
    return {**PUBLISHED, "embed_dim": width, "num_heads": heads, **given}


class PromptAttention(nn.Module):
    """Masked tokens ask; visible tokens (the prompts) and masked tokens answer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.fused_attn = True  # timm's name, so that one setting serves both
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Prompts [B, 1 + V, D] and normed masked tokens [B, M, D] to [B, M, D]."""
        b, m, d = x.shape
        q = self.q(x).view(b, m, self.heads, -1).transpose(1, 2)
        # Cast before they are joined, and taken apart where they lie: the same numbers, fewer bytes
        # (python -m benchmarks.traffic).
        dtype = product_dtype(x)
        kv = self.kv(torch.cat([prompts.to(dtype), x.to(dtype)], dim=1))
        kv = kv.view(b, kv.shape[1], 2, self.heads, -1)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, m, d))


class PromptBlock(nn.Module):
    """A pre-norm block that updates masked tokens only. Prompts stay raw: no norm touches them."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = PromptAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[B, 1 + V, D], [B, M, D] to [B, M, D]."""
        x = x + self.attn(prompts, self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _mae_block(width: int, heads: int, mlp_ratio: float) -> nn.Module:
    norm: Any = partial(nn.LayerNorm, eps=_EPS)
    return Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm)


class TeacherHead(nn.Module):
    """Predicts one of several teachers from what they share: norm and MLP (AM-RADIO, arXiv
    2312.06709, section 3.3). Its hidden layer is as wide as the decoder.
    """

    def __init__(self, width: int, target_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width, width, target_width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, D] to [B, T, C]."""
        return self.mlp(self.norm(tokens))


class Decoder(nn.Module):
    """Predicts all T tokens from the encoded visible ones, or those that `Mask.chosen` leaves.

    One target has a norm and a linear layer, as published. Of several widths C is their sum: the
    predictions of a head for each, side by side.

    kind `prompt` (MILAN, section 3.2): visible tokens are fixed prompts, only masked tokens are
    updated. kind `mae`: every token is updated by plain self-attention (MAE). Without
    `class_token` there is none among the tokens, and none is predicted.
    """

    def __init__(
        self,
        kind: str,
        *,
        encoder_width: int,
        grid: int | tuple[int, int],
        target_width: int | Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        if kind not in DECODERS:
            raise ConfigError(f"decoder {kind!r}", expected=" or ".join(DECODERS))
        if embed_dim % num_heads:
            raise ConfigError(
                f"decoder width {embed_dim} with {num_heads} heads",
                expected="a width that the heads divide",
                fix=f"--set decoder.num_heads={math.gcd(embed_dim, num_heads)}",
            )
        self.kind, self.class_token, self.grid = kind, class_token, grid
        self.arguments = {
            "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
        }  # fmt: skip
        self.embed = nn.Linear(encoder_width, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, grid), requires_grad=False)
        block = PromptBlock if kind == "prompt" else _mae_block
        blocks = [block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.target_width = target_width
        self.heads: nn.ModuleList | None = None
        if isinstance(target_width, int):
            self.norm = nn.LayerNorm(embed_dim, eps=_EPS)
            self.pred = nn.Linear(embed_dim, target_width)
        else:
            self.heads = nn.ModuleList(TeacherHead(embed_dim, width) for width in target_width)

    def like(self, *, depth: int) -> Decoder:
        """Another of the same shape, with so many blocks and weights of its own."""
        return Decoder(
            self.kind, encoder_width=self.embed.in_features, grid=self.grid,
            target_width=self.target_width, class_token=self.class_token,
            **self.arguments | {"depth": depth},  # type: ignore[arg-type]
        )  # fmt: skip

    def forward(self, latent: torch.Tensor, mask: Mask, *, recompute: bool = False) -> torch.Tensor:
        """Latent [B, 1 + V, E] to predictions [B, T, C]: of the class token, of the visible
        patches, and of the masked ones (`Mask.order`).

        Where the mask chooses D masked patches, the others are in no block, and T = 1 + V + D.
        """
        z = self.embed(latent)
        b, _, d = z.shape
        # Attention does not care for the order of tokens: they never go back to raster order.
        order = mask.visible + 1
        if self.class_token:
            order = torch.cat([torch.zeros_like(order[:, :1]), order], dim=1)
        # Positions and mask token are float32: so is the sum that the blocks add to, also under
        # autocast, as in the published code.
        position = self.pos_embed.expand(b, -1, -1)
        prompts = z + position.gather(1, order[..., None].expand(-1, -1, d))
        masked = self.mask_token + position.gather(1, mask.decoded[..., None].expand(-1, -1, d) + 1)
        if self.kind == "prompt":
            for block in self.blocks if masked.shape[1] else ():  # else nothing to update
                masked = run_block(block, prompts, masked, recompute=recompute)
            tokens = torch.cat([prompts, masked], dim=1)
        else:
            tokens = torch.cat([prompts, masked], dim=1)
            for block in self.blocks:
                tokens = run_block(block, tokens, recompute=recompute)
        if self.heads is None:
            return self.pred(self.norm(tokens))
        return torch.cat([head(tokens) for head in self.heads], dim=-1)
