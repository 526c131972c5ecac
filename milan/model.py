"""The student: a ViT encoder over visible patches, and a decoder that predicts every token.

B views, N patches = V visible + M masked, T = 1 + N tokens with the class token first,
E encoder width, D decoder width, C target width.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, Final

import numpy as np
import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F

from milan.errors import ConfigError, nearest
from milan.masking import Mask

DECODERS: Final = ("prompt", "mae")
DECODER: Final = {"embed_dim": 512, "depth": 8, "num_heads": 16, "mlp_ratio": 4.0}
"""The published decoder, the same for every size of encoder (MILAN, models_milan.py)."""
_EPS: Final = 1e-6


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
    vit.pos_embed.data.copy_(sincos_positions(vit.embed_dim, vit.patch_embed.grid_size[0]))
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
    why = ""
    if not isinstance(vit, VisionTransformer):
        why = f"is a {type(vit).__name__}"
    elif vit.cls_token is None or vit.num_prefix_tokens != 1:
        why = "has no class token, or register tokens beside it"
    elif vit.patch_embed.grid_size[0] != vit.patch_embed.grid_size[1]:
        why = "has a grid that is not square"
    elif vit.patch_embed.num_patches * vit.patch_embed.patch_size[0] ** 2 != img_size**2:
        why = f"has patches of {vit.patch_embed.patch_size[0]} pixels, which do not tile {img_size}"
    elif vit.pos_embed is None or vit.pos_embed.shape[1] != 1 + vit.patch_embed.num_patches:
        why = "has no absolute positions for all its tokens"
    elif not vit.patch_embed.flatten or vit.patch_embed.proj.in_channels != 3:
        why = "takes pictures of any size, or not of three colours"
    elif vit.pos_drop.p or not all(isinstance(m, nn.Identity) for m in (vit.patch_drop, vit.head)):
        why = "drops tokens by itself, or has a classifier"
    if why:
        raise ConfigError(
            f"model {name} {why}",
            expected="a plain ViT of timm: one class token, absolute positions",
            fix="--model vit_base_patch16_224",
        )
    return vit


def encode(vit: Any, images: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens after the final norm: [B, 1 + V, E], class token first.

    `images` [B, 3, S, S] normalised; `visible` [B, V] raster indices, None for all patches.
    Positions are added before patches are dropped (MAE).
    """
    x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    if visible is not None:
        x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))
    class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = vit.norm_pre(torch.cat([class_token, x], dim=1))
    return vit.norm(vit.blocks(x))


class PromptAttention(nn.Module):
    """Masked tokens ask; visible tokens (the prompts) and masked tokens answer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Prompts [B, 1 + V, D] and normed masked tokens [B, M, D] to [B, M, D]."""
        b, m, d = x.shape
        q = self.q(x).view(b, m, self.heads, -1).transpose(1, 2)
        kv = self.kv(torch.cat([prompts, x], dim=1))
        k, v = kv.view(b, kv.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
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


class Decoder(nn.Module):
    """Predicts all T tokens from the encoded visible ones.

    kind `prompt` (MILAN, section 3.2): visible tokens are fixed prompts, only masked tokens are
    updated. kind `mae`: every token is updated by plain self-attention (MAE).
    """

    def __init__(
        self,
        kind: str,
        *,
        encoder_width: int,
        grid: int,
        target_width: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        if kind not in DECODERS:
            raise ConfigError(f"decoder {kind!r}", expected=" or ".join(DECODERS))
        if embed_dim % num_heads:
            raise ConfigError(
                f"decoder width {embed_dim} with {num_heads} heads",
                expected="a width that the heads divide",
                fix="--set decoder.num_heads=…",
            )
        self.kind = kind
        self.embed = nn.Linear(encoder_width, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, grid), requires_grad=False)
        block = PromptBlock if kind == "prompt" else _mae_block
        blocks = [block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=_EPS)
        self.pred = nn.Linear(embed_dim, target_width)

    def forward(self, latent: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Latent [B, 1 + V, E] to predictions [B, T, C] in raster order, class token first."""
        z = self.embed(latent)
        b, _, d = z.shape
        # Tokens are kept as [class, visible | masked]; attention does not care for their order,
        # so they go back to raster order once, at the end.
        order = torch.cat([torch.zeros_like(mask.visible[:, :1]), mask.visible + 1], dim=1)
        position = self.pos_embed.to(z.dtype).expand(b, -1, -1)
        prompts = z + position.gather(1, order[..., None].expand(-1, -1, d))
        masked = self.mask_token.to(z.dtype) + position.gather(
            1, mask.masked[..., None].expand(-1, -1, d) + 1
        )
        if self.kind == "prompt":
            for block in self.blocks:
                masked = block(prompts, masked)
            tokens = torch.cat([prompts, masked], dim=1)
        else:
            tokens = torch.cat([prompts, masked], dim=1)
            for block in self.blocks:
                tokens = block(tokens)
        raster = torch.cat([order, mask.masked + 1], dim=1).argsort(dim=1)
        prediction = self.pred(self.norm(tokens))
        return prediction.gather(1, raster[..., None].expand(-1, -1, prediction.shape[2]))


class Student(nn.Module):
    """Encoder and decoder; only the encoder is exported."""

    def __init__(self, encoder: Any, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: torch.Tensor, mask: Mask) -> torch.Tensor:
        """Normalised images [B, 3, S, S] to predictions [B, T, C]."""
        return self.decoder(encode(self.encoder, images, mask.visible), mask)

    def represent(self, images: torch.Tensor) -> torch.Tensor:
        """Whole images [B, 3, S, S] to class token and mean of patches, [B, 2 E]: for probes."""
        tokens = encode(self.encoder, images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


def build_student(
    name: str,
    *,
    img_size: int,
    target_width: int,
    decoder_kind: str = "prompt",
    model_args: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    seed: int = 0,
) -> Student:
    """A student with the published initial weights, the same for the same seed.

    `model_args` and `decoder` override the arguments of the encoder (timm's) and of DECODER.
    """
    for key in decoder or {}:
        if key not in DECODER:
            raise ConfigError(
                f"unknown decoder argument {key!r}",
                expected="one of " + ", ".join(DECODER),
                fix=nearest(key, DECODER),
            )
    for key, value in (decoder or {}).items():
        kind = (int, float) if key == "mlp_ratio" else int
        if not isinstance(value, kind) or value <= 0:
            raise ConfigError(f"decoder argument {key} = {value!r}", expected="a number above 0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = build_encoder(name, img_size=img_size, args=model_args)
        grid = vit.patch_embed.grid_size[0]
        head = Decoder(
            decoder_kind,
            encoder_width=vit.embed_dim,
            grid=grid,
            target_width=target_width,
            **{**DECODER, **(decoder or {})},
        )
        student = Student(vit, head)
        initialise(student)
    return student


def initialise(student: Student) -> None:
    """MAE's initial weights, which MILAN keeps (models_milan.py, initialize_weights).

    Linear layers Xavier-uniform with zero bias, norms 1 and 0, tokens N(0, 0.02), the patch
    embedding Xavier-uniform as a matrix, its bias as torch makes it. Positions are not touched.
    """
    for module in student.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    projection = student.encoder.patch_embed.proj
    projection.reset_parameters()
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    nn.init.normal_(student.encoder.cls_token, std=0.02)
    nn.init.normal_(student.decoder.mask_token, std=0.02)
