"""State dicts: names without what other tools put before or into them; digests of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from milan.core.paths import LFS_POINTER
from milan.errors import MilanError

# torch.compile, FSDP and activation checkpointing name their wrapper wherever a module is wrapped;
# DistributedDataParallel and DataParallel wrap the model as a whole.
_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_IN_FRONT = "module"
_PAGES = (b"<!doctype html", b"<html", b"<?xml")
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
    """Raises `kind` for a Git LFS pointer or a web page in place of a file of weights; OSError."""
    with open(file, "rb") as handle:
        start = handle.read(max(512, len(LFS_POINTER)))
    if start.startswith(LFS_POINTER):
        raise kind(f"{file} is a Git LFS pointer", expected="the weights", fix="git lfs pull")
    if start.lstrip().lower().startswith(_PAGES):
        raise kind(
            f"{file} is a web page",
            expected="the weights: a page that asks first was saved in their place",
            fix="fetch it by a browser, and look at its size",
        )


def misfit(state: Mapping[str, Any], network: Any, *, leave: Sequence[str] = ()) -> str:
    """What of a state dict does not fit a network, in words, the first few names of each kind;
    empty if all does.

    Weights whose name begins with one of `leave` may lack, or be there for nothing.
    """
    there = network.state_dict()
    kinds: dict[str, list[str]] = {"shape": [], "lacks": [], "more": []}
    for name in sorted(there.keys() | state.keys()):
        if name.startswith(tuple(leave)):
            continue
        if name not in state:
            kinds["lacks"].append(name)
        elif name not in there:
            kinds["more"].append(name)
        elif state[name].shape != there[name].shape:
            theirs, ours = (" x ".join(map(str, t[name].shape)) for t in (state, there))
            kinds["shape"].append(f"{name} is {theirs} in it, and {ours} in the model")
    said = [listed(kinds["shape"], 2)] if kinds["shape"] else []
    if lacks := kinds["lacks"]:
        said.append(f"{listed(lacks)} {'is' if len(lacks) == 1 else 'are'} not in it")
    if more := kinds["more"]:
        said.append(
            f"{listed(more)} {'is' if len(more) == 1 else 'are'} in it, and not in the model"
        )
    return "; ".join(said)


def listed(names: Iterable[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - count:,} more" if len(every) > count else ""
    return ", ".join(every[:count]) + more


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
