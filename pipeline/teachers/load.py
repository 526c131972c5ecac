"""The frozen teacher that gives targets, of whichever family.

To add a family of teachers, write one file like `timm_vit.py`: a loader from a `TeacherSpec` to
`Loaded` (its tower is a `Tower`, pipeline/teachers/towers.py), declared as `FAMILY`; and name it in
`FAMILIES` below. docs/teachers.md has a table row for each kind of tower.

Shapes: B views of H x W pixels, N patches, T = 1 + N tokens with the class token (or what takes its
place, see pipeline/teachers/towers.py) first, C the features' width: of a CLIP, the joint width of
image and text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from milan.core.device import MEAN, STD, autocast, normalise, pick_device, try_device
from milan.errors import TeacherError
from milan.models.state_dict import weights_digest
from pipeline.teachers import clip, no_teacher, timm_folder, timm_vit
from pipeline.teachers.block import BlockTower
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec
from pipeline.teachers.text_tower import TextTower
from pipeline.teachers.towers import Family, Tower
from pipeline.teachers.weights import go_offline, shown_name

FAMILIES: Final[tuple[Family, ...]] = (
    timm_folder.FAMILY, timm_vit.FAMILY, no_teacher.FAMILY, clip.FAMILY
)  # fmt: skip
"""The first that accepts a teacher's name loads it; open_clip takes what is left."""


class Teacher:
    """A loaded tower. `identity` determines its outputs; `about` tells people of its origin."""

    def __init__(
        self,
        tower: Tower,
        *,
        identity: dict,
        about: dict,
        device: torch.device,
        texts: TextTower | None = None,
    ) -> None:
        self.visual: Any = tower.module.to(device).eval().requires_grad_(False)
        self.tower, self.texts = tower, texts
        if texts:
            texts.model.to(device)
        self.identity, self.about, self.device = identity, about, device
        self.size, self.patch, self.channels = tower.size, tower.patch, tower.channels
        self.tokens = 1 + tower.patches

    @torch.inference_mode()
    def targets(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, T, C] and attention [B, N] (> 0) of views, uint8 [B, H, W, 3]; float32."""
        images = torch.as_tensor(pixels).to(self.device)
        norm = self.identity["normalisation"]
        return self.forward(normalise(images, norm["mean"], norm["std"]))

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `targets`, of normalised images [B, 3, H, W], float32."""
        with autocast(self.device, self.identity["precision"]):
            tokens = self.tower.tokens(images)
        return tokens.float(), self.tower.attention()


def load_teacher(spec: TeacherSpec, *, device: str = "auto") -> Teacher:
    """Build and load the teacher that `spec` names.

    Raises TeacherError: for an unknown name or tag with the nearest ones, for weights that are not
    on this machine with where to get them, and for a model without usable tokens. Raises
    ConfigError for a device that does not exist.
    """
    if spec.offline:
        go_offline()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    chosen_device = pick_device(device)
    try_device(chosen_device)
    if spec.norm not in (None, "imagenet", "own"):
        raise TeacherError(f"--teacher-norm {spec.norm}", expected="imagenet or own")
    if spec.precision not in ("auto", "fp32", "bf16", "fp16"):
        raise TeacherError(f"--precision {spec.precision}", expected="auto, fp32, bf16 or fp16")
    if spec.block is not None and spec.texts:
        raise TeacherError(
            f"--texts with --teacher-layer {spec.block}",
            expected="the tower's output, for texts are not compared with what is in a block",
            fix="without --texts, or without --teacher-layer",
        )
    precision = spec.precision
    if precision == "auto":
        precision = "fp16" if chosen_device.type == "cuda" else "fp32"

    with _no_logging():
        loaded = next(family for family in FAMILIES if family.accepts(spec.name)).load(spec)
    tower = loaded.tower
    if spec.block is not None:
        tower = BlockTower(spec.name, tower, spec.block)
    norm = spec.norm or ("imagenet" if spec.name == DEFAULT_TEACHER else "own")
    mean, std = (MEAN, STD) if norm == "imagenet" else (loaded.own["mean"], loaded.own["std"])
    identity = {
        "weights": weights_digest(tower.module),
        "architecture": loaded.architecture,
        "channels": tower.channels,
        "image_size": tower.size if isinstance(tower.size, int) else list(tower.size),
        "patch_size": tower.patch,
        "normalisation": {"mean": [float(m) for m in mean], "std": [float(s) for s in std]},
        "precision": precision,
        **tower.identity(),
    }
    about = {
        "name": shown_name(spec.name) + ("" if spec.block is None else f"@{spec.block}"),
        "pretrained": loaded.pretrained,
        "random_weights": spec.pretrained == "none",
        "normalisation": norm,
        "licence": loaded.licence,
        **tower.about(),
        "notes": loaded.notes + tower.notes(),
    }
    return Teacher(tower, identity=identity, about=about, device=chosen_device, texts=loaded.texts)


@contextmanager
def _no_logging() -> Iterator[None]:
    """open_clip logs on the root logger what milan says itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
