"""Weights in a file or folder of others, read without running what is in it.

Pickles are read by torch's weights-only reader. What is neither a tensor nor a plain value (a
command line, a logger's history) becomes an empty object of that name, so nothing of it can run.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from milan.errors import ConfigError
from milan.models.state_dict import check_fetched, inner_state, listed, unwrapped

_COMMAND_LINE = ["argparse.Namespace"]  # what old files, which cannot be searched, may hold
_FILES = ("model.safetensors", "pytorch_model.bin")
CLIP_CONFIG = "open_clip_config.json"
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointFile:
    """What a checkpoint holds."""

    state: dict[str, torch.Tensor]
    """Weights by name, without what DDP, FSDP or torch.compile put before it."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json of timm, transformers or open_clip, which lies beside the weights."""
    processor: dict[str, Any] = field(default_factory=dict)
    """preprocessor_config.json beside it."""
    others: tuple[str, ...] = ()
    """What else is in the file, in words."""


class _Unread:
    """In place of an object whose class is not known here."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        del arguments, named


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Weights of a file (.pth, .pt, .bin, .safetensors) or a folder of timm, transformers or
    open_clip.

    A file of such a folder is read as the folder is. Raises ConfigError for what is no checkpoint,
    is damaged, or would need code of its own to load.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise ConfigError(
            f"no checkpoint at {path}",
            expected="a .pth or .safetensors file",
            fix="--checkpoint FILE",
        )
    check_fetched(path, ConfigError)
    content = _load(path)
    state = inner_state(content)
    if isinstance(state, _Unread):
        raise ConfigError(
            f"{path} holds a whole network ({_kind(state)}), whose code is not run",
            expected="named tensors",
            fix="torch.save(network.state_dict(), FILE), where that code is",
        )
    named = state if isinstance(state, Mapping) else {}
    tensors = {str(k): v for k, v in named.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        has = f": it has {listed(map(str, named))}" if named else ""
        raise ConfigError(
            f"{path} holds no state dict{has}",
            expected="named tensors, or `model`, `state_dict`",
            fix="torch.save(network.state_dict(), FILE), where the network is",
        )
    others = [_described(key, value) for key, value in named.items() if str(key) not in tensors]
    if state is not content:
        others += [_described(key, part) for key, part in content.items() if part is not state]
    try:
        return CheckpointFile(unwrapped(tensors), *_beside(path), tuple(others))
    except ValueError as error:
        raise ConfigError(f"{path} holds two networks in one: {error}") from None


def _load(path: Path) -> Any:
    """The content of a file, tensors on the CPU."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged: {error}") from None
    try:
        try:
            unknown = get_unsafe_globals_in_checkpoint(str(path))
        except ValueError:  # no zip: a format that torch wrote until 1.5, or no checkpoint
            unknown = _COMMAND_LINE
        # A name of its own for each, which may have dots: it says what is there.
        stubs: list[Any] = [(type(name, (_Unread,), {}), name) for name in unknown]
        with safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is torch's of a zip
            raise
        raise ConfigError(
            f"{path} cannot be loaded safely: {_reason(path, error)}",
            expected="a checkpoint of torch (.pth), or .safetensors",
            fix="--checkpoint FILE of such a kind, or the folder of a run",
        ) from None


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch cannot read, in words."""
    text = " ".join(str(error).split())
    if not path.stat().st_size:
        return "it is empty"
    if "blocked" in text or "TorchScript" in text or "torchscript" in text:
        what = text.partition("whose module")[0].rpartition("GLOBAL ")[2].strip()
        return f"it is code, which is not run ({what if 'blocked' in text else 'TorchScript'})"
    if isinstance(error, OSError) or "central directory" in text or "failed reading zip" in text:
        return "it ends too early, or is damaged"
    if not _start(path).startswith((b"PK", b"\x80")):  # a zip, a pickle
        return "it is no checkpoint of torch"
    return (text or type(error).__name__)[:160]


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2)


def _folder(path: Path) -> CheckpointFile:
    """A folder as timm, transformers and open_clip leave it: config.json and weights, in one file
    or more."""
    clip = (path / CLIP_CONFIG).is_file()  # its repositories also have transformers' config.json
    files = (*CLIP_FILES, *_FILES) if clip else _FILES
    if not clip and (path / _INDEX).is_file():
        parts = sorted(set(_json(path / _INDEX).get("weight_map", {}).values()))
    else:
        parts = [name for name in files if (path / name).is_file()][:1]
    if not parts:
        raise ConfigError(
            f"no checkpoint at {path}: the folder has no {' or '.join(files)}",
            expected="a run, or a folder of timm, transformers or open_clip",
            fix="milan pretrain, which leaves a run in its --out",
        )
    state: dict[str, torch.Tensor] = {}
    for part in parts:
        state |= read_checkpoint(path / part).state
    return CheckpointFile(state, *_configs(path, clip))


def _beside(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`_configs` of the folder, if the file has the name that weights have in one."""
    if file.name in CLIP_FILES:
        return _configs(file.parent, True)
    return _configs(file.parent, False) if file.name in _FILES else ({}, {})


def _configs(folder: Path, clip: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json or open_clip's, preprocessor_config.json) of a folder; empty where none is."""
    config = folder / (CLIP_CONFIG if clip else "config.json")
    return _json(config), _json(folder / "preprocessor_config.json")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object")
    return content


def _described(key: Any, value: Any) -> str:
    """A part of a checkpoint that is not read, in words."""
    if isinstance(value, _Unread):
        return f"{key} ({_kind(value)})"
    short = isinstance(value, int | float | str) and len(str(value)) <= 40
    return f"{key} {value}" if short else str(key)


def _kind(value: Any) -> str:
    return type(value).__name__
