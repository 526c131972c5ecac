"""Initial weights of a run (`--init`): another run's encoder, a model of timm, others' checkpoint.

RUN                  encoder.safetensors of a run's folder, or the file itself
timm:NAME            pretrained weights of timm
FILE or FOLDER       a checkpoint of others (milan.models.layouts); its decoder too, where it fits
published[:FILE]     the same, where MILAN's authors' one is placed if no file is given

A student of RILS takes decoder, text tower, projection and scale too, where they fit: of a run of
rils, and of a checkpoint in RILS's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import adapt_input_conv

from milan.config import PretrainConfig
from milan.core.device import MEAN, STD
from milan.core.progress import Progress
from milan.core.size import as_size
from milan.errors import ConfigError
from milan.images.channels import RGB, Channels
from milan.models.checkpoint_file import read_checkpoint
from milan.models.export import is_ours
from milan.models.foreign import Weights
from milan.models.layouts import State
from milan.models.rils import RilsStudent, load_rils
from milan.models.state_dict import misfit
from milan.models.student import Student
from milan.models.weights import find_weights, resampled
from milan.objectives.rils import WEIGHTS as RILS_WEIGHTS


def initialise_from(
    config: PretrainConfig, student: Student, progress: Progress, law: Channels | None = None
) -> dict[str, Any]:
    """Give a student, which lies on the CPU, the weights that `config.init` names, if it does.

    `law`: the channels that it sees, measured; None: RGB.

    Returns what run.json keeps of them. Raises ConfigError for weights that do not fit the
    student, with the first that does not, and for those that are not there.
    """
    if config.init is None:
        return {}
    size = as_size(student.encoder.patch_embed.img_size)
    whole = _rils_file(config.init) if isinstance(student, RilsStudent) else None
    if whole:
        weights, joint = _of_rils(whole)
    else:
        weights = find_weights(config.init, flag="--init", model=config.model, size=size)
        joint = None
    note = _adapt_channels(weights, student.encoder, config, law)
    state = _fitting(weights, student.encoder, config)
    note += _fold_normalisation(state, weights, law)
    mine = student.encoder.blocks[0].norm1.eps
    if (theirs := weights.args.get("norm_eps", mine)) != mine:
        note += f", its norms with eps {mine:g} in place of {theirs:g}"
    student.encoder.load_state_dict(state, strict=True)
    decoder = "drawn by the seed"
    if weights.decoder is not None:
        theirs = {name: tensor.shape for name, tensor in weights.decoder.items()}
        if theirs == {name: tensor.shape for name, tensor in student.decoder.state_dict().items()}:
            student.decoder.load_state_dict(weights.decoder)
            decoder = "the published one"
        else:
            decoder += ": the published one has another shape"
    kept = {"encoder": config.init, "decoder": decoder}
    if isinstance(student, RilsStudent):
        kept["text tower"] = _joint_parts(config, student, joint)
    others = "; ".join(f"{part} {of}" for part, of in kept.items() if part != "encoder")
    progress.note(f"initial weights: encoder of {config.init}{note}; {others}")
    if weights.said:
        progress.note(f"{config.init} was read {weights.said}")
    return {"initial": kept}


def _rils_file(init: str) -> Path | None:
    """The file of a whole RILS student that `init` names, if it does."""
    path = Path(init.removeprefix("published:"))
    if (path / RILS_WEIGHTS).is_file():
        return path / RILS_WEIGHTS
    if not path.is_file() or is_ours(path):
        return None
    names = read_checkpoint(path).state.keys()
    return path if "text_projection" in names and "image_projection" in names else None


def _of_rils(file: Path) -> tuple[Weights, State]:
    """(encoder and decoder, all other weights) of a RILS student. Raises ConfigError."""
    student = load_rils(file)
    vit, whole = student.encoder, student.state_dict()
    args = {
        "patch_size": vit.patch_embed.patch_size[0], "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks), "num_heads": vit.blocks[0].attn.num_heads,
    }  # fmt: skip
    heads = args["num_heads"] if student.tokenizer else None  # else nobody said it
    weights = Weights(
        vit.state_dict(), "vit_base_patch16_224", vit.patch_embed.img_size[0], args,
        decoder=student.decoder.state_dict(), heads=heads,
    )  # fmt: skip
    joint = {n: w for n, w in whole.items() if not n.startswith(("encoder.", "decoder."))}
    return weights, joint


def _joint_parts(config: PretrainConfig, student: RilsStudent, joint: State | None) -> str:
    """Give a student text tower, projection and scale, where all fit; says what was done."""
    if config.text_tower:
        return f"of --text-tower {config.text_tower}"
    if joint is None:
        return "drawn by the seed"
    ours = student.state_dict()
    if any(name not in ours or ours[name].shape != value.shape for name, value in joint.items()):
        return "drawn by the seed: the one there has another shape"
    student.load_state_dict(joint, strict=False)
    return "and projections taken too"


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


def _fitting(weights: Weights, encoder: Any, config: PretrainConfig) -> State:
    """The weights as the encoder takes them. Raises ConfigError for the first that does not fit."""
    state = resampled(weights.encoder, encoder, weights.size)
    if odd := misfit(state, encoder):
        raise ConfigError(
            f"the weights of {config.init} do not fit {config.model}: {odd}",
            expected="an encoder of the same shape",
            fix=f"--model {weights.flags}",
        )
    mine = encoder.blocks[0].attn.num_heads
    if weights.heads and weights.heads != mine:
        raise ConfigError(
            f"the weights of {config.init} are of {weights.heads} heads, {config.model} has {mine}",
            expected="the same number: the shapes fit, the results would be others",
            fix=f"--set model.num_heads={weights.heads}",
        )
    return {name: tensor.clone() for name, tensor in state.items()}


def _adapt_channels(
    weights: Weights, encoder: Any, config: PretrainConfig, law: Channels | None
) -> str:
    """Let weights of RGB see other channels, by timm's rule; says what it did.

    The kernels of red, green and blue are repeated, and scaled by 3 / C; of one channel they are
    added up (timm.models.adapt_input_conv). Weights of other channels fit the same ones only.
    Raises ConfigError.
    """
    seen = None if weights.channels is None else weights.channels["spelled"]
    wanted = None if law is None else law.spelled
    if seen in (None, RGB):
        if law is None:
            return ""
        name, count = "patch_embed.proj.weight", encoder.patch_embed.proj.in_channels
        fold = _folded(weights.encoder, MEAN, STD, weights.mean, weights.std)
        weights.encoder.update(fold)
        weights.encoder[name] = adapt_input_conv(count, weights.encoder[name])
        return f", its RGB kernels made ones of {count} channels by timm's rule"
    if seen != wanted:
        raise ConfigError(
            f"the weights of {config.init} see channels {seen}, the student "
            + (f"sees {wanted}" if wanted else "RGB"),
            expected="the same channels, or weights of RGB",
            fix=f"--student-channels {seen}",
        )
    return ""


def _fold_normalisation(state: State, weights: Weights, law: Channels | None) -> str:
    """Let the patch embedding expect the student's normalisation; says what it did."""
    if law is not None and weights.channels is None:
        return ""  # channels that the weights never saw have none
    mine = (MEAN, STD) if law is None else (law.mean, law.std)
    theirs = tuple(weights.mean), tuple(weights.std)
    if all(np.allclose(a, b) for a, b in zip(mine, theirs, strict=True)):
        return ""
    changed = _folded(state, *mine, *theirs)
    state.update(changed)
    if "patch_embed.proj.bias" not in changed:
        return ", its normalisation folded in, but for the mean (its patches have no bias)"
    return ", its normalisation folded in"


def _folded(
    state: State, mean: Sequence[float], std: Sequence[float], their_mean: Sequence[float],
    their_std: Sequence[float],
) -> State:  # fmt: skip
    """The patch embedding for pixels of another normalisation, its bias where it has one.

    (p - m') / s' = (x s + m - m') / s' for x = (p - m) / s: the factor goes into the weights, the
    rest into the bias.
    """
    name = "patch_embed.proj.weight"
    (m, s), (n, t) = (
        [torch.tensor(v) for v in pair] for pair in ((mean, std), (their_mean, their_std))
    )
    factor, shift = s / t, (m - n) / t
    weight, bias = state[name], state.get("patch_embed.proj.bias")
    folded = {name: weight * factor.view(1, -1, 1, 1)}
    if bias is not None:
        added = (weight * shift.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
        folded["patch_embed.proj.bias"] = bias + added
    return folded
