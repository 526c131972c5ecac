"""Checkpoints: written whole or not at all, and the encoder in the form others use.

    runs/pretrain/checkpoints/step-00000120/
        model.safetensors      every parameter of the student
        optimiser.safetensors  AdamW's moments, by parameter name
        state.json             step, gradient scaler, sums of the log, digests of the others
    runs/pretrain/encoder.safetensors   the encoder as timm loads it, with mean, std, input size

No pickles: nothing here can run code when it is loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise
from torch import nn

from milan.core.atomic import sync_folder, write_json
from milan.core.distributed import SINGLE, Ranks, full_tensor, shard_like
from milan.errors import CacheError, ConfigError, TrainError
from milan.models.student import DECODER, Decoder, Student, build_encoder

ENCODER = "encoder.safetensors"
FOLDER = "checkpoints"
_PROVEN = ("model.safetensors", "optimiser.safetensors")


def save(
    run: Path,
    *,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    ranks: Ranks,
) -> Path:
    """Write the checkpoint of `step`, then drop all but the newest `keep`. Returns its folder.

    Every rank calls it; rank 0 writes. Raises TrainError if there is no room for it: those before
    stay as they are.
    """
    weights = whole_weights(model, ranks)
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    moments = {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, kept in optimiser.state.items()
        for key, value in kept.items()
    }
    moments = _gathered(moments, ranks)
    return ranks.on_rank0(lambda: _write(run, step, weights, moments, state, keep))


def whole_weights(model: nn.Module, ranks: Ranks = SINGLE) -> dict[str, torch.Tensor]:
    """The state of a model on the CPU of rank 0; all must ask, others get nothing."""
    return _gathered(model.state_dict(), ranks)


def _gathered(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if ranks.is_rank0:
            found[name] = full.cpu().contiguous()
    return found


def _write(
    run: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    folder = run / FOLDER / f"step-{step:08d}"
    fresh = folder.with_name(f".{folder.name}.tmp")
    try:
        for left in (run / FOLDER).glob(".step-*.tmp"):  # of a run that was killed
            shutil.rmtree(left)
        fresh.mkdir(parents=True)
        save_file(weights, fresh / "model.safetensors")
        save_file(moments, fresh / "optimiser.safetensors")
        digests = {}
        for name in _PROVEN:
            with open(fresh / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        write_json(fresh / "state.json", {"step": step} | state | {"sha256": digests})
        sync_folder(fresh)
        # One of this step is there only if it was found torn.
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        saved = steps(run)
        raise TrainError(
            f"the checkpoint of step {step} cannot be written: {error}",
            expected="room for it; " + (f"that of step {saved[-1]} stays" if saved else ""),
            fix="free some space, and the same line goes on",
        ) from None
    found = steps(run)
    # Newer ones were found torn, or the run would not be at this step.
    torn = [old for old in found if old > step]
    for old in torn + [old for old in found if old <= step][:-keep]:
        shutil.rmtree(run / FOLDER / f"step-{old:08d}", ignore_errors=True)
    return folder


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folder = run / FOLDER
    if not folder.exists():
        return []
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def newest(run: Path, *, note: Callable[[str], None]) -> int | None:
    """The newest step whose checkpoint is whole, None if there is no checkpoint.

    Torn ones are told to `note` and passed over. Raises TrainError if there is none but these.
    """
    found = steps(run)
    for step in reversed(found):
        folder = run / FOLDER / f"step-{step:08d}"
        try:
            digests = json.loads((folder / "state.json").read_text())["sha256"]
            for name in _PROVEN:
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digests[name]:
                        raise ValueError(f"{name} is not what was written")
            return step
        except (OSError, ValueError, LookupError, TypeError) as error:
            note(f"passed over: checkpoint {folder} is torn ({error})")
    if found:
        raise TrainError(
            f"none of the {len(found)} checkpoints of {run} is whole",
            fix="a copy of one, or --resume never to start anew",
        )
    return None


def load(
    run: Path, step: int, *, model: nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the checkpoint of a step, found by `newest`, into a model; returns its state.

    Raises TrainError if it is of another model.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    state = json.loads((folder / "state.json").read_text())
    weights = load_file(folder / "model.safetensors")
    there = model.state_dict()
    fits = weights.keys() == there.keys()
    if not fits or any(weights[k].shape != there[k].shape for k in there):
        odd = sorted(weights.keys() ^ there.keys()) or [
            k for k in there if weights[k].shape != there[k].shape
        ]
        raise TrainError(
            f"{folder} is of another model: {odd[0]}", fix="--resume never, or another --out"
        )
    model.load_state_dict({k: shard_like(v, there[k]) for k, v in weights.items()}, strict=True)
    _restore(model, optimiser, load_file(folder / "optimiser.safetensors"))
    return state


def _restore(
    model: nn.Module, optimiser: torch.optim.Optimizer, moments: dict[str, torch.Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    fused = any(group.get("fused") for group in optimiser.param_groups)
    for key, value in moments.items():
        name, _, kind = key.partition("|")
        parameter = parameters[name]
        if kind != "step":
            value = shard_like(value, parameter)
        elif fused:  # else AdamW counts its steps on the CPU
            value = value.to(parameter.device)
        optimiser.state[parameter][kind] = value


# --- the encoder, as timm loads it ----------------------------------------------------------------


def save_encoder(path: Path, weights: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """Write the weights of an encoder (`whole_weights`) with what is needed to use it.

    `about`: model (timm name), model_args, mean, std, input_size, and whatever tells its origin;
    kept as JSON strings in the header.
    """
    data = serialise(weights, metadata={k: json.dumps(v) for k, v in about.items()})
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(_same_header(data))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _same_header(data: bytes) -> bytes:
    """A safetensors file with its header's keys in order.

    The library writes metadata in an order that changes from call to call; the same encoder must
    be the same bytes, or DVC takes it for another.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)  # the format's alignment of what follows
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]


def read_about(run: str | Path) -> dict[str, Any]:
    """What an encoder.safetensors (or the run that holds it) says of itself in its header."""
    path = _encoder_file(run)
    try:
        with safe_open(path, framework="pt") as file:
            about = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise CacheError(f"{path} is damaged: {error}") from None
    if "model" not in about:
        raise CacheError(
            f"{path} was not written by milan", expected="an encoder of milan pretrain"
        )
    return about


def _encoder_file(run: str | Path) -> Path:
    path = Path(run)
    path = path / ENCODER if path.is_dir() else path
    if not path.is_file():
        raise CacheError(f"no {ENCODER} at {run}", expected="the folder of a finished pretraining")
    return path


def load_encoder(run: str | Path) -> Any:
    """The pretrained encoder of a run (its folder, or an encoder.safetensors), in eval mode.

    A timm VisionTransformer; `timm.data.resolve_model_data_config` gives its mean, std and size.
    """
    about = read_about(run)
    weights = load_file(_encoder_file(run))
    size = about["input_size"]
    encoder = build_encoder(about["model"], img_size=size, args=about["model_args"])
    encoder.load_state_dict(weights, strict=True)
    encoder.pretrained_cfg = {
        **encoder.pretrained_cfg,
        "mean": tuple(about["mean"]),
        "std": tuple(about["std"]),
        "input_size": (3, size, size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    return encoder.eval()


# --- the published checkpoints --------------------------------------------------------------------

_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}  # encoder width -> heads (MILAN, models_milan.py)
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
    read = _published_state(source)
    try:
        state = {k: torch.as_tensor(v) for k, v in read.items()}
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
                "norm_layer": partial(nn.LayerNorm, eps=shape["norm_eps"]),
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


def _published_state(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(source, str | Path):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no checkpoint at {path}", expected="a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged: {error}") from None
    # Published files carry their command line, an argparse.Namespace; nothing else may run.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            read = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and torch each have their own
            first = (str(error) or type(error).__name__).splitlines()[0][:160]
            raise ConfigError(f"{path} cannot be loaded safely: {first}") from None
    held = read.get("model", read) if isinstance(read, dict) else None
    if not isinstance(held, dict):
        raise ConfigError(f"{path} holds no state dict", expected="named tensors, or `model`")
    return held


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
        "num_heads": _HEADS.get(width, max(1, width // 64)),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "norm_eps": 1e-6,
        "decoder_embed_dim": decoder_width,
        "decoder_depth": 1
        + max(int(k.split(".")[1]) for k in state if k.startswith("decoder_blocks.")),
        "decoder_num_heads": DECODER["num_heads"],
        "decoder_mlp_ratio": state["decoder_blocks.0.mlp.fc1.weight"].shape[0] / decoder_width,
        "target_dim": state["decoder_pred.weight"].shape[0],
    }
