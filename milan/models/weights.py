"""Weights of an encoder that others left: a run's, timm's, or the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed

from milan.core.device import MEAN, STD
from milan.errors import ConfigError, nearest
from milan.models.encoder import create_vit, pretrained_vit, sincos_positions
from milan.models.export import encoder_weights, read_about
from milan.models.published import load_published

State = dict[str, torch.Tensor]
POSITIONS = "pos_embed"


@dataclass(frozen=True)
class Weights:
    """An encoder's weights, and what they are the weights of."""

    encoder: State
    model: str
    """The ViT of timm that has such weights."""
    size: int
    """Edge of the images that it was trained on, in pixels."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the ViT."""
    decoder: State | None = None
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    @property
    def flags(self) -> str:
        """The model and its arguments, as --model and --set take them."""
        sets = (f" --set model.{name}={value}" for name, value in self.args.items())
        return self.model + "".join(sets)


def find_weights(name: str, *, flag: str, model: str, size: int | None = None) -> Weights:
    """The weights that `name` names: a run's folder, timm:NAME, or published[:FILE].

    `flag` takes the name on the command line. `size`: of the images that they are to see, for
    timm, which resamples positions; default: that of its own. `model`: whose published weights are
    looked for, if no file is given. Raises ConfigError for those that are not there, CacheError for
    a run without an encoder.
    """
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return _of_timm(rest, size)
    if kind == "published":
        file = Path(rest) if rest else published_file(model)
        if not file.is_file():
            raise ConfigError(
                f"the published weights are not at {file}",
                expected="a checkpoint that the authors of MILAN link (github.com/zejiangh/MILAN)",
                fix=f"{flag} published:FILE, or place it there",
            )
        whole = load_published(file)
        state, trained = whole.encoder.state_dict(), whole.encoder.patch_embed.img_size[0]
        return Weights(state, model, trained, decoder=whole.decoder.state_dict())
    if not Path(name).exists():
        raise ConfigError(
            f"no run at {name}",
            expected=f"for {flag} the folder of a run, timm:NAME, or published[:FILE]",
            fix=nearest(name, ["published", f"timm:{model}"]),
        )
    about = read_about(name)
    return Weights(
        encoder_weights(name), about["model"], about["input_size"], about["model_args"],
        mean=about["mean"], std=about["std"],
    )  # fmt: skip


def _of_timm(name: str, size: int | None) -> Weights:
    model = name.split(".")[0]
    args = {} if size is None else {"img_size": size}
    if size is not None:
        create_vit(model, img_size=size)  # says what a ViT must be
    vit = pretrained_vit(name, **args)
    data = timm.data.resolve_model_data_config(vit)
    trained = size or data["input_size"][1]
    return Weights(vit.state_dict(), model, trained, mean=data["mean"], std=data["std"])


def published_file(model: str) -> Path:
    """Where the published weights of a model are looked for: beside those that torch fetches."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"milan-{model}.pth"


def misfit(state: State, vit: Any, *, leave: Sequence[str] = ()) -> str:
    """The first weight of `state` that does not fit a ViT, in words; empty if all do.

    Weights whose name begins with one of `leave` may lack, or be there for nothing.
    """
    there = vit.state_dict()
    for name in sorted(there.keys() | state.keys()):
        if name.startswith(tuple(leave)):
            continue
        if name not in state:
            return f"{name} is not in it"
        if name not in there:
            return f"{name} is in it, and not in the model"
        if state[name].shape != there[name].shape:
            theirs, ours = (" x ".join(map(str, t[name].shape)) for t in (state, there))
            return f"{name} is {theirs} in it, and {ours} in the model"
    return ""


def resampled(state: State, vit: Any) -> State:
    """The weights with position embeddings [1, prefix + N, E] for the grid of a ViT, square or not.

    They come from a square grid. Sine-cosine ones are those of any grid; learned ones are resampled
    as timm does.
    """
    theirs, ours = state.get(POSITIONS), vit.pos_embed
    if theirs is None or ours is None or theirs.shape[-1] != ours.shape[-1]:
        return state
    grid = vit.patch_embed.grid_size
    prefix = ours.shape[1] - grid[0] * grid[1]
    old = round((theirs.shape[1] - prefix) ** 0.5)
    if old**2 + prefix != theirs.shape[1] or (old, old) == grid:
        return state
    table = sincos_positions(theirs.shape[-1], old)[:, 1:]
    if torch.allclose(theirs[:, prefix:], table, atol=1e-5):
        patches = sincos_positions(theirs.shape[-1], grid)[:, 1:]
        return state | {POSITIONS: torch.cat([theirs[:, :prefix], patches], dim=1)}
    new = resample_abs_pos_embed(theirs, list(grid), old_size=[old, old], num_prefix_tokens=prefix)
    return state | {POSITIONS: new}
