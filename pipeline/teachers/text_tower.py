"""The teacher's text tower: captions and class names become vectors in the space of the images.

Shapes: B texts, L token ids each (the tower's context), C the joint width, P classes, M templates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from milan.errors import TeacherError
from milan.models.state_dict import weights_digest
from milan.store.format import PROTOTYPES

TEMPLATES: Final = (
    "{}",
    "a picture of one {}.",
    "here we see a {}.",
    "a {} in its usual place.",
    "a {}, seen from close by.",
    "a {} far off, small in the frame.",
    "a blurred or dim picture of a {}.",
)
"""Prompts for a class name, a few short sentences (prompt ensembling, arXiv 2103.00020, 3.1.4)."""

# A tokenizer's identity is its ids of these: several scripts, digits, punctuation, a long text.
_PROBES: Final = (
    *TEMPLATES,
    "Ångström naïve 東京 Привет 🙂 x=3.14!? it's",
    "on and on " * 99,
)
_BATCH = 256  # texts a forward pass


class TextTower:
    """The text half of a CLIP; always in float32, for it runs only once a text.

    `model` has `encode_text`; `tokenizer` turns sentences into ids [B, L], cut to L with the last
    id kept as end of text. Raises TeacherError for a tokenizer of another vocabulary.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Callable[[list[str]], torch.Tensor],
        config: dict,
    ) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        ids = self._checked_ids(name, model)
        self.identity = {
            "weights": weights_digest(model, without=("visual.", "logit_")),
            "architecture": config["text_cfg"] | {"quick_gelu": config.get("quick_gelu", False)},
            "tokenizer": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
            "context": ids.shape[1],
            "templates": list(TEMPLATES),
        }
        """What determines its outputs."""

    def _checked_ids(self, name: str, model: Any) -> np.ndarray:
        """The ids of _PROBES, all of them known to the tower."""
        ids = self.tokenise(_PROBES)
        vocabulary = next(
            module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)
        )
        _check_vocabulary(name, ids, vocabulary)
        return ids

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids [B, L] int32."""
        return self.tokenizer(list(texts)).numpy().astype(np.int32)

    @torch.inference_mode()
    def features(self, ids: np.ndarray) -> np.ndarray:
        """Unit vectors [B, C] float32 of token ids [B, L]."""
        device = next(self.model.parameters()).device
        parts = [
            self.model.encode_text(torch.from_numpy(part).long().to(device), normalize=True)
            for part in np.array_split(ids, -(-len(ids) // _BATCH))
        ]
        return torch.cat(parts).float().cpu().numpy()

    def prototypes(
        self, classes: list[str], templates: Sequence[str] = TEMPLATES
    ) -> dict[str, np.ndarray]:
        """Tables of a store: `features` [P, C], `ids` [P, M, L] of classes by their names.

        A class is the mean of its sentences' vectors, scaled to length 1 (arXiv 2103.00020, section
        3.1.4).
        """
        ids = self.tokenise(_prompts(classes, templates))
        features = self.features(ids).reshape(len(classes), len(templates), -1)
        mean = features.mean(axis=1)
        return {
            f"{PROTOTYPES}/features": mean / np.linalg.norm(mean, axis=1, keepdims=True),
            f"{PROTOTYPES}/ids": ids.reshape(len(classes), len(templates), -1),
        }


class Tokens(TextTower):
    """A tokenizer without a text tower: of `texts` it knows the ids alone."""

    def __init__(
        self, name: str, tokenizer: Callable[[list[str]], torch.Tensor], config: dict
    ) -> None:
        self.model, self.tokenizer = nn.Identity(), tokenizer
        ids = self.tokenise(_PROBES)
        text = config["text_cfg"]
        _check_vocabulary(name, ids, text.get("vocab_size", 49_408))
        joint = {"quick_gelu": config.get("quick_gelu", False), "embed_dim": config["embed_dim"]}
        self.identity = {
            "architecture": text | joint,
            "tokenizer": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
            "context": ids.shape[1],
            "templates": list(TEMPLATES),
        }

    def prototypes(
        self, classes: list[str], templates: Sequence[str] = TEMPLATES
    ) -> dict[str, np.ndarray]:
        """`ids` [P, M, L] of classes by their names."""
        sentences = _prompts(classes, templates)
        ids = self.tokenise(sentences).reshape(len(classes), len(templates), -1)
        return {f"{PROTOTYPES}/ids": ids}


def _prompts(classes: list[str], templates: Sequence[str]) -> list[str]:
    """Each class in each template; underscores in names are read as spaces."""
    names = [name.replace("_", " ") for name in classes]
    return [template.format(name) for name in names for template in templates]


def _check_vocabulary(name: str, ids: np.ndarray, vocabulary: int) -> None:
    if ids.max() >= vocabulary:
        raise TeacherError(
            f"the tokenizer of {name} has ids up to {ids.max():,}, its text tower {vocabulary:,}",
            expected="a text tower of its tokenizer's vocabulary",
            fix="without --texts, or correct text_cfg",
        )


def no_texts(what: str) -> TeacherError:
    """The error where `what` brings no text tower."""
    return TeacherError(
        f"{what} has no text tower",
        expected="a CLIP, with the weights of both towers, for --texts",
        fix="without --texts",
    )
