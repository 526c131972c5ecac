"""Teachers `timm:NAME` and `timm:NAME.TAG`: ViTs of timm, without their classifier.

C is the ViT's width.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import timm
import torch
from timm.models import (
    PretrainedCfg,
    get_pretrained_cfg,
    load_state_dict_from_hf,
    model_entrypoint,
)
from torch import nn

from milan.core.device import seeded_weights
from milan.core.size import Size, height_width
from milan.core.waiting import stalled_connections_fail
from milan.errors import TeacherError, nearest
from pipeline.teachers.spec import TeacherSpec
from pipeline.teachers.text_tower import no_texts
from pipeline.teachers.towers import Family, Loaded, TimmTower, check_vit, patch_of, refuse
from pipeline.teachers.weights import (
    Weights,
    do_not_fit,
    not_here,
    read_weights,
    stated_licence,
    weight_file,
)

_FILES: Final = ("model.safetensors", "pytorch_model.bin")  # as timm looks for them

# Modules of timm whose models may have tokens. Others are refused before they are built, for some
# have billions of weights.
_MODULES: Final = (
    "vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit", "vitamin",
)  # fmt: skip

# What timm raises for bad settings, and its conversions for the file of another model.
_TIMM_ERRORS: Final = (
    AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def check_module(name: str, model: str) -> None:
    """Refuse the teacher `name` if timm's `model` is of a module without tokens. Builds nothing."""
    if timm.is_model(model):
        package, _, module = model_entrypoint(model).__module__.rpartition(".")
        if package == "timm.models" and module not in _MODULES:
            refuse(name, f"its image tower is timm's {model}")


def known_vits() -> list[str]:
    """The models of timm that may be teachers and have weights, without their tags."""
    names = [name for module in _MODULES for name in timm.list_models(module=module)]
    published = {name.partition(".")[0] for name in timm.list_pretrained()}
    return [name for name in names if name in published]


def load_timm_vit(spec: TeacherSpec) -> Loaded:
    """Build `timm:NAME[.TAG]` with the weights `spec.pretrained`: a tag, a file, or `none`.

    Left out it means the tag of the name, else timm's default. Raises TeacherError: an unknown
    name (the nearest are named), weights that are not here, or that do not fit to the last tensor,
    a model without usable tokens, and for texts, which it has not.
    """
    name = spec.name
    if spec.texts:
        raise no_texts(f"--teacher {name}")
    model, tag, tags, pretrained, cfg = _choice(spec)
    state, label, licence = None, "none", "none (random weights)"
    if pretrained is None:
        label = tag or cfg.tag or "its own"
        state = _published(cfg, f"{label} of {name}", spec.offline)
        licence = cfg.license or "unknown"
    elif pretrained != "none":
        file = weight_file(name, pretrained, tags)
        state, label, licence = read_weights(file), file.name, stated_licence(file)
    return build(spec, model, cfg, Found(state, label, licence))


class Found(NamedTuple):
    """Weights, and where they come from."""

    state: dict[str, torch.Tensor] | None
    """None: random ones are drawn."""
    label: str
    licence: str


def build(
    spec: TeacherSpec, model: str, cfg: Any, weights: Found, args: dict[str, Any] | None = None
) -> Loaded:
    """timm's `model` with its arguments, strictly with `weights`. Raises TeacherError.

    `cfg` is timm's config of these weights: classifier, mean, deviation.
    """
    name, (state, label, licence) = spec.name, weights
    options: dict[str, Any] = dict(args or {})
    if state is not None:
        # Strictly, for without a classifier timm would leave what is missing random.
        heads = [cfg.classifier] if isinstance(cfg.classifier, str) else list(cfg.classifier or ())
        classifier = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
        state = {
            k: v.float() if isinstance(v, torch.Tensor) else v
            for k, v in state.items()
            if k not in classifier
        }
        overlay = {"state_dict": state, "num_classes": 0, "custom_load": False, "label_offset": 0}
        options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    with seeded_weights(0):
        try:
            trunk: Any = timm.create_model(model, num_classes=0, **options)
        except _TIMM_ERRORS as error:
            if state is None:
                raise TeacherError(f"timm cannot build {model}: {error}") from None
            raise do_not_fit(label, name, error) from None
    trunk.pretrained_cfg.pop("state_dict", None)  # a second copy of all weights
    resize(name, trunk, spec.img_size)
    # If there is a class token, it is row 0, even where timm's classifier would average (DINOv3).
    pooling = "token" if getattr(trunk, "cls_token", None) is not None else trunk.global_pool
    tower = TimmTower(name, trunk, trunk, nn.Identity(), pooling)
    own = {"mean": cfg.mean, "std": cfg.std}
    architecture = {"timm_model_name": model} | ({"model_args": args} if args else {})
    return Loaded(tower, architecture, own, label, licence, [])


def _choice(spec: TeacherSpec) -> tuple[str, str, list[str], str | None, Any]:
    """(model, tag, its tags, file or `none` or None: the tag's weights, timm's config of the tag).

    Raises TeacherError.
    """
    name, pretrained = spec.name, spec.pretrained
    model, _, tag = name.removeprefix("timm:").partition(".")
    if not timm.is_model(model):
        near = nearest(model, known_vits()) or "vit_base_patch14_dinov2"
        raise TeacherError(
            f"unknown teacher {name!r}",
            expected="timm:NAME of a ViT",
            fix=" or ".join(f"--teacher timm:{name}" for name in near.split(" or ")),
        )
    check_module(name, model)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise TeacherError(
            f"unknown teacher {name!r}",
            expected=f"a tag of timm:{model}: " + ", ".join(tags),
            fix=f"--teacher timm:{model}." + (nearest(tag, tags, count=1) or tags[0])
            if tags
            else "",
        )
    if pretrained in tags:
        if tag and tag != pretrained:
            raise TeacherError(f"--pretrained {pretrained} with --teacher {name}: two tags")
        tag, pretrained = str(pretrained), None
    cfg = get_pretrained_cfg(f"{model}.{tag}" if tag else model) or PretrainedCfg()
    return model, tag, tags, pretrained, cfg


def weights_of(spec: TeacherSpec) -> Weights:
    """Where `load_timm_vit` takes the weights from. Raises TeacherError."""
    model, tag, tags, pretrained, cfg = _choice(spec)
    what = f"{tag or cfg.tag or 'its own'} of timm:{model}"
    if pretrained == "none":
        return Weights(f"timm:{model}")
    if pretrained is not None:
        return Weights(spec.name, weight_file(spec.name, pretrained, tags))
    if not cfg.hf_hub_id:
        _published(cfg, what, spec.offline)  # raises
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _FILES
    return Weights(what, None, cfg.hf_hub_id, names)


def _published(cfg: Any, what: str, offline: bool) -> dict[str, torch.Tensor]:
    """The weights that `cfg` names, from the hub or its local cache."""
    if not cfg.hf_hub_id:
        if not cfg.url:
            raise TeacherError(
                f"timm knows no weights of {what}",
                expected="--pretrained FILE, or none: random weights",
            )
        raise not_here(what, cfg.url, offline=offline)
    file = cfg.hf_hub_filename or "model.safetensors"
    options = {"filename": file} if cfg.hf_hub_filename else {}
    try:
        with stalled_connections_fail():
            return load_state_dict_from_hf(cfg.hf_hub_id, weights_only=True, **options)
    except Exception as error:  # hub clients raise many kinds; all mean: cannot be downloaded
        wanted = f"{file} of https://huggingface.co/{cfg.hf_hub_id}"
        raise not_here(what, wanted, offline=offline, error=error) from None


def resize(name: str, trunk: Any, size: Size | None) -> None:
    """Make `trunk` take images of `size`; positions are resampled by timm, bicubic.

    None leaves it as it is. Raises TeacherError unless it is a ViT whose patches tile the size.
    """
    check_vit(name, trunk)
    if size is None or height_width(size) == tuple(trunk.patch_embed.img_size):
        return
    check_tiling(size, patch_of(trunk))
    if not hasattr(trunk, "set_input_size"):
        refuse(name, f"this timm cannot resize a {type(trunk).__name__} (--img-size)")
    trunk.set_input_size(img_size=height_width(size))


def check_tiling(size: Size, patch: int) -> None:
    """Raises TeacherError, with the two nearest sizes, unless patches tile images of `size`."""
    for flag, edge in zip(("--img-size", "--img-width"), height_width(size), strict=True):
        if edge % patch:
            low = max(patch, edge // patch * patch)
            raise TeacherError(
                f"{flag} {edge} is not a whole number of the teacher's {patch}-pixel patches",
                fix=f"{flag} {low} or {low + patch}",
            )


FAMILY: Final = Family(lambda name: name.startswith("timm:"), load_timm_vit, weights_of)
