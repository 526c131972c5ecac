"""Zero-shot of a student that has a text tower of its own (RILS): its images against its texts.

B images, N patches, P classes, M templates, D joint width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from milan.core.device import MEAN, STD, normalise
from milan.core.size import as_size
from milan.errors import ConfigError, TrainError
from milan.evaluation.config import ZeroShotConfig
from milan.evaluation.frozen import MEAN_OF_PATCHES, Frozen
from milan.images.channels import Channels
from milan.models.export import CHANNELS, ENCODER, read_about
from milan.models.rils import RilsStudent, load_rils
from milan.objectives.base import objective_class
from milan.objectives.rils import WEIGHTS, SentenceReconstruction
from milan.reporting.run_files import RUN, read_run
from milan.store.cache import TargetCache
from milan.training.trained import TrainedStudent
from pipeline.teachers.load import load_teacher
from pipeline.teachers.no_teacher import PREFIX
from pipeline.teachers.spec import DEFAULT_TEACHER, TeacherSpec
from pipeline.teachers.text_tower import TEMPLATES

_TEXTS = 256  # a forward pass


def joint_student(checkpoint: str) -> TrainedStudent | None:
    """The student of a RILS run, or of a file in RILS's layout; None if `checkpoint` is neither.

    Raises TrainError for a run that has not left it yet, ConfigError for a file that does not fit.
    """
    path = Path(checkpoint)
    if path.is_file() and path.name not in (ENCODER, WEIGHTS):
        return TrainedStudent(load_rils(path).requires_grad_(False), "", None, "")
    folder = path.parent if path.is_file() else path
    settings: dict[str, Any] = {}
    if (folder / RUN).is_file():
        settings = read_run(folder)["config"]
        if not issubclass(objective_class(settings["objective"]), SentenceReconstruction):
            return None
    file = folder / WEIGHTS
    if not file.is_file():
        if not settings:
            return None
        raise TrainError(
            f"no {WEIGHTS} in {folder}",
            expected="a run that has ended, or was stopped: it leaves the student there",
            fix="the run's milan pretrain line",
        )
    about = read_about(folder) if (folder / ENCODER).is_file() else {}
    student = load_rils(file).requires_grad_(False)
    if settings and not student.tokenizer:
        raise ConfigError(
            f"{file} does not say how many heads its towers have",
            expected="one that this version wrote",
            fix="the run's milan pretrain line: it writes it anew",
        )
    return TrainedStudent(
        student, settings.get("cache", ""), settings.get("layer"), "",
        channels=Channels.if_any(about.get(CHANNELS)),
    )  # fmt: skip


def class_texts(
    student: RilsStudent, names: list[str], cache: TargetCache | None, config: ZeroShotConfig
) -> torch.Tensor:
    """Unit vectors [P, D] of classes: the mean over templates, by the student's text tower.

    Token ids are the store's, where it has all classes by the templates that are asked for; else
    they come from the tokenizer of the store, or of `config.teacher`. Raises MilanError.
    """
    ids = _token_ids(student, names, cache, config)
    count, templates, length = ids.shape
    shape = student.text.shape
    if length > shape.context or int(ids.max()) >= shape.vocabulary:
        raise ConfigError(
            f"texts of {length} tokens with ids up to {int(ids.max()):,}, and {config.checkpoint} "
            f"reads {shape.context} of up to {shape.vocabulary - 1:,}",
            expected="the tokenizer that it was trained with",
            fix="without --cache and --teacher, or those of its training",
        )
    with torch.inference_mode():
        parts = [F.normalize(student.text(part), dim=1) for part in ids.flatten(0, 1).split(_TEXTS)]
    return F.normalize(torch.cat(parts).view(count, templates, -1).mean(dim=1), dim=1)


def _token_ids(
    student: RilsStudent, names: list[str], cache: TargetCache | None, config: ZeroShotConfig
) -> torch.Tensor:
    """[P, M, L] int32."""
    spec = cache.spec.texts if cache else None
    if cache and spec:
        _check_tokenizer(student, spec["tokenizer"], cache.path, config)
        prototypes = cache.prototypes if config.templates == "stored" else None
        if prototypes and not set(names) - set(prototypes.classes):
            at = [prototypes.classes.index(name) for name in names]
            if (ids := torch.from_numpy(prototypes.ids[at])).min() >= 0:
                return ids
    if config.teacher or not (cache and spec):
        name = config.teacher or DEFAULT_TEACHER
    else:
        name = TeacherSpec.recorded(cache.generations[0].origin["teacher"]).name
    tower = load_teacher(TeacherSpec(PREFIX + name.removeprefix(PREFIX), texts=True)).texts
    assert tower is not None
    _check_tokenizer(student, tower.identity["tokenizer"], name, config)
    made = tower.prototypes(names, templates_of(config.templates))
    return torch.from_numpy(made["prototypes/ids"])


def templates_of(name: str) -> tuple[str, ...]:
    """The sentences of a class: those that stores have, or the 80 of OpenAI's CLIP."""
    if name == "stored":
        return TEMPLATES
    from pipeline.teachers.clip import openai_templates

    return openai_templates()


def _check_tokenizer(student: RilsStudent, theirs: str, of: Any, config: ZeroShotConfig) -> None:
    """Raises ConfigError for a tokenizer that is known not to be the student's."""
    if student.tokenizer and theirs != student.tokenizer:
        raise ConfigError(
            f"the tokenizer of {of} is not the one that {config.checkpoint} was trained with",
            expected="the same tokenizer: ids of another are other words",
            fix="without --cache and --teacher, or those of its training",
        )


def joint_view(student: RilsStudent, name: str, channels: Channels | None) -> Frozen:
    """The student as an evaluation sees it: an image is the mean of its patches, before these are
    scaled to length 1, as in its training. `channels`: what it sees in place of RGB."""

    def patches(pixels: torch.Tensor) -> torch.Tensor:
        images = pixels if channels else normalise(pixels, MEAN, STD)
        return student.encode_patches(images).float()

    return Frozen(
        lambda pixels: patches(pixels).mean(dim=1),
        as_size(student.encoder.patch_embed.img_size),
        name,
        None,
        lambda pixels: (None, patches(pixels)),
        (MEAN_OF_PATCHES,),
        directions=False,
        channels=channels,
    )
