"""A picture of a RILS run: the sentences nearest to masked patches, student beside target.

B images, N patches of which M are masked, K sentences, D width.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from milan.config import PretrainConfig
from milan.core import rng
from milan.core.config_fields import check_seed
from milan.core.device import MEAN, STD, normalise
from milan.core.paths import check_unicode
from milan.data.dataset import CachedDataset
from milan.errors import ConfigError, DataError
from milan.models.masking import Mask, random_mask, visible_count
from milan.models.rils import load_rils
from milan.objectives.rils import WEIGHTS, SentenceReconstruction
from milan.objectives.rils_cached import CachedSentences
from milan.objectives.sentences import unit
from milan.reporting.panels import caption_of, check_apart, patch_features, save_picture
from milan.reporting.run_files import read_run
from milan.reporting.sentences import NamedPatch, Said, draw_sentences
from milan.store.cache import TargetCache
from milan.training.build import resolve_defaults, run_order
from milan.training.trained import load_student

_OTHERS = 500  # sentences, beside those of the images that are shown
_NEAREST = 5


def sentence_sheet(
    run: str | Path,
    *,
    out: str | Path,
    images: int = 8,
    seed: int = 0,
    data_root: str | None = None,
) -> Path:
    """Draw what target and student say of masked patches of a run (`named_patches`).

    Returns the path of the picture. Raises as that, and DataError if the picture would lie among
    the images.
    """
    check_unicode(str(out), "the path")
    rows, legend = named_patches(run, images=images, seed=seed, data_root=data_root, out=Path(out))
    return save_picture(draw_sentences(f"{len(rows)} images of {run}", rows, legend), Path(out))


def named_patches(
    run: str | Path,
    *,
    images: int = 8,
    seed: int = 0,
    data_root: str | None = None,
    out: Path | None = None,
) -> tuple[list[NamedPatch], list[str]]:
    """(what is said, what it means) of `images` images of a run of `rils` or `rils-cached`.

    They are validation images, if the run has some. Of each it is the masked patch whose target is
    the most certain, and its five nearest sentences. Raises ConfigError for a run of another
    objective, and MilanError for what the run or its store lacks.
    """
    check_seed(seed)
    settings = read_run(Path(run))["config"]
    names = {field.name for field in fields(PretrainConfig)}
    config = PretrainConfig(**{k: v for k, v in settings.items() if k in names})
    cache = TargetCache(config.cache, layer=config.layer)
    objective = resolve_defaults(config, torch.device("cpu")).whole().objective(cache)
    if not isinstance(objective, SentenceReconstruction | CachedSentences):
        raise ConfigError(
            f"{run} was trained with objective {config.objective}",
            expected="rils or rils-cached, whose targets are sentences",
            fix=f"milan visualise {config.cache}",
        )
    dataset = CachedDataset(cache, data_root=data_root or config.data_root)
    if out:
        check_apart(out, [root for _, root in dataset.roots or cache.find_data_roots()])
    order = run_order(config, cache)
    validation = len(order.validation_rows) > 0
    pool = order.validation_rows if validation else order.train_rows
    pool = pool[np.isin(pool, cache.captioned)] if len(cache.captioned) else pool
    rows = np.sort(pool[rng.permutation(seed, rng.SAMPLE, (3,), len(pool))[: max(1, images)]])
    pixels = dataset.pixels(rows, np.zeros_like(rows))
    said = _said(run, objective, cache, rows, torch.from_numpy(pixels), seed)
    shares = [
        (unit(part) @ said.vectors.T / tau).softmax(dim=-1)
        for part, tau in zip((said.target, said.predicted), said.taus, strict=True)
    ]
    best, masked = shares[0].amax(dim=2).argmax(dim=1), said.mask.boolean().numpy()
    patches = [
        NamedPatch(
            caption_of(dataset, int(row), 0), pixels[i], masked[i],
            int(said.mask.masked[i, best[i]]),
            *(_nearest(part[i, best[i]], said.texts) for part in shares),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    target, student = said.taus
    return patches, [
        f"{config.objective}; {'validation' if validation else 'training'} images. Framed: "
        "of the masked patches the one whose target is the most certain of a sentence.",
        f"Shares are of {len(said.texts)} sentences, at temperatures {target:.3g} (target, which "
        f"sees the patch) and {student:.3g} (student, which does not).",
    ]


class _Said(NamedTuple):
    """What target and student say of all masked patches."""

    predicted: torch.Tensor
    """[B, M, D]"""
    target: torch.Tensor
    """[B, M, D]"""
    mask: Mask
    texts: list[str]
    """K sentences."""
    vectors: torch.Tensor
    """[K, D] of length 1."""
    taus: tuple[float, float]
    """Temperatures of target and student."""


def _said(
    run: str | Path,
    objective: SentenceReconstruction | CachedSentences,
    cache: TargetCache,
    rows: np.ndarray,
    pixels: torch.Tensor,
    seed: int,
) -> _Said:
    texts, ids, features = _sentences(cache, rows, seed)
    images, joint = normalise(pixels, MEAN, STD), isinstance(objective, SentenceReconstruction)
    student: Any = load_rils(Path(run) / WEIGHTS) if joint else load_student(run).student
    count, first = student.patches, np.zeros_like(rows)
    noise = torch.from_numpy(rng.mask_noise(seed, first, rows, first, count))
    mask = random_mask(noise, visible=visible_count(count, objective.mask_ratio))
    if isinstance(objective, SentenceReconstruction):
        loss = objective.sentence_loss
        if not loss.weight:
            raise ConfigError(
                f"{run} is plain CLIP (objective.weight=0)", expected="a run that predicts patches"
            )
        with torch.inference_mode():
            output = student(images, mask, ids[:1].expand(len(rows), -1))
            vectors = unit(student.text(ids))
        taus = loss.teacher_tau, loss.student_tau
        return _Said(output.predicted, output.target, mask, texts, vectors, taus)
    assert features is not None
    at = mask.masked[..., None].expand(-1, -1, cache.spec.channels)
    with torch.inference_mode():
        _, predicted = mask.split(student(images, mask))
    target = torch.from_numpy(patch_features(cache, rows, first)).gather(1, at)
    vectors, taus = torch.from_numpy(features), (objective.teacher_tau, objective.student_tau)
    return _Said(predicted, target, mask, texts, vectors, taus)


def _sentences(
    cache: TargetCache, rows: np.ndarray, seed: int
) -> tuple[list[str], torch.Tensor, np.ndarray | None]:
    """(sentences, token ids [K, L], the teacher's vectors [K, D] if the store has them): the
    captions of `rows` and of others, each once; of a store without captions the class prompts."""
    captioned = cache.captioned
    if not len(captioned):
        prototypes = cache.prototypes
        if prototypes is None:
            raise DataError(f"{cache.path} has neither captions nor classes")
        return prototypes.classes, torch.from_numpy(prototypes.ids[:, 0]), prototypes.features
    others = rng.permutation(seed, rng.SAMPLE, (4,), len(captioned))[:_OTHERS]
    asked = np.unique(np.concatenate([rows, captioned[others]]))
    ids = cache.token_ids(asked)[:, 0]
    _, first = np.unique(ids, axis=0, return_index=True)
    asked, ids = asked[np.sort(first)], ids[np.sort(first)]
    texts = [cache.manifest.captions(row, row + 1)[0][0] for row in asked.tolist()]
    features = cache.texts(asked).features if cache.spec.has_targets else None
    return texts, torch.from_numpy(ids), features


def _nearest(shares: torch.Tensor, texts: list[str]) -> Said:
    """The sentences with the largest of `shares` [K]."""
    top = shares.topk(min(_NEAREST, len(texts)))
    return [
        (texts[i], value)
        for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
