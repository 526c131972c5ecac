"""Real towers of timm and open_clip made small, each with a witness: what the library computes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import open_clip
import timm
import torch
from helpers import TEACHER
from timm.models import DefaultCfg, model_entrypoint, register_model

from pipeline.teachers.load import Teacher

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}

default_cfgs: dict[str, DefaultCfg] = {}  # where timm looks for those of this module's models


def small(name: str, real: str, **args: Any) -> None:
    """Register timm's `real` model as `name`, small: its own settings but for SMALL and `args`."""

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        return model_entrypoint(real)(pretrained, **{**SMALL, **args, **kwargs})

    build.__name__ = build.__qualname__ = name
    cfg = replace(timm.get_pretrained_cfg(real), tag=None, url=None, hf_hub_id=None)
    default_cfgs[name] = DefaultCfg(tags=deque([""]), cfgs={"": cfg})
    register_model(build)


# name -> (timm's model, what is set beside SMALL); only those that this timm has
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "small_vit": ("vit_small_patch16_224", {}),
    "small_norms": ("vit_small_patch16_224", {"qk_norm": True, "qkv_bias": False}),
    "small_clip": ("vit_base_patch16_clip_224", {}),  # norm before the blocks
    "small_dinov2": ("vit_small_patch14_reg4_dinov2", {}),  # four registers, LayerScale
    "small_dinov3": ("vit_small_patch16_dinov3", {}),  # rotary positions, four registers
    "small_dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
    "small_eva": ("eva_giant_patch14_224", {}),  # no key bias
    "small_eva02": ("eva02_base_patch14_224", {}),  # rotary, separate projections, inner norms
    "small_mixed": ("vit_small_patch16_rope_mixed_224", {}),  # rotary, learned, another a block
    "small_grouped": (
        "vit_base_patch16_sapiens2",
        {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 64},
    ),
    "small_beit": ("beit_base_patch16_224", {}),  # position biases, the norm behind the average
    "small_distilled": ("deit_small_distilled_patch16_224", {}),  # a second class token
}
CLASS_TOKENS = [name for name, (real, _) in VITS.items() if timm.is_model(real)]
CLIPS: dict[str, tuple[str, str, str | None]] = {
    # name -> timm's model, timm_pool, timm_proj, as in open_clip's configs
    "eva_clip": ("eva02_base_patch16_clip_224", "token", None),  # EVA02-B-16
    "siglip": ("vit_base_patch16_siglip_224", "map", "none"),  # ViT-B-16-SigLIP
    "pe": ("vit_pe_core_base_patch16_224", "map", None),  # PE-Core-B-16: a class token, not used
    "gap": ("vit_medium_patch16_gap_256", "", "linear"),
    "avg": ("vit_base_patch16_224", "avg", "mlp"),  # a class token, not used
}
POOLED = [name for name, (real, _, _) in CLIPS.items() if timm.is_model(real)]
for _name in CLASS_TOKENS:
    small(_name, VITS[_name][0], **VITS[_name][1])
for _name in POOLED:
    small(f"small_{_name}_trunk", CLIPS[_name][0])
small("small_siglip_gap", "vit_base_patch16_siglip_gap_224")


def clip_config(name: str) -> dict:
    _, pool, proj = CLIPS[name]
    embed = 48 if proj == "none" else 24
    vision = {
        "image_size": 32, "timm_model_name": f"small_{name}_trunk", "timm_pool": pool,
        "timm_proj": proj,
    }  # fmt: skip
    return {**TEACHER, "embed_dim": embed, "vision_cfg": vision, "custom_text": True}


def sharp(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries and keys of random weights, made large: else attention is nearly flat.

    Everything else is moved off its initial value, or zero biases and unit norms would prove
    nothing.
    """
    draw = torch.Generator().manual_seed(5)
    found = {}
    for key, value in state.items():
        value = value.float() + 0.1 * torch.randn(value.shape, generator=draw)
        attends = ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn_pool.q.", "attn_pool.kv")
        found[key] = value * 3 if any(part in key for part in attends) else value
    return found


def without_custom_text(config: dict) -> dict:
    """As open_clip's constructor takes it."""
    return {k: v for k, v in config.items() if k != "custom_text"}


def alone(name: str, teacher: Teacher) -> Any:
    """The same model by timm or open_clip alone, its attention written out: the witness."""
    if name in CLIPS:
        model = open_clip.CustomTextCLIP(**without_custom_text(clip_config(name))).visual
    else:
        model = timm.create_model(name, num_classes=0)
    model.load_state_dict(teacher.visual.state_dict())
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model.eval()


@torch.no_grad()
def last_attention(trunk: Any, images: torch.Tensor) -> torch.Tensor:
    """All of the last block's attention [B, T, T], mean over heads, as the block computes it."""
    seen: list[torch.Tensor] = []
    drop = trunk.blocks[-1].attn.attn_drop
    handle = drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trunk.forward_features(images)
    handle.remove()
    return seen[0].mean(dim=1)


@torch.no_grad()
def pool_attention(trunk: Any, images: torch.Tensor) -> torch.Tensor:
    """The pooling query's attention [B, keys], mean over heads, by the equations."""
    seen: list[torch.Tensor] = []
    pool = trunk.attn_pool
    handle = pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trunk(images)
    handle.remove()
    x, heads = seen[0], pool.num_heads
    width = x.shape[-1]
    q = (pool.latent[0] @ pool.q.weight.T + pool.q.bias).view(heads, -1)
    k = (x @ pool.kv.weight[:width].T + pool.kv.bias[:width]).view(*x.shape[:2], heads, -1)
    logits = torch.einsum("hd,bthd->bht", q, k) / (width // heads) ** 0.5
    return logits.softmax(dim=-1).mean(dim=1)


def check(
    teacher: Teacher, images: torch.Tensor, tokens: torch.Tensor, attention: torch.Tensor
) -> None:
    """The teacher says `tokens` and `attention`; and they are such that a mistake would show."""
    found, seen = teacher.forward(images)
    assert found.shape == (5, 17, teacher.channels) == tokens.shape
    assert seen.shape == (5, 16) == attention.shape
    assert found.dtype == seen.dtype == torch.float32
    assert (found - tokens).abs().max() <= 2e-5 * tokens.abs().max()
    assert (seen - attention).abs().max() <= 2e-6
    assert (seen > 0).all()
    assert attention.std() > 0.005, "this attention is too flat to tell anything apart"
    assert (tokens[:, 0] - tokens[:, 1:].mean(dim=1)).abs().max() > 1e-2 * tokens.abs().max()
