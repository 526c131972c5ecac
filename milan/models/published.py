"""The published checkpoints' layout (MILAN, models_milan.py): read into a Student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milan.errors import ConfigError
from milan.models.checkpoint_file import read_checkpoint
from milan.models.decoder import PUBLISHED, Decoder
from milan.models.encoder import build_encoder
from milan.models.foreign import HEADS
from milan.models.state_dict import unwrapped
from milan.models.student import Student

_RENAMED = {
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}


def our_name(published: str) -> str:
    """The name in a Student of a parameter of the published layout."""
    for theirs, ours in _RENAMED.items():
        if published == theirs or (theirs.endswith(".") and published.startswith(theirs)):
            return ours + published[len(theirs) :]
    return "encoder." + published


def load_published(
    source: str | Path | Mapping[str, Any], *, config: Mapping[str, Any] | None = None
) -> Student:
    """A Student with the weights of a checkpoint in the published layout, in eval mode.

    `source`: a file (.pth, .safetensors), or a state dict of tensors or arrays. `config` as in
    the golden vectors (img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim,
    decoder_depth, decoder_num_heads, target_dim, norm_eps); left out, sizes are read off the
    weights and heads are the published models'. Raises ConfigError if they do not fit.
    """
    try:
        state = state_of(source)
        shape = _published_shape(state) | dict(config or {})
        vit = build_encoder(
            "vit_base_patch16_224",
            img_size=shape["img_size"],
            args={
                "patch_size": shape["patch_size"],
                "embed_dim": shape["embed_dim"],
                "depth": shape["depth"],
                "num_heads": shape["num_heads"],
                "mlp_ratio": shape["mlp_ratio"],
                "norm_eps": shape["norm_eps"],
            },
        )
        decoder = Decoder(
            "prompt",
            encoder_width=shape["embed_dim"],
            grid=shape["img_size"] // shape["patch_size"],
            target_width=shape["target_dim"],
            embed_dim=shape["decoder_embed_dim"],
            depth=shape["decoder_depth"],
            num_heads=shape["decoder_num_heads"],
            mlp_ratio=shape["decoder_mlp_ratio"],
        )
        for module in decoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = shape["norm_eps"]
        student = Student(vit, decoder)
        student.load_state_dict({our_name(k): v for k, v in state.items()}, strict=True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = "it has no " if isinstance(error, KeyError) else ""
        first = missing + str(error).strip().splitlines()[-1].strip()[:200]
        raise ConfigError(
            f"the checkpoint is not in MILAN's published layout: {first}",
            expected="patch_embed.proj, blocks.i…, decoder_blocks.j.attn.q/kv, …",
        ) from None
    return student.eval()


def state_of(source: str | Path | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name, or those given. Raises ConfigError, ValueError."""
    if isinstance(source, str | Path):
        return read_checkpoint(source).state
    return {name: torch.as_tensor(value) for name, value in unwrapped(dict(source)).items()}


def _published_shape(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Sizes read off the weights; heads are not in them and taken from the published models."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    decoder_width = state["decoder_embed.weight"].shape[0]
    return {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "num_heads": HEADS.get(width, max(1, width // 64)),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "norm_eps": 1e-6,
        "decoder_embed_dim": decoder_width,
        "decoder_depth": 1
        + max(int(k.split(".")[1]) for k in state if k.startswith("decoder_blocks.")),
        "decoder_num_heads": PUBLISHED["num_heads"],
        "decoder_mlp_ratio": state["decoder_blocks.0.mlp.fc1.weight"].shape[0] / decoder_width,
        "target_dim": state["decoder_pred.weight"].shape[0],
    }
