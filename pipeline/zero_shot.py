"""`milan zero-shot`: how well a student classifies by words alone, in its teacher's language space.

A CLIP's features, of its class token and of its patches, are in the space of its text tower: they
are what a store keeps (ln_post and proj, docs/cache-format.md). The student predicts them, so its
predictions are compared with the texts of classes without any training. What the encoder itself
outputs is in no such space: the decoder of the run is needed. A student that has a text tower of
its own, RILS's, is compared with that one's texts (pipeline.own_words).

B images, N patches, P classes, C channels.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.core.config_resolver import from_call
from milan.core.device import MEAN, STD, normalise
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.core.size import as_size
from milan.errors import ConfigError, DataError, MilanError
from milan.evaluation.config import ZeroShotConfig
from milan.evaluation.features import Context
from milan.evaluation.frozen import Frozen
from milan.evaluation.protocols import PROTOCOLS
from milan.evaluation.ranks import on_ranks
from milan.images.channels import Channels
from milan.images.splits import TEST, TRAIN, VALIDATION, WantedSplit
from milan.inference.config import ImagesConfig
from milan.inference.pictures import Pictures
from milan.inference.words import Seen, look
from milan.models.masking import Mask
from milan.models.published import load_published
from milan.models.rils import RilsStudent
from milan.models.weights import published_file
from milan.reporting.dense import DenseMap, draw_dense
from milan.reporting.panels import check_apart, save_picture
from milan.store.cache import TargetCache
from milan.store.joined import BETWEEN
from milan.training.trained import TrainedStudent, load_student
from pipeline.own_words import class_texts, joint_student, joint_view, templates_of
from pipeline.teachers.frozen import frozen_view
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec


def zero_shot(
    checkpoint: str | ZeroShotConfig = "runs/pretrain",
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Classify images by the student's predicted features against the texts of their classes.

    `checkpoint` and `settings` are the command's arguments (ZeroShotConfig's fields); the
    checkpoint is a run with its decoder, a run of RILS or a file in RILS's layout, published:FILE,
    random with `like`, or teacher. Returns,
    in percent, top1 and top5 (None with 5 classes and less) of the class token (`token_`, None for
    a student without) and of the mean of all patches, each scaled to length 1 (`mean_`), with 95 %
    intervals; chance, counts, and the same of the teacher as `baseline`, if it is at hand; draws
    the dense maps (`picture`) and writes the tables of the classes. With several GPUs it starts a
    rank for each; ranks after the first return {}. Asked to stop, or by SIGINT, SIGTERM or SIGUSR1,
    it returns {"stopped_by": signal}. Raises MilanError.
    """
    config = from_call(ZeroShotConfig, "checkpoint", checkpoint, settings, "zero_shot")
    config.check()
    return on_ranks(
        partial(_measure, config), config, kept="nothing is written", stop=stop, progress=progress
    )


def _measure(config: ZeroShotConfig, context: Context) -> dict[str, Any]:
    """The metrics; each rank shows its share of the images to networks of its own."""
    progress, device, began = context.progress, context.device, time.perf_counter()
    trained = _student(config, progress)
    cache = _store(config, trained, progress)
    channels = trained.channels if trained else None
    pictures = _pictures(config, channels, context)
    bands = cache.view_spec.colours if cache else channels.bands if channels else None
    check_apart(_picture_of(config), [pictures.place])
    names = _class_names(pictures)
    if trained and isinstance(trained.student, RilsStudent):
        texts = class_texts(trained.student, names, cache, config).to(device)
        networks = [joint_view(trained.student.to(device), config.checkpoint, channels)]
    else:
        networks, texts = _by_teacher(trained, names, cache, config, device, progress)
    # One image of each of the first classes.
    shown = np.unique(pictures.labels, return_index=True)[1][: config.pictures].tolist()
    seen = look(networks, pictures, texts, shown=shown, crop_share=config.crop_share, bands=bands)
    if not context.ranks.is_rank0:
        return {}
    first, *others = [one.figures(len(names)) for one in seen]
    seen[0].outcome(names).write_tables(PROTOCOLS["zero_shot"].tables_folder(config))
    labels = seen[0].labels
    share = np.bincount(labels, minlength=len(names)) / len(labels)
    metrics = {
        "checkpoint": networks[0].name,
        **({"layer": config.layer} if config.layer else {}),
        **first,
        "chance": round(100 / len(names), 2),
        "most_frequent": round(100 * float(share.max()), 2),
        "classes": len(names),
        "images": len(labels),
        "rejected_images": len(pictures.rejected),
        "picture": _draw(networks, seen, names, pictures, shown, config),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if others:
        metrics["baseline"] = {"checkpoint": networks[1].name, **others[0]}
    return metrics


def _by_teacher(
    trained: TrainedStudent | None,
    names: list[str],
    cache: TargetCache | None,
    config: ZeroShotConfig,
    device: torch.device,
    progress: Progress,
) -> tuple[list[Frozen], torch.Tensor]:
    """(the student if there is one, and the teacher if it is at hand; texts [P, C] of the teacher).

    Raises MilanError.
    """
    if cache and not cache.spec.has_targets:
        raise cache.no_targets()
    if cache and cache.spec.teacher.get("block") is not None:
        raise ConfigError(
            f"the layer {cache.layer} has tokens of an inner block of its teacher",
            expected="features of the tower's output, which alone are in the space of texts",
            fix="a run on the output (--layer), or milan knn, which needs no texts",
        )
    prototypes = cache.prototypes if cache else None
    known = prototypes.classes if prototypes and config.templates == "stored" else []
    missing = [name for name in names if name not in known]
    teacher = _teacher(config, cache, missing, device, progress)
    texts = torch.from_numpy(_texts(names, missing, cache, teacher, config)).to(device)
    networks = [frozen_view(teacher)] if teacher else []
    if trained:
        networks.insert(0, _predictor(trained, config, device))
    if not networks:
        raise ConfigError("checkpoint teacher without a teacher", fix="--teacher NAME")
    for network in networks:
        _check_width(network, texts, device)
    return networks, texts


# --- the student, its store, the teacher ----------------------------------------------------------


def _student(config: ZeroShotConfig, progress: Progress) -> TrainedStudent | None:
    """The student that is measured; None for the teacher. Raises MilanError."""
    name = config.checkpoint
    kind, _, file = name.partition(":")
    if name == "teacher":
        return None
    if kind == "timm":
        raise ConfigError(
            f"{name} is an encoder: its features are in no language space",
            expected="a run with its decoder, published:FILE, or teacher",
            fix=f"--checkpoint teacher --teacher {name}, if it is a CLIP of open_clip",
        )
    if kind == "published":
        path = Path(file) if file else published_file(config.model)
        student = load_published(path).requires_grad_(False)
        return TrainedStudent(student, "", None, "")
    if name == "random":
        if not config.like:
            raise ConfigError("checkpoint random without like", fix="--like runs/pretrain")
        return load_student(config.like, drawn=config.seed, layer=config.layer)
    return joint_student(name) or load_student(name, progress=progress, layer=config.layer)


def _store(
    config: ZeroShotConfig, trained: TrainedStudent | None, progress: Progress
) -> TargetCache | None:
    """The store that was named, else the run's. Raises ConfigError for one of another teacher."""
    name = config.cache or (trained.store if trained else "")
    if not name:
        return None
    layer = trained.layer if trained and not config.cache else None
    if config.layer:
        layer = config.layer.rpartition(BETWEEN)[2] or None
    try:
        cache = TargetCache(name, layer=layer)
    except MilanError:
        if config.cache or not config.teacher:
            raise
        progress.note(
            f"the store {name} is not there: --teacher's texts are taken as its teacher's"
        )
        return None
    theirs = cache.attributes["about"]["name"]
    if trained and trained.teacher and trained.teacher != theirs:
        raise ConfigError(
            f"{name} has targets of {theirs}, and {config.checkpoint} predicts those of "
            f"{trained.teacher}",
            expected="a store of the same teacher",
            fix=f"--cache {trained.store}, or --layer, of a store with several",
        )
    return cache


def _teacher(
    config: ZeroShotConfig,
    cache: TargetCache | None,
    missing: list[str],
    device: torch.device,
    progress: Progress,
) -> Teacher | None:
    """The teacher that was named, else the store's if it can be loaded.

    With its text tower, if texts of classes are `missing`. Raises MilanError for one that was named
    and cannot be loaded, or is not the store's; and for one whose texts are needed.
    """
    if config.teacher:
        named = TeacherSpec(
            config.teacher, config.pretrained, config.teacher_norm, texts=bool(missing)
        )
        teacher = load_teacher(named, device=str(device))
        if cache and teacher.identity["weights"] != cache.spec.teacher["weights"]:
            raise ConfigError(
                f"teacher {teacher.about['name']} is not the one whose targets are in {cache.path}",
                expected=f"{cache.attributes['about']['name']}, with the same weights",
                fix="without --teacher",
            )
        return teacher
    if cache is None:
        return None
    try:
        recorded = TeacherSpec.recorded(cache.generations[0].origin["teacher"])
        spec = recorded.as_stored(cache.spec.teacher, texts=bool(missing))
        return load_teacher(spec, device=str(device))
    except MilanError as error:
        if missing:
            raise ConfigError(
                f"{cache.path} has no text of {len(missing)} classes, such as {missing[0]!r}, and "
                f"its teacher gives none: {error.found}",
                expected="a store that was extracted with --texts, or a teacher with a text tower",
                fix="--teacher NAME --pretrained TAG, or milan extract-targets --texts",
            ) from None
        progress.note(f"the teacher is not measured beside: {error.found}; --teacher names it")
        return None


def _texts(
    names: list[str],
    missing: list[str],
    cache: TargetCache | None,
    teacher: Teacher | None,
    config: ZeroShotConfig,
) -> np.ndarray:
    """Unit vectors [P, C] of classes: the store's, else the text tower's. Raises ConfigError."""
    stored = cache.prototypes if cache else None
    if stored and stored.features is not None and not missing:
        number = {name: i for i, name in enumerate(stored.classes)}
        return stored.features[[number[name] for name in names]]
    if teacher and teacher.texts:
        made = teacher.texts.prototypes(names, templates_of(config.templates))
        return made["prototypes/features"]
    raise ConfigError(
        f"{config.checkpoint} comes without texts of classes",
        expected="its store (--cache), or a teacher with a text tower",
        fix="--teacher NAME --pretrained TAG",
    )


def _check_width(network: Frozen, texts: torch.Tensor, device: torch.device) -> None:
    assert network.tokens is not None
    with torch.inference_mode():
        width = network.tokens(network.blank(device))[1].shape[2]
    if width != texts.shape[1]:
        raise ConfigError(
            f"{network.name} gives features of {width} channels, and texts have {texts.shape[1]}",
            expected="texts of the teacher whose features it predicts",
            fix="--cache the store that it was trained on, or --teacher",
        )


# --- what the student predicts --------------------------------------------------------------------


def _predictor(trained: TrainedStudent, config: ZeroShotConfig, device: torch.device) -> Frozen:
    """The student as an evaluation sees it; its tokens are the teacher's features, predicted.

    It sees all patches, so the decoder has nothing to fill in: every token is predicted as visible
    ones are in training. Raises ConfigError for one that did not learn that.
    """
    if not trained.visible:
        raise ConfigError(
            f"{config.checkpoint} has learnt to predict masked patches alone (predict masked)",
            expected="one that predicts what it sees too: whole images are shown to it",
            fix="a run with --predict all, both or visible",
        )
    student = trained.student.to(device)
    law, every = trained.channels, torch.arange(student.patches, device=device)[None]

    def tokens(pixels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        visible = every.expand(len(pixels), -1)
        images = pixels if law else normalise(pixels, MEAN, STD)
        tokens = student(images, Mask(visible, visible[:, :0])).float()
        first = tokens[:, 0] if student.decoder.class_token and trained.class_token else None
        return first, tokens[:, -student.patches :]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        first, patches = tokens(pixels)
        mean = patches.mean(dim=1)
        return mean if first is None else torch.cat([first, mean], dim=1)

    size = as_size(student.encoder.patch_embed.img_size)
    return Frozen(features, size, config.checkpoint, None, tokens, channels=law)


# --- the images -----------------------------------------------------------------------------------


def _pictures(config: ZeroShotConfig, channels: Channels | None, context: Context) -> Pictures:
    """The images to measure on, for a student of `channels`. Raises ConfigError and DataError."""
    if config.val_data is not None:
        data, wanted = config.val_data, WantedSplit(
            config.val_split, (VALIDATION, TEST), "--val-split"
        )  # fmt: skip
    else:
        data, wanted = config.data, WantedSplit(config.split, (VALIDATION, TEST, TRAIN))
    images = ImagesConfig(
        data, config.data_root, limit=config.limit, batch_size=config.batch_size,
        num_workers=config.num_workers, device=config.device,
        student_data=config.student_data if config.val_data is None else config.val_student_data,
    )  # fmt: skip
    return Pictures(images, context, channels=channels, wanted=wanted)


def _class_names(pictures: Pictures) -> list[str]:
    """The names of the classes. Raises DataError for images without one, and for one class."""
    names, labels, data = pictures.classes, pictures.labels, pictures.config.data
    if names is None:
        raise DataError(
            f"{data} has " + ("class numbers" if (labels >= 0).any() else "no labels"),
            expected="class names, which a text tower can read",
            fix="class folders, or Parquet files with the names of `label`",
        )
    if (labels < 0).any():
        at = int(np.flatnonzero(labels < 0)[0])
        raise DataError(
            f"{data} has {int((labels < 0).sum())} images without a label, such as "
            f"{pictures.manifest.key(at)!r}",
            expected="class folders, a `label` column, or .cls members of tars",
            fix="move them elsewhere",
        )
    if len(names) < 2:
        raise DataError(
            f"all images of {data} are of one class",
            expected="at least two classes",
            fix="--val-data with images of several",
        )
    return names


def _draw(
    networks: list[Frozen], seen: list[Seen], names: list[str], pictures: Pictures,
    shown: list[int], config: ZeroShotConfig,
) -> str | None:  # fmt: skip
    """The dense maps of the images that are shown, a row for each network."""
    rows = [row for row in shown if row in seen[0].maps]
    if not rows:
        return None
    numbers = [int(pictures.labels[row]) for row in rows]
    maps = []
    for row in rows:
        caption = f"{pictures.manifest.key(row)} ({names[pictures.labels[row]]})"
        for network, one in zip(networks, seen, strict=True):
            pixels, cosines = one.maps[row]
            maps.append(DenseMap(f"{network.name}: {caption}", pixels, cosines[:, numbers]))
    page = draw_dense(
        f"dense maps of {', '.join(network.name for network in networks)}",
        maps,
        [names[number] for number in numbers],
    )
    return str(save_picture(page, _picture_of(config)))


def _picture_of(config: ZeroShotConfig) -> Path:
    """Where the dense maps go: beside the metrics."""
    return PROTOCOLS["zero_shot"].metrics_path(config).with_suffix(".png")
