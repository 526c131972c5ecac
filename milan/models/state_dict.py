"""State dicts: names without what other tools put before or into them; digests of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from milan.core.paths import LFS_POINTER
from milan.errors import MilanError

# torch.compile, FSDP and activation checkpointing name their wrapper wherever a module is wrapped;
# DistributedDataParallel and DataParallel wrap the model as a whole.
_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_IN_FRONT = "module"
_CONTAINERS = ("state_dict", "model", "module")
T = TypeVar("T")


def unwrapped(state: Mapping[str, T]) -> dict[str, T]:
    """The same values under the names of the bare model. Raises ValueError for a name twice."""
    bare: dict[str, T] = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in _ANYWHERE]
        while len(parts) > 1 and parts[0] == _IN_FRONT:
            del parts[0]
        short = ".".join(parts)
        if short in bare:
            raise ValueError(f"{short} is there twice, once as {name}")
        bare[short] = value
    return bare


def inner_state(content: Any) -> Any:
    """The state dict inside a training checkpoint, or the content itself."""
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return content[key]
    return content


def check_fetched(file: Path, kind: type[MilanError]) -> None:
    """Raises `kind` for a Git LFS pointer in place of a file of weights; OSError."""
    with open(file, "rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise kind(f"{file} is a Git LFS pointer", expected="the weights", fix="git lfs pull")


def weights_digest(network: nn.Module, *, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a network's tensors as float32, by name; file formats do not matter.

    Names that begin with one of `without` are left out.
    """
    sha = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        if key.startswith(without):
            continue
        sha.update(f"{key}{list(tensor.shape)}".encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return sha.hexdigest()
