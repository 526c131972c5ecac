"""Teachers `timm:local-dir:FOLDER`: a ViT in a folder that timm opens, with config and weights.

`milan export --format timm` writes such folders, so that one student can teach another.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import timm
from timm.models import PretrainedCfg

from milan.errors import TeacherError
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.text_tower import no_texts
from pipeline.teachers.timm_vit import Found, build, check_module
from pipeline.teachers.towers import Family, Loaded
from pipeline.teachers.weights import FOLDER, Weights, read_weights, stated_licence

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def load_timm_folder(spec: TeacherSpec) -> Loaded:
    """Build the ViT of a folder with its weights, or those of `spec.pretrained`: a file, or `none`.

    Raises TeacherError: no such folder, weights that do not fit to the last tensor, a model without
    usable tokens, and for texts, which it has not.
    """
    if spec.texts:
        raise no_texts(f"--teacher {spec.name}")
    model, args, cfg = _config(spec.name)
    check_module(spec.name, model)
    file = _file(spec)
    if file is None:
        return build(spec, model, cfg, Found(None, "none", "none (random weights)"), args)
    return build(spec, model, cfg, Found(read_weights(file), file.name, stated_licence(file)), args)


def _config(name: str) -> tuple[str, dict[str, Any], PretrainedCfg]:
    """(timm's model, its arguments, timm's config of the weights). Raises TeacherError."""
    path = _folder(name) / _CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, args = content["architecture"], dict(content.get("model_args") or {})
        known = {field.name for field in fields(PretrainedCfg)}
        cfg = PretrainedCfg(
            **{k: v for k, v in content["pretrained_cfg"].items() if k in known and v is not None}
        )
        if not timm.is_model(model):
            raise ValueError(f"timm has no model {model!r}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or error
        raise TeacherError(
            f"{path} is no config of a model of timm: {why}",
            expected=f"a folder with {_CONFIG} and {_WEIGHTS}, as timm opens it",
            fix="milan export RUN --format timm --out FOLDER writes one",
        ) from None
    args.pop("num_classes", None)
    return model, args, cfg


def _file(spec: TeacherSpec) -> Path | None:
    """The file of the weights; None: random ones. Raises TeacherError if it is not there."""
    if spec.pretrained == "none":
        return None
    file = Path(spec.pretrained).expanduser() if spec.pretrained else _folder(spec.name) / _WEIGHTS
    if not file.is_file():
        raise TeacherError(
            f"no weights at {file}",
            expected=f"{_WEIGHTS} in the folder, or --pretrained FILE",
            fix="--pretrained none (random weights, for tests)",
        )
    return file


def _folder(name: str) -> Path:
    return Path(name.removeprefix(FOLDER)).expanduser()


def weights_of(spec: TeacherSpec) -> Weights:
    """Where `load_timm_folder` takes the weights from. Raises TeacherError."""
    _config(spec.name)
    return Weights(spec.name, _file(spec))


FAMILY: Final = Family(lambda name: name.startswith(FOLDER), load_timm_folder, weights_of)
