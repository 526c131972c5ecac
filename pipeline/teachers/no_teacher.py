"""No teacher: a store of views and token ids alone (`extract-targets --targets none`).

Its name is `none:NAME`. NAME says whose tokenizer reads the captions: a name of open_clip,
hf-hub:…, local-dir:… or a model config. No weights are loaded.
"""

from __future__ import annotations

from typing import Final

import torch

from milan.core.device import MEAN, STD
from milan.core.size import Size, as_size, height_width
from pipeline.teachers import clip
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.text_tower import Tokens
from pipeline.teachers.towers import Family, Loaded, Tower
from pipeline.teachers.weights import Weights

PREFIX: Final = "none:"


class NoTower(Tower):
    """A tower without a channel; an image is one patch."""

    pooling, left_out, channels, plain, patches = "token", 0, 0, True, 1

    def __init__(self, size: Size) -> None:
        self.module, self.size, self.patch = torch.nn.Identity(), size, max(height_width(size))

    def about(self) -> dict:
        """Nothing: no feature and no attention is stored."""
        return {}

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 2, 0]"""
        self._count = len(images)
        return images.new_empty(len(images), 2, 0)

    def attention(self) -> torch.Tensor:
        """[B, 1]"""
        return torch.ones(self._count, 1)


def load(spec: TeacherSpec) -> Loaded:
    """The tokenizer that `spec` names, and the size of its images."""
    name = spec.name.removeprefix(PREFIX)
    config, tokenizer = clip.architecture_of(name), clip.tokenizer_of(name)
    size = spec.img_size or as_size(config["vision_cfg"].get("image_size", 224))
    texts = Tokens(name, tokenizer, config)
    own = {"mean": MEAN, "std": STD}
    return Loaded(NoTower(size), {}, own, "none", "none needed", [], texts)


def weights_of(spec: TeacherSpec) -> Weights:
    """None: only the tokenizer is needed."""
    return Weights(f"no weights of {spec.name.removeprefix(PREFIX)}")


FAMILY: Final = Family(lambda name: name.startswith(PREFIX), load, weights_of)
