"""An encoder in a checkpoint of others: which ViT of timm has such weights, read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from milan.core.device import MEAN, STD
from milan.core.size import Size, as_size, grid_of, height_width, size_in_words
from milan.errors import ConfigError
from milan.models.checkpoint_file import CheckpointFile, read_checkpoint
from milan.models.encoder import create_vit
from milan.models.layouts import CLIP, HALVES, OPENAI_KEYS, Layout, State, layout_of, split_up
from milan.models.state_dict import listed, misfit

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Encoder width -> heads, of published models (MAE, models_mae.py; MILAN, models_milan.py; RILS,
models_rils.py)."""
_KNOWN = {
    (192, 12, 16): "vit_tiny_patch16_224", (384, 12, 16): "vit_small_patch16_224",
    (768, 12, 16): "vit_base_patch16_224", (768, 12, 32): "vit_base_patch32_224",
    (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 14): "vit_huge_patch14_224",
}  # fmt: skip
"""(width, depth, patch) -> the ViT of timm."""
_HEAD = ("head.",)
_NORMALISATIONS = {
    "ImageNet's": (MEAN, STD), HALVES: ((0.5,) * 3, (0.5,) * 3),
    "CLIP's": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}  # fmt: skip
_CLIP_VIT = "vit_base_patch16_clip_224"  # CLIP's blocks: norms of eps 1e-5, patches without bias


@dataclass(frozen=True)
class Weights:
    """An encoder's weights, and what they are the weights of."""

    encoder: State
    model: str
    """The ViT of timm that has such weights."""
    size: Size
    """Of the images that it was trained on, in pixels."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the ViT."""
    decoder: State | None = None
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    heads: int | None = None
    """Of attention, where known: no shape tells them."""
    said: str = ""
    """How a checkpoint of others was read, in a line."""
    channels: dict[str, Any] | None = None
    """What it sees in place of a picture's RGB, as its file says; mean and std are then theirs, in
    the unit of samples."""

    @property
    def flags(self) -> str:
        """The model and its arguments, as --model and --set take them."""
        sets = (f" --set model.{name}={value}" for name, value in self.args.items())
        return self.model + "".join(sets)


def read_foreign(path: str | Path) -> Weights:
    """The encoder in a checkpoint of others, in any of milan.models.layouts, and its decoder.

    Sizes are read off the weights; a folder's config.json states heads and normalisation. Raises
    ConfigError for a file that is no checkpoint, an unknown layout, and for weights that are not
    those of a plain ViT, all of them: it lists what lacks and what is too much.
    """
    file = read_checkpoint(path)
    layout = layout_of(file.state.keys(), path)
    encoder, decoder, left = split_up(file.state, layout, path)
    left += [name for name in encoder if name.startswith(_HEAD)]
    encoder = {name: tensor for name, tensor in encoder.items() if not name.startswith(_HEAD)}
    model, args, size, heads = _shape(encoder, file, path)
    if layout.title == CLIP:
        args |= _clip_arguments(file, path)
    with torch.device("meta"):  # nothing is drawn
        vit = create_vit(model, img_size=size, args=args)
    if odd := misfit(encoder, vit):
        raise ConfigError(
            f"{path}, in {layout.title} layout, is no whole ViT: {odd}",
            expected=f"every weight of {model}, and no other",
        )
    eps = file.config.get("layer_norm_eps", layout.norm_eps)
    if eps and eps != vit.blocks[0].norm1.eps:
        args["norm_eps"] = float(eps)
    mean, std, assumed = _normalisation(file, layout)
    said = [f"in {layout.title} layout ({layout.seen})"]
    if heads is None:
        said.append(f"heads are not in it: {vit.blocks[0].attn.num_heads} assumed")
    if eps and "layer_norm_eps" not in file.config:
        said.append(f"eps of the norms is not in it: {eps:g} assumed")
    if assumed:
        said.append(f"normalisation is not in it: {assumed} assumed")
    if layout.title == CLIP:
        stated = args.get("act_layer") or ("gelu" if _clip_config(file) else "gelu assumed")
        said.append(f"activation {stated}")
    if left:
        said.append(f"left out: {listed(left)}")
    if file.others:
        said.append(f"also in the file: {listed(file.others, 8)}")
    return Weights(
        encoder, model, size, args, decoder or None, mean, std,
        vit.blocks[0].attn.num_heads if heads else None, "; ".join(said),
    )  # fmt: skip


def _shape(
    state: State, file: CheckpointFile, path: str | Path
) -> tuple[str, dict[str, Any], Size, int | None]:
    """(ViT of timm, its arguments, size of its images, heads if they are known)."""
    try:
        width, channels, patch, patch_wide = state["patch_embed.proj.weight"].shape
        positions = state["pos_embed"].shape[1]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{path} is no plain ViT with absolute positions: {lacks}",
            expected="patch_embed.proj [E, 3, P, P], pos_embed [1, N + 1, E], blocks.i.mlp.fc1",
        ) from None
    if (channels, patch) != (3, patch_wide):
        raise ConfigError(
            f"{path} has patches of {channels} x {patch} x {patch_wide}", expected="3 x P x P"
        )
    token, registers = "cls_token" in state, state.get("reg_token", torch.empty(1, 0)).shape[1]
    tried, shape = (token + registers, int(token), 0), _stated_size(file)
    prefix = next((p for p in tried if _tiled(positions - p, shape)), -1)
    if prefix < 0:
        raise ConfigError(
            f"{path} has {positions} positions",
            expected=f"those of a grid of patches of {size_in_words(shape)}"
            if shape
            else "those of a square grid of patches",
        )
    rows, columns = grid_of(positions - prefix, shape or 1)
    size = as_size((rows * patch, columns * patch))
    if "architecture" in file.config:  # timm says it all
        model = str(file.config["architecture"]).partition(".")[0]
        args = dict(file.config.get("model_args") or {})
        args.pop("img_size", None)
        return model, {k: v for k, v in args.items() if k != "num_classes"}, size, -1
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    stated = _stated_heads(file, path)
    heads = stated or HEADS.get(width) or max(1, width // 64)
    args = {}
    if "norm_pre.weight" in state and "patch_embed.proj.bias" not in state:
        args = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        model = _CLIP_VIT
    elif (model := _KNOWN.get((width, depth, patch), "")) == "" or heads != HEADS.get(width):
        args = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        model = "vit_base_patch16_224"
    if hidden != 4 * width:
        args["mlp_ratio"] = hidden / width
    if "blocks.0.attn.qkv.bias" not in state:
        args["qkv_bias"] = False
    if "blocks.0.ls1.gamma" in state:
        args["init_values"] = 1e-5  # of no effect: the weights replace it
    if "blocks.0.attn.q_norm.weight" in state:
        args["qk_norm"] = True
    if "norm_pre.weight" in state:
        args["pre_norm"] = True
    if registers:
        args["reg_tokens"] = registers
    if prefix < token + registers:
        args["no_embed_class"] = True
    averages = "fc_norm.weight" in state and "norm.weight" not in state
    if averages or not token:
        args["global_pool"] = "avg"
    if not token:
        args |= {"class_token": False, "fc_norm": averages}
    return model, args, size, stated or (heads if width in HEADS else None)


def _stated_size(file: CheckpointFile) -> Size | None:
    """The size of images that config.json of timm or of transformers states, if it does."""
    of_timm = (file.config.get("pretrained_cfg") or {}).get("input_size") or []
    stated: Any = of_timm[1:] or file.config.get("image_size")
    edges = list(stated) if isinstance(stated, list) else [stated, stated]
    return as_size(edges) if [type(edge) for edge in edges] == [int, int] else None


def _tiled(patches: int, shape: Size | None) -> bool:
    """Whether so many patches tile images of this shape; None: squares."""
    rows, columns = grid_of(max(patches, 0), shape or 1)
    height, width = height_width(shape or 1)
    return 0 < patches == rows * columns and rows * width == columns * height


def _stated_heads(file: CheckpointFile, path: str | Path) -> int | None:
    """The heads that config.json of transformers or open_clip states. Raises ConfigError for what
    timm's ViT does otherwise."""
    if tower := _clip_config(file):
        return int(tower["width"] // tower.get("head_width", 64)) if "width" in tower else None
    if "num_attention_heads" not in file.config:
        return None
    if (activation := file.config.get("hidden_act", "gelu")) != "gelu":
        raise ConfigError(f"{path} has activation {activation}", expected="gelu, as timm's ViTs")
    return int(file.config["num_attention_heads"])


def _clip_config(file: CheckpointFile) -> dict[str, Any] | None:
    """What open_clip's config says of its image tower."""
    config = file.config.get("model_cfg", file.config)
    return config.get("vision_cfg")


def _clip_arguments(file: CheckpointFile, path: str | Path) -> dict[str, Any]:
    """QuickGELU, where a CLIP has it. Raises ConfigError for what its weights do not show, and
    timm's ViT does otherwise."""
    tower, config = _clip_config(file) or {}, file.config.get("model_cfg", file.config)
    odd = [key for key in ("act_kwargs", "norm_kwargs") if tower.get(key)]
    if odd or tower.get("pool_type", "tok") != "tok":
        raise ConfigError(
            f"{path} is a CLIP with {', '.join(odd) or 'pool_type ' + tower['pool_type']}",
            expected="norms, activation and class token as OpenAI's CLIPs have them",
        )
    quick = config.get("quick_gelu") or any(key in file.state for key in OPENAI_KEYS)
    return {"act_layer": "quick_gelu"} if quick else {}


def _normalisation(
    file: CheckpointFile, layout: Layout
) -> tuple[Sequence[float], Sequence[float], str]:
    """(mean, deviation, in words what was assumed because the file says nothing)."""
    stated = file.config.get("pretrained_cfg") or file.config.get("preprocess_cfg") or {}
    for mean, std in (
        (stated.get("mean"), stated.get("std")),
        (file.processor.get("image_mean"), file.processor.get("image_std")),
    ):
        if mean and std:
            return tuple(mean), tuple(std), ""
    return *_NORMALISATIONS[layout.normalisation], layout.normalisation
