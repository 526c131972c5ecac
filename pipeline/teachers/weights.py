"""Weight files of teachers: where they are, reading them without running code in them, digests."""

from __future__ import annotations

import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from milan.core.units import format_bytes
from milan.errors import TeacherError, nearest
from milan.models.state_dict import check_fetched, inner_state, unwrapped

FOLDER: Final = "timm:local-dir:"
"""How the name of a teacher begins that lies in a folder as timm opens it."""
_ANSWER = 5.0  # seconds in which a hub has to say whether it has a file
# By the start of the tag.
_LICENCES: Final = {"openai": "MIT", "laion": "MIT", "datacomp": "MIT", "metaclip": "CC-BY-NC-4.0"}


@dataclass(frozen=True)
class Weights:
    """Where the weights of a teacher come from, before any is loaded."""

    what: str
    """For people."""
    file: Path | None = None
    """On this machine; None: they are to be fetched, or random."""
    repository: str = ""
    """Of the hub, with one of `names` in it."""
    names: tuple[str, ...] = ()
    url: str = ""
    """Where they are published outside the hub."""


def find_weights(weights: Weights, *, offline: bool) -> str:
    """Says where they are, or that they can be fetched; fetches nothing. Raises TeacherError."""
    import huggingface_hub as hub

    if weights.file:
        return f"{weights.what}: {weights.file}"
    if not (weights.repository or weights.url):
        return f"{weights.what}: drawn at random"
    wanted = weights.url
    if weights.repository:
        wanted = f"{weights.names[0]} of https://huggingface.co/{weights.repository}"
        for name in weights.names:
            if isinstance(cached := hub.try_to_load_from_cache(weights.repository, name), str):
                return f"{weights.what}: {cached}"
    if offline:
        raise not_here(weights.what, wanted, offline=True)
    error: Exception | None = None
    for name in weights.names or ("",):
        try:
            if name:
                url = hub.hf_hub_url(weights.repository, name)
                size = hub.get_hf_file_metadata(url, timeout=_ANSWER).size
            else:
                request = urllib.request.Request(weights.url, method="HEAD")
                with urllib.request.urlopen(request, timeout=_ANSWER) as answer:
                    size = int(answer.headers.get("Content-Length") or 0)
            return f"{weights.what}: {format_bytes(size or 0)} will be fetched"
        except Exception as failed:  # hub clients raise many kinds; all mean: cannot be fetched
            error = failed
    raise not_here(weights.what, wanted, offline=False, error=error)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name, on the CPU, in the file's own types.

    A state dict inside a training checkpoint is taken out; what DDP, FSDP or torch.compile add to
    names is cut off. No code in the file is run. Raises TeacherError for what is no state dict.
    """
    content: Any
    try:
        check_fetched(file, TeacherError)
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {k: v for k, v in inner_state(content).items() if isinstance(v, torch.Tensor)}
        if not tensors:
            raise ValueError("no tensors in it")
        return unwrapped(tensors)
    except TeacherError:
        raise
    except Exception as error:  # safetensors, pickle, zip and torch each have their own
        reason = " ".join(str(error).split()).partition(". ")[0][:160] or "an empty file"
        raise TeacherError(
            f"{file} cannot be loaded safely: {type(error).__name__}: {reason}",
            expected="a state dict: .safetensors, or .pt without code in it (no TorchScript)",
        ) from None


def weight_file(name: str, pretrained: str, tags: list[str]) -> Path:
    """The file that `pretrained` names. Raises TeacherError with the nearest of `tags`."""
    file = Path(pretrained).expanduser()
    if file.is_file():
        return file
    near = nearest(pretrained, tags, count=1) or " or ".join(tags[:4])
    raise TeacherError(
        f"--pretrained {pretrained} is neither a file nor a tag of {name}",
        expected="a .safetensors or .pt file, a tag, or none",
        fix=f"--pretrained {near}" if near else "--pretrained none (random weights, for tests)",
    )


def published_licence(tag: str) -> str:
    """The licence of the weights with open_clip's `tag`, else `unknown`."""
    return next((text for key, text in _LICENCES.items() if tag.startswith(key)), "unknown")


def stated_licence(file: Path) -> str:
    """The licence that a safetensors file states in its metadata, else `unknown`."""
    if file.suffix != ".safetensors":
        return "unknown"
    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get("licence", "unknown")
    except Exception:  # read_weights says what is wrong with the file
        return "unknown"


def not_here(
    what: str, wanted: str, *, offline: bool, error: Exception | None = None
) -> TeacherError:
    """The error for weights `what` that cannot be fetched; `wanted` is the file to place here."""
    why = "they are not published in a format that can be read safely, and"
    if offline:
        why = "--offline, and"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        why = f"{error.filename}: {error.strerror} (HF_HOME names another folder), and"
    elif error is not None:
        why = f"no network ({type(error).__name__}), and"
    return TeacherError(
        f"{why} the weights {what} are not here",
        fix=f"place {wanted} on this machine and use --pretrained FILE",
    )


def do_not_fit(
    pretrained: str, name: str, error: Exception, *, tower: str = "image"
) -> TeacherError:
    """The error for weights of another layout than the tower's."""
    lines = [line.strip() for line in str(error).splitlines()[:3]]
    reason = " ".join(lines)[:300] or type(error).__name__
    return TeacherError(
        f"the weights {pretrained} do not fit the {tower} tower of {name}: {reason}"
    )


def go_offline() -> None:
    """Request nothing of a hub from here on, in this process and in those it starts."""
    # The hub's client reads the variable once, when it is imported, and timm has imported it.
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def shown_name(name: str) -> str:
    """The teacher's name in a store: `name`, or that of its config file or folder."""
    if name.startswith(FOLDER):
        return "timm:" + Path(name.removeprefix(FOLDER)).resolve().name
    if not name.endswith(".json"):
        return name
    path = Path(name)
    generic = path.stem in ("config", "open_clip_config")  # then the folder's name says more
    return path.resolve().parent.name if generic else path.stem
