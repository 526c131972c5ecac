"""RILS's objective: masked patches as distributions over captions (arXiv 2301.06958).

The joint form: no teacher and no cached features. The encoder, seen through whole images, is the
target of the same encoder seen through masked ones; images and captions learn to match meanwhile.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from milan.config import PretrainConfig
from milan.data.loader import Batch
from milan.errors import ConfigError, DataError
from milan.models.decoder import decoder_arguments
from milan.models.export import write_weights
from milan.models.rils import (
    JointOutput,
    RilsStudent,
    load_text_tower,
    published_shape,
    published_state,
    rils_decoder,
)
from milan.models.student import Student
from milan.models.text_encoder import TextEncoder, TextShape
from milan.objectives.arguments import check_arguments
from milan.objectives.base import JointLoss, JointObjective, Prediction
from milan.objectives.sentences import NORMALISERS, SentenceLoss
from milan.store.cache import TargetCache
from milan.store.sentences import Sentences

WEIGHTS = "rils.safetensors"
"""The whole student in RILS's published layout, in a run's folder."""
_OPEN_CLIP = "pipeline.teachers.clip"  # loaded only for --text-tower
_NUMBERS = {"weight": 0.0, "teacher_tau": 1e-4, "student_tau": 1e-4}  # arguments -> the least
_LOOKED_AT = 256  # rows whose captions are looked at before a run begins
_ARCHITECTURE = {
    "vocab_size": "vocabulary", "context_length": "context", "width": "width", "heads": "heads",
    "layers": "layers", "embed_dim": "joint", "quick_gelu": "quick_gelu",
}  # fmt: skip
"""Names of open_clip -> ours."""


class SentenceReconstruction(JointObjective):
    """Match images with captions, and reconstruct masked patches by what they say of captions."""

    decoder = "mae"
    masking = "random"
    needs_features = False
    needs_tokens = True
    pooling = "mean"
    settings = ("gather", "text_tower")

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """Its arguments, at least two captions a step, and weights that ranks hold whole."""
        check_arguments(config, numbers=_NUMBERS, words={"normaliser": NORMALISERS})
        cls.check_own(config)
        if config.batch_size < 2:
            raise ConfigError(
                f"batch size {config.batch_size} with objective {config.objective}",
                expected="at least two captions in a step: one alone cannot be told from others",
                fix="--batch-size 256, or more: the captions of a step are all that it learns from",
            )
        if config.parallel != "ddp":
            raise ConfigError(
                f"--parallel {config.parallel} with objective {config.objective}",
                expected="ddp: the scale of the contrastive loss is a scalar, which is not sharded",
                fix="--parallel ddp",
            )

    @property
    def sentence_loss(self) -> SentenceLoss:
        """The loss with the settings of the run."""
        given: dict[str, Any] = dict(self.config.objective_args)
        return SentenceLoss(gather=self.config.gather or "detached", **given)

    # --- the student ------------------------------------------------------------------------------

    def target_width(self, encoder: Any) -> int:
        """The encoder's own width: one projection serves both."""
        return encoder.embed_dim

    def decoder_arguments(self, encoder: Any, given: dict[str, Any]) -> dict[str, Any]:
        """One block as wide as the encoder, with as many heads."""
        ours = rils_decoder(encoder.embed_dim, encoder.blocks[0].attn.num_heads)
        return decoder_arguments(encoder.embed_dim, ours | given)

    def complete(self, student: Student) -> RilsStudent:
        """With a text tower of the shape that the store's tokens, or --text-tower, ask for; or the
        one in --text-tower's checkpoint."""
        text = self._text_tower()
        whole = RilsStudent(
            student.encoder, student.decoder, text, recompute=student.recompute,
            reconstruct=self.sentence_loss.weight > 0,
        )  # fmt: skip
        assert self.cache.spec.texts is not None
        whole.tokenizer = self.cache.spec.texts["tokenizer"]
        return whole

    def notes(self) -> list[str]:
        """A weight of 0 is another system."""
        if self.sentence_loss.weight:
            return []
        return ["objective.weight=0: plain CLIP; no masked image is seen, the decoder stays as is"]

    def after_step(self, student: nn.Module) -> None:
        """Keep the scale of the contrastive loss in its bounds."""
        assert isinstance(student, RilsStudent)
        student.clamp_scale()

    def leave(self, run: Path, student: nn.Module) -> None:
        """The student under its published names."""
        assert isinstance(student, RilsStudent)
        state = {
            name: value.contiguous()
            for name, value in published_state(student.state_dict()).items()
        }
        write_weights(run / WEIGHTS, state, published_shape(student))

    def _text_tower(self) -> TextEncoder:
        """Raises ConfigError if it cannot read the store's tokens."""
        name, spec = self.config.text_tower, self.cache.spec
        length, highest = _look_at(self.cache)
        assert spec.texts is not None
        architecture, made = {"embed_dim": spec.channels} | spec.texts["architecture"], None
        file = text_tower_file(name)
        if name and not file:
            architecture = import_module(_OPEN_CLIP).text_architecture(name)
        known = {ours: architecture.get(theirs) for theirs, ours in _ARCHITECTURE.items()}
        shape = replace(TextShape(), **{k: v for k, v in known.items() if v is not None})
        if file:
            made = load_text_tower(file, shape)
            shape = made.shape
        if shape.vocabulary <= highest or shape.context < length:
            raise ConfigError(
                f"{self.cache.path} has texts of {length} tokens with ids up to {highest:,}, and "
                f"the text tower{f' {name}' if name else ''} reads {shape.context} of up to "
                f"{shape.vocabulary - 1:,}",
                expected="a text tower of the store's tokenizer",
                fix="without --text-tower",
            )
        return made or TextEncoder(shape)

    # --- the loss ---------------------------------------------------------------------------------

    def predict(self, network: nn.Module, batch: Batch) -> Prediction:
        """The student sees each image twice, and its caption."""
        images, mask = batch.images, self.mask(batch)
        output = network(images, mask, batch.ids)
        return Prediction(output.predicted, images, mask, batch, output)

    def joint_loss(self, joint: JointOutput) -> JointLoss:
        """`SentenceLoss`."""
        return self.sentence_loss(joint, self.ranks)

    def picture(self, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """Masked patches in the joint space, target and prediction; visible ones are zeros, and so
        is what a plain CLIP does not predict."""
        output, count = prediction.joint, prediction.batch.noise.shape[1]
        place = prediction.mask.decoded[..., None].expand_as(output.target)
        blank = torch.zeros(len(place), count, place.shape[2], device=place.device)
        target, predicted = (
            blank.scatter(
                1, place[:, : part.shape[1]], nn.functional.normalize(part.float(), dim=-1)
            )
            for part in (output.target, output.predicted)
        )
        return target, predicted


def text_tower_file(name: str | None) -> Path | None:
    """The checkpoint that --text-tower names: a file, or the folder of a run of rils; None for a
    name of open_clip."""
    path = Path(name or "")
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return path
    return path / WEIGHTS if name and (path / WEIGHTS).is_file() else None


def _look_at(cache: TargetCache) -> tuple[int, int]:
    """(token ids of a text at most, the highest id) of some captions of a store.

    Raises ConfigError for texts that a tower of CLIP's kind cannot read, DataError for texts that
    are all the same, and CacheError for a store without.
    """
    sentences = Sentences(cache)
    rows = cache.good_rows(with_dropped=True)
    rows = rows[~np.isin(rows, sentences.missing())][:_LOOKED_AT]
    if not len(rows):
        raise DataError(
            f"no image of {cache.path} has a caption or a class",
            expected="captions (a column `caption`, texts in tars) or class folders",
            fix="data with captions, or another --objective",
        )
    ids = sentences.draw(rows, np.zeros_like(rows), 0, seed=0)
    if len(rows) > 1 and (ids == ids[0]).all() and sentences.single(rows):
        raise DataError(
            f"the captions of {cache.path} are all equal",
            expected="captions that differ: a patch is told by which of them it is like",
            fix="data with captions of their own, or another --objective",
        )
    ends = ids.max(axis=1)
    if (ends != ends[0]).any():
        raise ConfigError(
            f"{cache.path} has texts that do not end in their highest token id",
            expected="tokens of CLIP's vocabulary, whose last id is the end of a text",
            fix="--teacher ViT-B-16-quickgelu, or another with OpenAI's tokenizer, at extraction",
        )
    return ids.shape[1], int(ends[0])
