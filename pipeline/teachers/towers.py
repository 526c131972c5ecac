"""How an image tower gives tokens and attention: open_clip's own ViT, and the ViTs of timm.

Row 0 of the features is the tower's own vector for the whole image; rows 1 to N are its patches.
What that row is, and whose attention is stored, depends on how the tower pools:

    token   its class token; the class token's attention in the last block
    map     the output of its pooling head (SigLIP); the attention of the head's query
    avg     the average that it outputs; the mean of the patches' attention in the last block

B views, N patches, T = 1 + N tokens, W the tower's width, C the features' width, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final, NoReturn

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from milan.core.device import kept_copy
from milan.core.size import Size, as_size, height_width, size_in_words
from milan.errors import TeacherError
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.text_tower import TextTower
from pipeline.teachers.weights import Weights

CLASS_TOKEN: Final = {
    "token": "the class token",
    "map": "no class token: the image embedding that the pooling head outputs",
    "avg": "no class token: the average of the patches, as the tower outputs it",
}
ATTENTION: Final = {
    "token": "of the class token, last block, mean over heads",
    "map": "of the pooling head's query, mean over heads",
    "avg": "mean over the patches' queries, last block, mean over heads",
}
"""What a store records of its teacher, by the tower's pooling."""


@dataclass(frozen=True)
class Loaded:
    """A tower with its weights, and where they come from."""

    tower: Tower
    architecture: dict
    """Settings that determine the outputs, together with the weights."""
    own: dict
    """`mean` and `std` of its own normalisation."""
    pretrained: str
    """A tag, a file's name, `none` or `its own`."""
    licence: str
    notes: list[str]
    texts: TextTower | None = None
    """Its text tower, if `spec.texts`."""


@dataclass(frozen=True)
class Family:
    """A family of teachers: which names are its own, and how one of them is loaded."""

    accepts: Callable[[str], bool]
    """Whether the teacher of this name is of the family."""
    load: Callable[[TeacherSpec], Loaded]
    """Builds the teacher; raises TeacherError, with the nearest names for an unknown one."""
    weights: Callable[[TeacherSpec], Weights] | None = None
    """Says where `load` would take the weights from; raises the same errors. None: it cannot."""


class Tower(ABC):
    """An image tower as targets need it. `module` holds all its weights."""

    module: Any
    pooling: str
    """token, map or avg."""
    left_out: int
    """Tokens that are neither row 0 nor patches: registers, or a class token that is not used."""
    size: Size
    """Of an image, in pixels."""
    patch: int
    """Edge of a patch in pixels; it tiles the image."""
    channels: int
    """C."""
    blocks: Any
    """Its transformer blocks, in their order."""
    width: int
    """W, of what they pass on."""
    plain = False
    """Whether it is open_clip's own ViT with a class token and nothing left out, as most are."""

    def identity(self) -> dict:
        """Row 0 and the tokens left out, for the fingerprint; empty for the plain kind."""
        return {} if self.plain else {"pooling": self.pooling, "left_out": self.left_out}

    def about(self) -> dict:
        """Row 0, the attention, and how many tokens are left out, for the store's description."""
        return {
            "class_token": CLASS_TOKEN[self.pooling],
            "attention": ATTENTION[self.pooling],
            "left_out": self.left_out,
        }

    def notes(self) -> list[str]:
        """The same as lines for people, where it is not what they would expect."""
        if self.plain:
            return []
        note = f"row 0 is {CLASS_TOKEN[self.pooling]}; attention {ATTENTION[self.pooling]}"
        if self.left_out:
            note += f"; left out beside the patches: {self.left_out}"
            note += " (registers, an unused class token)"
        return [note]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of its patches."""
        height, width = height_width(self.size)
        return height // self.patch, width // self.patch

    @property
    def patches(self) -> int:
        """N."""
        rows, columns = self.grid
        return rows * columns

    @abstractmethod
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, H, W] to features [B, T, C]; under the caller's autocast."""

    @abstractmethod
    def attention(self) -> torch.Tensor:
        """[B, N] float32 of the last images, > 0, not renormalised; computed without autocast."""


class NativeTower(Tower):
    """open_clip's VisionTransformer: every token through ln_post and proj."""

    def __init__(self, name: str, visual: Any) -> None:
        block = visual.transformer.resblocks[-1]
        why = ""
        if visual.attn_pool is not None:
            why = "it pools by attention, so ln_post and proj do not apply to its tokens"
        elif any(edge % visual.patch_size[0] for edge in visual.image_size):
            shape = size_in_words(as_size(visual.image_size))
            why = f"{visual.patch_size[0]}-pixel patches do not tile {shape}"
        elif not isinstance(block.attn, nn.MultiheadAttention):
            why = "its attention is not a plain one"
        elif not hasattr(block.ln_1, "eps"):
            why = "its blocks are not pre-norm"
        elif visual.pool_type not in ("tok", "avg"):
            why = f"it pools by {visual.pool_type!r}"
        if why:
            refuse(name, why)
        self.module = visual
        self.pooling = "token" if visual.pool_type == "tok" else "avg"
        self.plain = self.pooling == "token"
        self.left_out = 0 if self.plain else 1
        self.size, self.patch = as_size(visual.image_size), int(visual.patch_size[0])
        self.channels = int(visual.proj.shape[1])
        self.blocks, self.width = visual.transformer.resblocks, int(visual.proj.shape[0])
        visual.output_tokens = False
        self._hooked: dict[str, torch.Tensor] = {}
        for each in visual.transformer.resblocks:
            if isinstance(each.attn, nn.MultiheadAttention):
                each.attention = partial(_attend, each.attn)
        block.register_forward_pre_hook(self._keep_input)
        visual.transformer.register_forward_hook(self._keep_output)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.module(images)
        tokens = self.module.ln_post(self._hooked.pop("output")) @ self.module.proj
        if self.pooling == "avg":
            tokens = torch.cat([pooled[:, None].to(tokens.dtype), tokens[:, 1:]], dim=1)
        return tokens

    def attention(self) -> torch.Tensor:
        block, x = self.module.transformer.resblocks[-1], self._hooked.pop("input")
        return (class_attention if self.pooling == "token" else mean_attention)(block, x)

    def _keep_input(self, _: nn.Module, args: tuple) -> None:
        self._hooked["input"] = args[0]

    def _keep_output(self, _: nn.Module, __: tuple, output: torch.Tensor) -> None:
        self._hooked["output"] = output


class TimmTower(Tower):
    """A ViT of timm, alone or inside a CLIP: every token through final norm and projection.

    `head` is what a CLIP has behind its timm trunk. The last attention is not written out here for
    each variant (query and key norms, rotary positions, separate biases, grouped keys): timm's own
    runs a second time in float32, up to where it has its queries and keys.
    """

    def __init__(
        self, name: str, module: nn.Module, trunk: Any, head: nn.Module, pooling: str
    ) -> None:
        check_vit(name, trunk)
        embed = trunk.patch_embed
        self.size, self.patch = as_size(embed.img_size), patch_of(trunk)
        self.module, self.trunk, self.head, self.pooling = module, trunk, head, pooling
        self.prefix: int = trunk.num_prefix_tokens
        self.left_out = self.prefix - (pooling == "token")
        self.blocks, self.width = trunk.blocks, int(trunk.embed_dim)
        attn: Any = trunk.attn_pool if pooling == "map" else getattr(trunk.blocks[-1], "attn", None)
        why = ""
        if tuple(embed.grid_size) != self.grid or embed.num_patches != self.patches:
            why = f"{self.patch}-pixel patches do not tile {size_in_words(self.size)}"
        elif pooling not in CLASS_TOKEN:
            why = f"it pools by {pooling!r}"
        elif attn is None:
            why = "its blocks have no attention of their own"
        if why:
            refuse(name, why)
        if hasattr(rope := getattr(trunk, "rope", None), "get_embed"):
            _keep_positions(rope)
        attn.fused_attn = True  # else it would attend without scaled_dot_product_attention
        self._attn = attn
        count = self.patches + (self.prefix if pooling != "map" else 0)
        example = torch.zeros(1, count, trunk.embed_dim, device=next(trunk.parameters()).device)
        with torch.no_grad():
            try:
                _queries_and_keys(self._attn, (example,), {})
                self.channels = int(self._project(example).shape[-1])
            except (RuntimeError, TypeError, ValueError) as error:
                refuse(name, f"its attention is not a plain one ({str(error)[:100]})")
        self._input: tuple[tuple, dict] | None = None
        self._attn.register_forward_pre_hook(self._keep_input, with_kwargs=True)

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        x = self.trunk.forward_features(images)
        patches = self._project(x[:, self.prefix :])
        if self.pooling == "token":
            image = self._project(x[:, :1])
        else:
            image = self.head(self.trunk.forward_head(x))[:, None]
        return torch.cat([image, patches.to(image.dtype)], dim=1)

    def attention(self) -> torch.Tensor:
        assert self._input is not None, "tokens() has not run"
        (args, kwargs), self._input = self._input, None
        q, k, bias = _queries_and_keys(self._attn, args, kwargs)
        first_averaged = 0 if getattr(self.trunk, "pool_include_prefix", False) else self.prefix
        rows = slice(first_averaged, None) if self.pooling == "avg" else slice(0, 1)
        return mean_softmax(q, k, bias, rows=rows, patches=self.patches)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        # Towers that average have their final norm behind the average: the patches get the same.
        return self.head(self.trunk.head(self.trunk.fc_norm(x)))

    def _keep_input(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._input = args, kwargs


def check_vit(name: str, trunk: Any) -> None:
    """Refuse the teacher `name` unless timm's `trunk` is a ViT that this module supports."""
    if not isinstance(trunk, VisionTransformer | Eva | Beit):
        refuse(name, f"its image tower is a {type(trunk).__name__}")


def patch_of(trunk: Any) -> int:
    """Pixels along the edge of a patch; of a hybrid, those that its stem reduces to one token."""
    embed = trunk.patch_embed
    return int(embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size[0])


def _keep_positions(rope: Any) -> None:
    """Have timm's rotary positions computed once on each device.

    Towers of any input size compute them on the CPU for every batch, and the copy waits for the
    device.
    """
    kept: dict[Any, torch.Tensor] = {}
    compute = rope.get_embed

    def get_embed(shape: Sequence[int] | None = None, **more: Any) -> torch.Tensor:
        device = next(chain(rope.buffers(), rope.parameters())).device
        key = (device, shape and tuple(shape), *sorted(more.items()))
        return kept_copy(kept, key, lambda: compute(shape, **more), device)

    if not any(weight.requires_grad for weight in rope.parameters()):  # a buffer alone is constant
        rope.get_embed = get_embed


class _CaptureAttention(TorchFunctionMode):
    """Records the arguments of scaled_dot_product_attention in place of running it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple, dict]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs or {}))
            return args[0]  # of the right shape; the result is not used
        return func(*args, **(kwargs or {}))


def _queries_and_keys(
    attn: nn.Module, args: tuple, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries [B, H, Q, d], scaled, keys [B, H, T, d] and what is added to the logits; float32.

    Raises ValueError unless `attn` attends exactly once, without a mask.
    """
    args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
    with torch.autocast(args[0].device.type, enabled=False), _CaptureAttention() as captured:
        attn.forward(*args, **kwargs)  # not the call: its hooks have run
    if len(captured.calls) != 1:
        raise ValueError(f"{len(captured.calls)} calls of scaled_dot_product_attention")
    (q, k, *_), options = captured.calls[0]
    bias, scale = options.get("attn_mask"), options.get("scale")
    if options.get("is_causal") or (bias is not None and bias.dtype == torch.bool):
        raise ValueError("it masks tokens")
    return q * (q.shape[-1] ** -0.5 if scale is None else scale), k, bias


def mean_softmax(
    q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, *, rows: slice, patches: int
) -> torch.Tensor:
    """softmax(q kᵀ + bias), its mean over heads and over the queries `rows`, for the last `patches`
    keys: [B, N], > 0.

    `q` [B, H, Q, d] scaled, `k` [B, H, T, d]. One head at a time: all of them for all queries would
    be H times as much memory.
    """
    heads = q.shape[1]
    total = q.new_zeros(len(q), patches)
    with torch.autocast(q.device.type, enabled=False):
        for head in range(heads):
            logits = q[:, head, rows] @ k[:, head].transpose(1, 2)
            if bias is not None:
                logits = logits + bias.expand(*q.shape[:3], k.shape[2])[:, head, rows]
            total += logits.softmax(dim=-1)[..., -patches:].mean(dim=1)
    # A softmax tail can underflow; sampling needs weights above zero.
    return (total / heads).clamp_min(torch.finfo(torch.float32).tiny)


def _attend(attn: nn.MultiheadAttention, q_x: torch.Tensor, **_: Any) -> torch.Tensor:
    """Self-attention of [B, T, W] by the weights of `attn`.

    nn.MultiheadAttention transposes to [T, B, W] first; under autocast on a CPU its projection of
    that copies the weights once a token, and ViT-B/16 in bf16 takes four times as long as here.
    """
    batch, tokens, width = q_x.shape
    qkv = F.linear(q_x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)
    return attn.out_proj(attended.transpose(1, 2).reshape(batch, tokens, width))


def _norm_1(block: Any, x: torch.Tensor) -> torch.Tensor:
    norm = block.ln_1
    return F.layer_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.bias.float(), norm.eps)


def class_attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The class token's attention to each patch inside open_clip's `block`, mean over heads.

    `x` [B, T, W] is the block's input; returns [B, N] float32, strictly positive, not renormalised
    (rows sum to 1 minus the class token's attention to itself). One query row, no second
    attention: q·(W_k y) = (W_k^T q)·y, so the keys are never projected, and the key's bias adds
    the same to every logit of a row, which softmax does not see.
    """
    attn = block.attn
    heads, width = attn.num_heads, x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        y = _norm_1(block, x)
        weight_q, weight_k, _ = attn.in_proj_weight.float().chunk(3)
        q = y[:, 0] @ weight_q.T + attn.in_proj_bias.float()[:width]  # [B, W]
        q = q.view(-1, heads, width // heads)
        query = torch.einsum("bhd,hdw->bhw", q, weight_k.view(heads, width // heads, width))
        logits = query @ y.transpose(1, 2) * (width // heads) ** -0.5  # [B, heads, T]
        attention = logits.softmax(dim=-1).mean(dim=1)[:, 1:]
    # A softmax tail can underflow; sampling needs weights above zero.
    return attention.clamp_min(torch.finfo(torch.float32).tiny)


def mean_attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """As `class_attention`, of a tower that averages: the mean over the queries of all patches.

    The average weighs the patches' values by it, as the class token weighs them by its own.
    """
    attn = block.attn
    with torch.autocast(x.device.type, enabled=False):
        y = _norm_1(block, x)
        qk = F.linear(y, attn.in_proj_weight.float(), attn.in_proj_bias.float())
        q, k, _ = qk.view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5
    return mean_softmax(q, k, None, rows=slice(1, None), patches=x.shape[1] - 1)


def refuse(name: str, why: str) -> NoReturn:
    """Raise TeacherError: the teacher `name` has no usable tokens; it lists some that have."""
    raise TeacherError(
        f"teacher {name} cannot give targets: {why}",
        expected="a ViT of open_clip (ViT-B-16, EVA02-B-16, ViT-B-16-SigLIP2, ViTamin-B) or of "
        "timm (timm:vit_base_patch14_reg4_dinov2, timm:vit_base_patch16_dinov3)",
        fix="--teacher ViT-B-16-quickgelu",
    )
