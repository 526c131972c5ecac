"""CLIPs of open_clip, by name, hub, folder or config. The only module that imports open_clip.

open_clip is imported inside functions: a teacher of timm does not need it.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from timm.layers import resample_abs_pos_embed
from torch import nn

from milan.core.device import seeded_weights
from milan.core.size import Size, as_size, height_width
from milan.core.waiting import stalled_connections_fail
from milan.errors import TeacherError, nearest
from milan.models.checkpoint_file import CLIP_CONFIG, CLIP_FILES
from milan.models.layouts import OPENAI_KEYS
from pipeline.teachers.spec import DEFAULT_PRETRAINED, DEFAULT_TEACHER, TeacherSpec
from pipeline.teachers.text_tower import TextTower, no_texts
from pipeline.teachers.timm_vit import check_module, check_tiling, known_vits, resize
from pipeline.teachers.towers import Family, Loaded, NativeTower, TimmTower, Tower, refuse
from pipeline.teachers.weights import (
    Weights,
    do_not_fit,
    not_here,
    published_licence,
    read_weights,
    stated_licence,
    weight_file,
)

_PUBLISHED: Final = ("hf-hub:", "local-dir:")
# Keys of vision_cfg that do not change what a frozen tower of given weights and size computes.
_NOT_ARCHITECTURE: Final = (
    "image_size", "patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path",
)  # fmt: skip


@dataclass(frozen=True)
class _Clip:
    """A CLIP as open_clip builds it, with its weights."""

    model: Any
    config: dict
    licence: str
    """Of the weights."""
    notes: list[str]
    tokenizer: Any
    """None unless texts are asked for."""


def _pretrained(spec: TeacherSpec) -> str:
    """The tag, file or `none` that `spec` means; empty for sources that bring their own weights."""
    if spec.name.startswith(_PUBLISHED):
        if spec.pretrained not in (None, "none"):
            raise TeacherError(
                f"--pretrained {spec.pretrained} with --teacher {spec.name}",
                expected="no --pretrained: such a teacher brings its own weights",
            )
        return spec.pretrained or ""
    if spec.pretrained:
        return spec.pretrained
    if spec.name == DEFAULT_TEACHER:
        return DEFAULT_PRETRAINED
    config, _, _ = _local_or_named_config(spec.name, texts=False)  # a name first, then weights
    _check_size(spec.name, config, None)
    raise TeacherError(
        f"--teacher {spec.name} without --pretrained",
        expected="a tag, a weight file, or none",
        fix=_tags(spec.name),
    )


def _tags(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    return "--pretrained " + " or ".join(tags) if tags else "--pretrained FILE.safetensors"


def load_clip(spec: TeacherSpec) -> Loaded:
    """Build the CLIP that `spec` names, with its weights, and take its image tower.

    Raises TeacherError: an unknown name or tag (the nearest are named), weights that are not here
    or do not fit, an image tower without usable tokens.
    """
    pretrained = _pretrained(spec)
    published = spec.name.startswith(_PUBLISHED)
    clip = (_build_published if published else _build_from_config)(spec, pretrained)
    visual, vision = clip.model.visual, clip.config["vision_cfg"]
    # Positions in a file are of its own size: towers are resized once their weights are loaded.
    if "timm_model_name" in vision:
        # As open_clip does, but of the config's size too: a trunk of another size would not run.
        resize(spec.name, visual.trunk, spec.img_size or as_size(visual.image_size))
    elif spec.img_size:
        _resize_native(visual, spec.img_size)
    architecture = {key: vision[key] for key in sorted(vision) if key not in _NOT_ARCHITECTURE}
    if "timm_model_name" not in vision:  # timm's towers run the activation of their own name
        architecture["quick_gelu"] = bool(clip.config.get("quick_gelu", False))
    return Loaded(
        _tower(spec.name, visual), architecture, dict(getattr(visual, "preprocess_cfg", {})),
        Path(pretrained).name if pretrained else "its own", clip.licence, clip.notes,
        TextTower(spec.name, clip.model, clip.tokenizer, clip.config) if clip.tokenizer else None,
    )  # fmt: skip


def _build_published(spec: TeacherSpec, pretrained: str) -> _Clip:
    """A teacher `hf-hub:…` or `local-dir:…`, which brings its config and its weights."""
    import open_clip

    name = spec.name
    config = _published_config(name)
    _check_size(name, config, spec.img_size)
    with seeded_weights(0):
        try:
            with stalled_connections_fail():
                model = open_clip.create_model(
                    name, load_weights=pretrained != "none", require_pretrained=not pretrained,
                    force_patch_dropout=0.0,
                )  # fmt: skip
        except Exception as error:  # pickle, safetensors, torch and the hub: each has its own
            reason = " ".join(str(error).split())[:300]
            raise TeacherError(f"teacher {name} cannot be loaded: {reason}") from None
    return _Clip(model, config, "unknown", [], _tokenizer(name) if spec.texts else None)


def _build_from_config(spec: TeacherSpec, pretrained: str) -> _Clip:
    """A teacher by a name of open_clip or a config file, with the weights of a tag or a file."""
    import open_clip

    name, notes = spec.name, list[str]()
    config, preprocess, source = _local_or_named_config(name, texts=spec.texts)
    _check_size(name, config, spec.img_size)
    state, licence = None, "none (random weights)"
    if pretrained != "none":
        tag = open_clip.get_pretrained_cfg(name, pretrained) if not source else {}
        if tag:
            preprocess = {key: tag[key] for key in ("mean", "std") if key in tag}
            quick = bool(tag.get("quick_gelu", False))
            native = "timm_model_name" not in config["vision_cfg"]
            if native and quick != bool(config.get("quick_gelu", False)):
                config = {**config, "quick_gelu": quick}
                notes.append(
                    f"{pretrained} weights were trained with {'Quick' if quick else 'exact '}GELU: "
                    f"{name} runs it"
                )
            file = _download(name, pretrained, tag, offline=spec.offline)
            licence = published_licence(pretrained)
        else:
            tags = [] if source else open_clip.list_pretrained_tags_by_model(name)
            file = weight_file(name, pretrained, tags)
            licence = stated_licence(file)
        state = read_weights(file)
        if any(key in state for key in OPENAI_KEYS):
            state = {k: v for k, v in state.items() if k not in OPENAI_KEYS}
            if not config.get("quick_gelu", False):
                config = {**config, "quick_gelu": True}
                notes.append(f"{file.name} is of OpenAI's making: {name} runs QuickGELU")
    with tempfile.TemporaryDirectory() as folder, seeded_weights(0):
        # open_clip takes a config only from a folder in the layout of its hub.
        hub_config = {"model_cfg": config, "preprocess_cfg": preprocess}
        Path(folder, CLIP_CONFIG).write_text(json.dumps(hub_config), encoding="utf-8")
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, force_patch_dropout=0.0
            )
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise TeacherError(f"the model config of {name} is not usable: {error}") from None
        tokenizer = None
        if spec.texts:
            tokenizer = _tokenizer(f"local-dir:{folder}" if source else name)
    if state is not None:
        _load_visual(model, state, name, pretrained)
        if spec.texts:
            _load_text(model, state, name, pretrained)
    return _Clip(model, config, licence, notes, tokenizer)


def _tokenizer(name: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # transformers and hub clients raise many kinds
        raise TeacherError(
            f"the tokenizer of {name} cannot be loaded: {' '.join(str(error).split())[:300]}",
            fix="without --texts, or the packages and files that it names",
        ) from None


def architecture_of(name: str) -> dict:
    """The model config of a name of open_clip, hf-hub:…, local-dir:… or a file; no weights.

    Raises TeacherError for one that is not there, or has no text tower.
    """
    published = name.startswith(_PUBLISHED)
    config = _published_config(name) if published else _local_or_named_config(name, texts=True)[0]
    if "text_cfg" not in config:
        raise no_texts(name)
    return config


def text_architecture(name: str) -> dict:
    """The text tower that `architecture_of` has, with the joint width `embed_dim`.

    Raises TeacherError for one that is no transformer of open_clip's own.
    """
    config = architecture_of(name)
    text = config["text_cfg"]
    if "hf_model_name" in text:
        raise TeacherError(
            f"the text tower of {name} is {text['hf_model_name']}",
            expected="a text tower of CLIP's shape",
            fix="--text-tower ViT-B-16-quickgelu",
        )
    defaults = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    joint = {"quick_gelu": config.get("quick_gelu", False), "embed_dim": config["embed_dim"]}
    return defaults | text | joint


def openai_templates() -> tuple[str, ...]:
    """The 80 sentences by which OpenAI's CLIP is measured on ImageNet, with {} for the class."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a model that `architecture_of` finds. Raises TeacherError."""
    if not name.endswith(".json"):
        return _tokenizer(name)
    config = architecture_of(name)
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
        Path(folder, CLIP_CONFIG).write_text(content, encoding="utf-8")
        return _tokenizer(f"local-dir:{folder}")


def _published_config(name: str) -> dict:
    import open_clip

    kind, address = name.split(":", 1)
    try:
        if kind == "local-dir":
            config = json.loads(Path(address, CLIP_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        else:
            config = open_clip.factory._get_hf_config(address)["model_cfg"]
        config["vision_cfg"].keys(), config["embed_dim"]
        return config
    except Exception as error:  # hub clients raise many kinds; all mean: no such teacher here
        raise TeacherError(
            f"teacher {name} cannot be loaded: {type(error).__name__}: {error}",
            expected=f"a folder with {CLIP_CONFIG} and weights"
            if kind == "local-dir"
            else f"{address} on the hub, or in its local cache",
            fix=f"download {address} elsewhere and use --teacher local-dir:FOLDER"
            if kind == "hf-hub"
            else "",
        ) from None


def _local_or_named_config(name: str, *, texts: bool) -> tuple[dict, dict, Path | None]:
    """(model config, preprocessing, its file) of a JSON path or of a name of open_clip."""
    import open_clip

    # Where texts are not needed, the smallest text tower takes the place of the model's own.
    smallest = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    text_config = {} if texts else {"text_cfg": smallest}
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise TeacherError(f"no model config at {name}", expected="an open_clip model config")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            config = content.get("model_cfg", content)
            config["vision_cfg"].keys(), config["embed_dim"]
            if texts and "text_cfg" not in config:
                raise no_texts(f"the model config {name}")
        except (ValueError, KeyError, AttributeError):
            raise TeacherError(
                f"{name} is no open_clip model config",
                expected="JSON with embed_dim, vision_cfg and text_cfg",
            ) from None
        return {**config, **text_config}, content.get("preprocess_cfg", {}), path
    config = open_clip.get_model_config(name)
    if config is None:
        raise TeacherError(
            f"unknown teacher {name!r}",
            expected="an open_clip name, timm:NAME, hf-hub:…, local-dir:… or a config file",
            fix=f"--teacher {_nearest_teacher(name)}",
        )
    return {**config, **text_config}, {}, None


def _nearest_teacher(name: str) -> str:
    """The teacher most like `name`: of open_clip with a tag of its weights, or of timm."""
    import open_clip

    vits = {vit: f"timm:{vit}" for vit in known_vits()}
    clips = {clip for clip, _ in open_clip.list_pretrained() if _may_be_teacher(clip)}
    near = name if name in vits else nearest(name, [*clips, *vits], count=1)
    if near in clips:
        return f"{near} --pretrained {open_clip.list_pretrained_tags_by_model(near)[0]}"
    return vits.get(near, DEFAULT_TEACHER)


def _may_be_teacher(name: str) -> bool:
    import open_clip

    config = open_clip.get_model_config(name)
    try:
        _check_size(name, config, None)
        return not config["vision_cfg"].get("attentional_pool")
    except TeacherError:
        return False


def weights_of(spec: TeacherSpec) -> Weights:
    """Where `load_clip` takes the weights from. Raises TeacherError."""
    import open_clip

    pretrained = _pretrained(spec)
    kind, _, address = spec.name.partition(":")
    if spec.name.startswith(_PUBLISHED):
        if kind == "local-dir":
            return Weights(spec.name, Path(address).expanduser())
        return Weights(spec.name, None, address, CLIP_FILES)
    _, _, source = _local_or_named_config(spec.name, texts=False)
    if pretrained == "none":
        return Weights(spec.name)
    entry = open_clip.get_pretrained_cfg(spec.name, pretrained) if not source else {}
    if not entry:
        tags = [] if source else open_clip.list_pretrained_tags_by_model(spec.name)
        return Weights(spec.name, weight_file(spec.name, pretrained, tags))
    what = f"{pretrained} of {spec.name}"
    repository, file = os.path.split(entry.get("hf_hub", ""))
    if repository:
        return Weights(what, None, repository, (file,) if file else CLIP_FILES)
    url = entry.get("url", "")
    cached = Path("~/.cache/clip").expanduser() / os.path.basename(url)
    return Weights(what, cached) if cached.is_file() else Weights(what, url=url)


def _download(name: str, tag: str, entry: dict, *, offline: bool) -> Path:
    import open_clip

    repository = entry.get("hf_hub", "").rstrip("/")
    url = entry.get("url", "")
    cached = Path("~/.cache/clip").expanduser() / os.path.basename(url) if url else None
    wanted = (
        f"open_clip_model.safetensors of https://huggingface.co/{repository}" if repository else url
    )
    what = f"{tag} of {name}"
    if offline and not repository and cached and not cached.exists():
        raise not_here(what, wanted, offline=True)
    try:
        with stalled_connections_fail():
            return Path(open_clip.pretrained.download_pretrained(entry))
    except Exception as error:  # hub clients raise many kinds; all mean: cannot be downloaded
        raise not_here(what, wanted, offline=offline, error=error) from None


def _load_visual(model: Any, state: dict, name: str, pretrained: str) -> None:
    from open_clip.model import resize_pos_embed

    prefix = "visual."
    try:
        visual = {k: v.float() for k, v in state.items() if k.startswith(prefix)}
        resize_pos_embed(visual, model)  # in float32: there is no interpolation of halves
        visual = {k.removeprefix(prefix): v for k, v in visual.items()}
        model.visual.load_state_dict(visual, strict=True)
    except RuntimeError as error:
        raise do_not_fit(pretrained, name, error) from None


def _load_text(model: Any, state: dict, name: str, pretrained: str) -> None:
    from open_clip.model import convert_to_custom_text_state_dict

    own = [key for key in model.state_dict() if not key.startswith(("visual.", "logit_"))]
    if "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    if not any(key in state for key in own):
        raise no_texts(f"the file {pretrained}")
    text = {key: state[key].float() for key in own if key in state}
    try:
        missing = model.load_state_dict(text, strict=False).missing_keys
        if len(text) < len(own):
            raise RuntimeError("missing " + ", ".join(k for k in missing if k in own))
    except RuntimeError as error:
        raise do_not_fit(pretrained, name, error, tower="text") from None


def _tower(name: str, visual: Any) -> Tower:
    """The tower of a CLIP. Raises TeacherError for one without usable tokens."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer):
        return NativeTower(name, visual)
    if not isinstance(visual, TimmModel):
        refuse(name, f"its image tower is a {type(visual).__name__}")
    trunk: Any = visual.trunk
    return TimmTower(name, visual, trunk, visual.head, trunk.global_pool)


def _check_size(name: str, config: dict, size: Size | None) -> None:
    """Refuse towers that cannot be used before they are built, and sizes that patches do not tile.

    Raises TeacherError.
    """
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        check_module(name, vision["timm_model_name"])
    elif isinstance(vision.get("layers"), list):
        refuse(name, "its image tower is a ResNet")
    elif size and vision.get("patch_size"):
        check_tiling(size, vision["patch_size"])


def _resize_native(visual: Any, size: Size) -> None:
    """Make open_clip's own ViT take images of `size`, as its `force_image_size` does.

    That is decided by the number of positions alone, and 7 x 28 are as many as 14 x 14.
    """
    height, width = height_width(size)
    if (height, width) == tuple(visual.image_size):
        return
    positions = visual.positional_embedding
    grid = (height // visual.patch_size[0], width // visual.patch_size[1])
    new = resample_abs_pos_embed(positions.data[None], list(grid), list(visual.grid_size))[0]
    visual.positional_embedding = nn.Parameter(new, requires_grad=positions.requires_grad)
    visual.image_size, visual.grid_size = (height, width), grid


FAMILY: Final = Family(lambda name: True, load_clip, weights_of)
