"""The whole student of a run, encoder and decoder: what predicts the teacher's features."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from milan.config import PretrainConfig
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError, TrainError
from milan.models.student import Student, build_student
from milan.objectives.base import Objective, objective_class
from milan.objectives.features import FeatureRegression
from milan.reporting.run_files import RUN, read_run
from milan.store.cache import TargetCache
from milan.store.joined import layers_of
from milan.training import checkpoint
from milan.training.build import resolve_defaults, student_of
from milan.training.run_store import decoder_of


@dataclass(frozen=True)
class TrainedStudent:
    """A student, and what its run says of the targets that it predicts."""

    student: Student
    """In eval mode, on the CPU."""
    store: str
    """The store that it was trained on, as the run names it."""
    layer: str | None
    """Whose targets of that store; of a run with several teachers the first."""
    teacher: str
    """The teacher's name."""


def load_student(
    run: str | Path, *, drawn: int | None = None, progress: Progress | None = None
) -> TrainedStudent:
    """The student of a run that predicts the teacher's features, by its newest checkpoint.

    `drawn`: a student of the same shape with weights drawn by this seed, as before training. Raises
    ConfigError for a run of another objective, TrainError for one without run.json or checkpoints:
    encoder.safetensors has no decoder.
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
        )
    student = build_student(
        settings["model"],
        img_size=targets["image_size"],
        target_width=targets["width"],
        decoder_kind=settings["decoder_kind"],
        model_args=settings["model_args"],
        decoder=decoder_of(folder),
        seed=drawn or 0,
    )
    if drawn is None:
        _load_newest(folder, student, progress)
    layer, teacher, heads = settings.get("layer"), targets["teacher"], student.decoder.heads
    if heads is not None:  # only one head can be compared with a teacher's texts
        student.decoder.heads, teacher = heads[:1], teacher[0]
        layer = layers_of(settings["cache"], layer)[0][1]
    return TrainedStudent(student.eval().requires_grad_(False), settings["cache"], layer, teacher)


def load_trained(
    run: Path, cache: TargetCache, device: torch.device, progress: Progress | None = None
) -> tuple[Student, Objective]:
    """The student of a run on its store, of any objective, by its newest checkpoint, in eval mode.

    Raises TrainError for a run without a checkpoint.
    """
    config = config_of(run)
    settings = resolve_defaults(replace(config, cache=str(cache.path)), device)
    student = student_of(settings, cache, decoder=decoder_of(run))
    _load_newest(run, student, progress)
    return student.to(device).eval().requires_grad_(False), settings.objective(cache)


def config_of(run: Path) -> PretrainConfig:
    """The settings of a pretraining, every default filled in."""
    settings, names = read_run(run)["config"], {field.name for field in fields(PretrainConfig)}
    return PretrainConfig(**{name: value for name, value in settings.items() if name in names})


def _load_newest(run: Path, student: Student, progress: Progress | None) -> None:
    step = checkpoint.newest(run, note=(progress or NoProgress()).note)
    if step is None:
        raise TrainError(f"{run} has no checkpoint")
    checkpoint.load_weights(run, step, student)
