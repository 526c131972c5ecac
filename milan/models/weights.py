"""Weights of an encoder by name: a run's, timm's, or those of a checkpoint of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed

from milan.core.size import Size, as_size, grid_of
from milan.errors import ConfigError, nearest
from milan.models.checkpoint_file import CLIP_CONFIG
from milan.models.encoder import create_vit, pretrained_vit, sincos_positions
from milan.models.export import CHANNELS, ENCODER, encoder_weights, is_ours, read_about
from milan.models.foreign import Weights, read_foreign
from milan.models.layouts import State

POSITIONS = "pos_embed"
FOLDER = ("config.json", "model.safetensors", "pytorch_model.bin", CLIP_CONFIG)
"""What a folder of timm, transformers or open_clip has."""


def find_weights(name: str, *, flag: str, model: str, size: Size | None = None) -> Weights:
    """The weights that `name` names: a run's folder, timm:NAME, or published[:FILE].

    `flag` takes the name on the command line. `size`: of the images that they are to see, for
    timm, which resamples positions; default: that of its own. `model`: whose published weights are
    looked for, if no file is given. A path may be a run's or a checkpoint of others. Raises
    ConfigError for weights that are not there or cannot be read whole, CacheError for a run without
    an encoder.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return _of_timm(rest, size)
    if kind == "published":
        file = Path(rest) if rest else published_file(model)
        if not file.exists():
            raise ConfigError(
                f"the published weights are not at {file}",
                expected="a checkpoint that the authors of MILAN link (github.com/zejiangh/MILAN)",
                fix=f"{flag} published:FILE, or place it there",
            )
        return read_foreign(file)
    if not Path(name).exists():
        raise ConfigError(
            f"no run at {name}",
            expected=f"for {flag} a run's folder, a checkpoint, timm:NAME, or published[:FILE]",
            fix=nearest(name, ["published", f"timm:{model}"]),
        )
    if is_foreign(name):
        return read_foreign(name)
    about = read_about(name)
    model, edge, args = about["model"], about["input_size"], about["model_args"]
    with torch.device("meta"):  # nothing is drawn
        vit = create_vit(model, img_size=edge, args=args, any_channels=True)
    return Weights(
        encoder_weights(name), model, edge, args, mean=about["mean"], std=about["std"],
        heads=vit.blocks[0].attn.num_heads, channels=about.get(CHANNELS),
    )  # fmt: skip


def is_foreign(name: str) -> bool:
    """Whether a name is that of a checkpoint of others, not of a run or of timm."""
    if name.partition(":")[0] == "published":
        return True
    path = Path(name)
    if path.is_dir():
        return not (path / ENCODER).exists() and any((path / file).is_file() for file in FOLDER)
    return path.is_file() and not is_ours(path)


def _of_timm(name: str, size: Size | None) -> Weights:
    model = name.split(".")[0]
    args = {} if size is None else {"img_size": size}
    if size is not None:
        create_vit(model, img_size=size)  # says what a ViT must be
    vit = pretrained_vit(name, **args)
    data = timm.data.resolve_model_data_config(vit)
    trained = size or as_size(data["input_size"][1:])
    heads = vit.blocks[0].attn.num_heads
    return Weights(
        vit.state_dict(), model, trained, mean=data["mean"], std=data["std"], heads=heads
    )


def published_file(model: str) -> Path:
    """Where the published weights of a model are looked for: beside those that torch fetches."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"milan-{model}.pth"


def resampled(state: State, vit: Any, size: Size) -> State:
    """The weights with position embeddings [1, prefix + N, E] for the grid of a ViT, square or not.

    `size` is that of the images that they are for. Sine-cosine ones are those of any grid; learned
    ones are resampled as timm does.
    """
    theirs, ours = state.get(POSITIONS), vit.pos_embed
    if theirs is None or ours is None or theirs.shape[-1] != ours.shape[-1]:
        return state
    grid = vit.patch_embed.grid_size
    prefix = ours.shape[1] - grid[0] * grid[1]
    old = grid_of(theirs.shape[1] - prefix, size)
    if old[0] * old[1] + prefix != theirs.shape[1] or old == grid:
        return state
    table = sincos_positions(theirs.shape[-1], old)[:, 1:]
    if torch.allclose(theirs[:, prefix:], table, atol=1e-5):
        patches = sincos_positions(theirs.shape[-1], grid)[:, 1:]
        return state | {POSITIONS: torch.cat([theirs[:, :prefix], patches], dim=1)}
    new = resample_abs_pos_embed(theirs, list(grid), old_size=list(old), num_prefix_tokens=prefix)
    return state | {POSITIONS: new}
