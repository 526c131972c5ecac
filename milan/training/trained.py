"""The whole student of a run, encoder and decoder: what predicts the teacher's features."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from milan.config import PretrainConfig
from milan.core.config_fields import names_in
from milan.core.progress import NoProgress, Progress
from milan.core.size import as_size
from milan.errors import ConfigError, TrainError, nearest
from milan.images.channels import Channels
from milan.models.export import CHANNELS
from milan.models.student import Student, add_deep_decoders, build_student
from milan.objectives.base import Objective, objective_class
from milan.objectives.features import (
    FeatureRegression,
    learns_class_token,
    supervised_blocks,
)
from milan.objectives.normalisation import Affine
from milan.reporting.run_files import RUN, read_run
from milan.store.cache import TargetCache
from milan.store.joined import layers_of
from milan.store.statistics import FOLDER, find_digest, settle
from milan.training import checkpoint
from milan.training.build import resolve_defaults, student_of
from milan.training.run_store import decoder_of, digests_of


@dataclass(frozen=True)
class TrainedStudent:
    """A student, and what its run says of the targets that it predicts."""

    student: Student
    """In eval mode, on the CPU."""
    store: str
    """The store that has the teacher's targets, as the run names it."""
    layer: str | None
    """Whose targets of that store; None: those of its first layer."""
    teacher: str
    """The teacher's name."""
    class_token: bool = True
    """Whether it learnt to predict the class token."""
    visible: bool = True
    """Whether it learnt to predict patches that it sees."""
    channels: Channels | None = None
    """What it sees in place of pictures' RGB."""


def load_student(
    run: str | Path,
    *,
    drawn: int | None = None,
    progress: Progress | None = None,
    layer: str | None = None,
) -> TrainedStudent:
    """The student of a run that predicts the teacher's features, by its newest checkpoint.

    `drawn`: a student of the same shape with weights drawn by this seed, as before training. Of
    a run with several teachers it predicts that of `layer`, as the run spells it; default: the
    first. Raises ConfigError for a layer that the run has not, and for a run of another objective,
    TrainError for one without run.json or checkpoints: encoder.safetensors has no decoder.
    """
    folder = Path(run)
    folder = folder.parent if folder.is_file() else folder
    if not (folder / RUN).is_file() or not checkpoint.steps(folder):
        lacks = f"no {RUN}" if not (folder / RUN).is_file() else "no checkpoint"
        raise TrainError(
            f"the decoder of {run} is not there: {folder} has {lacks}",
            expected=f"a pretraining's folder with {RUN} and {checkpoint.FOLDER}/: "
            "encoder.safetensors alone cannot predict the teacher's features",
            fix="the folder that milan pretrain wrote, or published:FILE",
        )
    content = read_run(folder)
    settings, targets = content["config"], content.get("targets")
    if not targets or not issubclass(objective_class(settings["objective"]), FeatureRegression):
        raise ConfigError(
            f"{run} does not predict the teacher's features"
            + (f" (objective {settings['objective']})" if targets else ""),
            expected="a pretraining with objective milan",
            fix="milan pretrain --objective milan, which leaves one",
        )
    law = Channels.if_any(content.get(CHANNELS) or targets.get(CHANNELS))
    config = config_of(folder)
    if config.loss == "relation":
        raise ConfigError(
            f"{run} predicts how tokens are related, not the teacher's features (loss relation)",
            expected="a pretraining whose predictions are features",
            fix="a run with --loss cosine or smooth-l1",
        )
    student = build_student(
        settings["model"],
        img_size=as_size(targets["image_size"]),
        target_width=targets["width"],
        decoder_kind=settings["decoder_kind"],
        model_args=settings["model_args"],
        decoder=decoder_of(folder),
        seed=drawn or 0,
    )
    add_deep_decoders(student, supervised_blocks(config))
    if drawn is None:
        _load_newest(folder, student, progress)
    student.deep_decoders.clear()
    layers, teacher, heads = settings.get("layer"), targets["teacher"], student.decoder.heads
    store, own, number = settings["cache"], layers, 0
    if heads is not None:  # only one head can be compared with a teacher's texts
        spelled = names_in(layers)
        if layer and layer not in spelled:
            raise ConfigError(
                f"{run} has no layer {layer!r}", expected="one of " + ", ".join(spelled),
                fix=nearest(layer, spelled),
            )  # fmt: skip
        number = spelled.index(layer) if layer else 0
        place, own = layers_of(store, layers)[number]
        store = store if number == 0 else str(place)
        student.decoder.heads, teacher = heads[number : number + 1], teacher[number]
    for digest in digests_of(folder)[number : number + 1]:
        _restore_features(student, config, folder, digest)
    return TrainedStudent(
        student.eval().requires_grad_(False), store, own, teacher,
        learns_class_token(config), config.predict != "masked", law,
    )  # fmt: skip


def _restore_features(student: Student, config: PretrainConfig, run: Path, digest: str) -> None:
    """Let the decoder predict the teacher's features in place of normalised ones. Raises
    TrainError."""
    statistics = find_digest(run / FOLDER, digest)
    if statistics is None:
        raise TrainError(
            f"the target statistics {digest[:12]} of {run} are not in its folder {FOLDER}/",
            fix="a copy of that folder",
        )
    assert config.target_norm is not None
    affine, several = Affine(config.target_norm, statistics), student.decoder.heads
    last: Any = student.decoder.pred if several is None else several[0].mlp.fc2  # type: ignore
    back, mean = torch.from_numpy(affine.back), torch.from_numpy(affine.mean)
    with torch.no_grad():
        last.weight.copy_(back @ last.weight)
        last.bias.copy_(back @ last.bias + mean)


def load_trained(
    run: Path, cache: TargetCache, device: torch.device, progress: Progress | None = None
) -> tuple[Student, Objective]:
    """The student of a run on its store, of any objective, by its newest checkpoint, in eval mode.

    Raises TrainError for a run without a checkpoint.
    """
    config = config_of(run)
    settings = resolve_defaults(replace(config, cache=str(cache.path)), device)
    student = student_of(settings, cache, decoder=decoder_of(run))
    objective = settings.whole().objective(cache)
    for part, digest in zip(objective.normalised_by, digests_of(run), strict=True):
        if statistics := find_digest(run / FOLDER, digest):
            settle(part, statistics)
    _load_newest(run, student, progress)
    return student.to(device).eval().requires_grad_(False), objective


def config_of(run: Path) -> PretrainConfig:
    """The settings of a pretraining, every default filled in."""
    settings, names = read_run(run)["config"], {field.name for field in fields(PretrainConfig)}
    return PretrainConfig(**{name: value for name, value in settings.items() if name in names})


def _load_newest(run: Path, student: Student, progress: Progress | None) -> None:
    step = checkpoint.newest(run, note=(progress or NoProgress()).note)
    if step is None:
        raise TrainError(f"{run} has no checkpoint")
    checkpoint.load_weights(run, step, student)
