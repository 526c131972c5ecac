"""Initial weights of a run (`--init`): another run's encoder, a model of timm, the published ones.

RUN                  encoder.safetensors of a run's folder, or the file itself
timm:NAME            pretrained weights of timm
published[:FILE]     a checkpoint of MILAN's authors; its decoder too, where it fits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed

from milan.config import PretrainConfig
from milan.core.device import MEAN, STD
from milan.core.progress import Progress
from milan.errors import ConfigError, nearest
from milan.models.encoder import create_vit, pretrained_vit, sincos_positions
from milan.models.export import encoder_weights, read_about
from milan.models.published import load_published
from milan.models.student import Student

State = dict[str, torch.Tensor]
_POSITIONS = "pos_embed"


@dataclass(frozen=True)
class _Weights:
    """What is there to start from."""

    encoder: State
    model: str
    """The model that has such weights, as --model takes it, and its arguments as --set does."""
    decoder: State | None = None
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD


def initialise_from(config: PretrainConfig, student: Student, progress: Progress) -> dict[str, Any]:
    """Give a student, which lies on the CPU, the weights that `config.init` names, if it does.

    Returns what run.json keeps of them. Raises ConfigError for weights that do not fit the
    student, with the first that does not, and for those that are not there.
    """
    if config.init is None:
        return {}
    found = _find(config.init, student, config.model)
    state = _fitting(found, student.encoder, config)
    note = _fold_normalisation(state, found)
    student.encoder.load_state_dict(state, strict=True)
    decoder = "drawn by the seed"
    if found.decoder is not None:
        theirs = {name: tensor.shape for name, tensor in found.decoder.items()}
        if theirs == {name: tensor.shape for name, tensor in student.decoder.state_dict().items()}:
            student.decoder.load_state_dict(found.decoder)
            decoder = "the published one"
        else:
            decoder += ": the published one has another shape"
    progress.note(f"initial weights: encoder of {config.init}{note}; decoder {decoder}")
    return {"initial": {"encoder": config.init, "decoder": decoder}}


def check_absolute(init: str | None) -> None:
    """Raises ConfigError for weights at a path that is another one on another machine."""
    kind, _, rest = (init or "timm").partition(":")
    path = {"timm": "", "published": rest}.get(kind, init or "")
    if path and not Path(path).is_absolute():
        raise ConfigError(
            f"init {init} for ranks on several machines",
            expected="an absolute path, on a disk that they share",
            fix=f"--init {(init or '').removesuffix(path)}{Path(path).absolute()}",
        )


def _find(init: str, student: Student, model: str) -> _Weights:
    kind, _, rest = init.partition(":")
    if kind == "timm":
        size = student.encoder.patch_embed.img_size[0]
        create_vit(rest.split(".")[0], img_size=size)  # says what a ViT must be
        vit = pretrained_vit(rest, img_size=size)
        data = timm.data.resolve_model_data_config(vit)
        return _Weights(vit.state_dict(), rest.split(".")[0], mean=data["mean"], std=data["std"])
    if kind == "published":
        file = Path(rest) if rest else published_file(model)
        if not file.is_file():
            raise ConfigError(
                f"the published weights are not at {file}",
                expected="a checkpoint that the authors of MILAN link (github.com/zejiangh/MILAN)",
                fix="--init published:FILE, or place it there",
            )
        whole = load_published(file)
        return _Weights(whole.encoder.state_dict(), model, decoder=whole.decoder.state_dict())
    if not Path(init).exists():
        raise ConfigError(
            f"no run at {init}, whose encoder is to be started from",
            expected="the folder of a run, timm:NAME, or published[:FILE]",
            fix=nearest(init, ["published", f"timm:{model}"]),
        )
    about = read_about(init)
    args = "".join(f" --set model.{name}={value}" for name, value in about["model_args"].items())
    return _Weights(
        encoder_weights(init), about["model"] + args, mean=about["mean"], std=about["std"]
    )


def published_file(model: str) -> Path:
    """Where the published weights of a model are looked for: beside those that torch fetches."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"milan-{model}.pth"


def _fitting(found: _Weights, encoder: Any, config: PretrainConfig) -> State:
    """The weights as the encoder takes them. Raises ConfigError for the first that does not fit."""
    there, state = encoder.state_dict(), dict(found.encoder)
    if _POSITIONS in state:
        state[_POSITIONS] = _positions(state[_POSITIONS], encoder)
    odd = ""
    for name in sorted(there.keys() | state.keys()):
        if name not in state:
            odd = f"{name} is not in it"
        elif name not in there:
            odd = f"{name} is in it, and not in the student's encoder"
        elif state[name].shape != there[name].shape:
            theirs, ours = (" x ".join(map(str, t[name].shape)) for t in (state, there))
            odd = f"{name} is {theirs} in it, and {ours} in the student's encoder"
        if odd:
            raise ConfigError(
                f"the weights of {config.init} do not fit {config.model}: {odd}",
                expected="an encoder of the same shape",
                fix=f"--model {found.model}",
            )
    return {name: tensor.clone() for name, tensor in state.items()}


def _positions(theirs: torch.Tensor, encoder: Any) -> torch.Tensor:
    """Position embeddings [1, prefix + N, E] for the encoder's grid.

    Sine-cosine ones are those of any grid; learned ones are resampled.
    """
    ours, grid = encoder.pos_embed, encoder.patch_embed.grid_size[0]
    if theirs.shape == ours.shape or theirs.shape[-1] != ours.shape[-1]:
        return theirs
    prefix = ours.shape[1] - grid**2
    old = round((theirs.shape[1] - prefix) ** 0.5)
    if old**2 + prefix != theirs.shape[1]:
        return theirs
    table = sincos_positions(theirs.shape[-1], old)[:, 1:]
    if torch.allclose(theirs[:, prefix:], table, atol=1e-5):
        return ours.detach()
    return resample_abs_pos_embed(
        theirs, [grid, grid], old_size=[old, old], num_prefix_tokens=prefix
    )


def _fold_normalisation(state: State, found: _Weights) -> str:
    """Let the patch embedding expect pixels of the student's normalisation; says what it did.

    (p - m') / s' = (x s + m - m') / s' for x = (p - m) / s: the factor goes into the weights, the
    rest into the bias.
    """
    mine, theirs = (torch.tensor(v) for v in ((MEAN, STD), (tuple(found.mean), tuple(found.std))))
    if torch.allclose(mine, theirs):
        return ""
    name = "patch_embed.proj.weight"
    factor, shift = mine[1] / theirs[1], (mine[0] - theirs[0]) / theirs[1]
    weight, bias = state[name], state.get("patch_embed.proj.bias")
    state[name] = weight * factor.view(1, 3, 1, 1)
    if bias is None:
        return ", its normalisation folded in, but for the mean (its patches have no bias)"
    state["patch_embed.proj.bias"] = bias + (weight * shift.view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    return ", its normalisation folded in"
