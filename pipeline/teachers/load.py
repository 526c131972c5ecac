"""The frozen CLIP that gives targets. The only module that imports open_clip.

Shapes: B views, S pixels an edge, N patches, T = 1 + N tokens with the class token (or what stands
in for it, see pipeline/teachers/towers.py) first, C the joint width of image and text.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from milan.core.device import MEAN, STD, autocast, normalise, pick_device
from milan.errors import TeacherError, nearest
from pipeline.teachers.text_tower import TextTower, no_texts
from pipeline.teachers.timm_vit import load_timm_vit, resize, size_options
from pipeline.teachers.towers import Loaded, NativeTower, TimmTower, Tower, refuse
from pipeline.teachers.weights import (
    do_not_fit,
    go_offline,
    not_here,
    published_licence,
    read_weights,
    shown_name,
    stated_licence,
    weight_file,
    weights_digest,
)

DEFAULT_TEACHER: Final = "ViT-B-16-quickgelu"
DEFAULT_PRETRAINED: Final = "openai"

# What OpenAI's converted checkpoints carry beside weights; their models run QuickGELU.
_OPENAI_KEYS: Final = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher to load, as the user named it."""

    name: str = DEFAULT_TEACHER
    """An open_clip name, `timm:NAME`, `hf-hub:…`, `local-dir:…`, or a model config (JSON)."""
    pretrained: str | None = None
    """A tag of open_clip or timm, a file (.safetensors, or .pt loaded safely), or `none`: random
    weights. Left out it means `openai` for the default teacher, and timm's default for a ViT of
    timm."""
    norm: str | None = None
    """`imagenet` (what the published results used; default of the default teacher) or `own`."""
    img_size: int | None = None
    """Edge in pixels; position embeddings are interpolated. Default: the teacher's own."""
    precision: str = "auto"
    """fp32, bf16 or fp16 (autocast); auto: fp16 on CUDA as published, else fp32."""
    offline: bool = False
    """Never use the network; say which file to place where instead."""
    texts: bool = False
    """Load the text tower as well."""


class Teacher:
    """A loaded tower. `identity` determines its outputs; `about` tells people of its origin."""

    def __init__(
        self,
        tower: Tower,
        *,
        identity: dict,
        about: dict,
        device: torch.device,
        texts: TextTower | None = None,
    ) -> None:
        self.visual: Any = tower.module.to(device).eval().requires_grad_(False)
        self.tower, self.texts = tower, texts
        if texts:
            texts.model.to(device)
        self.identity, self.about, self.device = identity, about, device
        self.size, self.patch, self.channels = tower.size, tower.patch, tower.channels
        self.tokens = 1 + (self.size // self.patch) ** 2

    @torch.inference_mode()
    def targets(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, T, C] and attention [B, N] (> 0) of views, uint8 [B, S, S, 3]; float32."""
        images = torch.as_tensor(pixels).to(self.device)
        norm = self.identity["normalisation"]
        return self.forward(normalise(images, norm["mean"], norm["std"]))

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `targets`, of normalised images [B, 3, S, S], float32."""
        with autocast(self.device, self.identity["precision"]):
            tokens = self.tower.tokens(images)
        return tokens.float(), self.tower.attention()


def load_teacher(spec: TeacherSpec, *, device: str = "auto") -> Teacher:
    """Build and load the teacher that `spec` names. Raises TeacherError, with nearest names."""
    if spec.offline:
        go_offline()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    place, name = pick_device(device), spec.name
    if spec.norm not in (None, "imagenet", "own"):
        raise TeacherError(f"--teacher-norm {spec.norm}", expected="imagenet or own")
    if spec.precision not in ("auto", "fp32", "bf16", "fp16"):
        raise TeacherError(f"--precision {spec.precision}", expected="auto, fp32, bf16 or fp16")
    precision = spec.precision
    if precision == "auto":
        precision = "fp16" if place.type == "cuda" else "fp32"

    with _quiet():
        if name.startswith("timm:"):
            if spec.texts:
                raise no_texts(f"--teacher {name}")
            size, offline = spec.img_size, spec.offline
            found = load_timm_vit(name, spec.pretrained, img_size=size, offline=offline)
        else:
            found = _load_clip(spec)
    tower = found.tower
    choice = spec.norm or ("imagenet" if name == DEFAULT_TEACHER else "own")
    mean, std = (MEAN, STD) if choice == "imagenet" else (found.own["mean"], found.own["std"])
    identity = {
        "weights": weights_digest(tower.module),
        "architecture": found.architecture,
        "channels": tower.channels,
        "image_size": tower.size,
        "patch_size": tower.patch,
        "normalisation": {"mean": [float(m) for m in mean], "std": [float(s) for s in std]},
        "precision": precision,
        **tower.identity(),
    }
    about = {
        "name": shown_name(name),
        "pretrained": found.pretrained,
        "random_weights": spec.pretrained == "none",
        "normalisation": choice,
        "licence": found.licence,
        **tower.about(),
        "notes": found.notes + tower.notes(),
    }
    return Teacher(tower, identity=identity, about=about, device=place, texts=found.texts)


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs on the root logger what milan says itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _pretrained(spec: TeacherSpec) -> str:
    """The weights that `spec` means; empty for sources that bring their own."""
    if spec.name.startswith(("hf-hub:", "local-dir:")):
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
    raise TeacherError(
        f"--teacher {spec.name} without --pretrained",
        expected="a tag, a weight file, or none",
        fix=_tags(spec.name),
    )


def _tags(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    return "--pretrained " + " | ".join(tags) if tags else "--pretrained FILE.safetensors"


def _load_clip(spec: TeacherSpec) -> Loaded:
    pretrained = _pretrained(spec)
    model, config, notes, licence, tokenizer = _build(spec.name, pretrained, spec)
    visual, vision = model.visual, config["vision_cfg"]
    if "timm_model_name" in vision:
        # As open_clip does, but of the config's size too: a trunk of another size would not run.
        resize(spec.name, visual.trunk, spec.img_size or int(visual.image_size[0]))
    unseen = ("image_size", "patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path")
    architecture = {key: vision[key] for key in sorted(vision) if key not in unseen}
    if "timm_model_name" not in vision:  # timm's towers run the activation of their own name
        architecture["quick_gelu"] = bool(config.get("quick_gelu", False))
    return Loaded(
        _tower(spec.name, visual), architecture, dict(getattr(visual, "preprocess_cfg", {})),
        Path(pretrained).name if pretrained else "its own", licence, notes,
        TextTower(spec.name, model, tokenizer, config) if tokenizer else None,
    )  # fmt: skip


def _build(name: str, pretrained: str, spec: TeacherSpec) -> tuple[Any, dict, list[str], str, Any]:
    """(model, its config, notes for the user, licence of the weights, tokenizer if asked for)."""
    import open_clip

    notes: list[str] = []
    options: dict[str, Any] = {"force_patch_dropout": 0.0}
    if name.startswith(("hf-hub:", "local-dir:")):
        config = _published_config(name)
        options |= size_options(name, config, spec.img_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model = open_clip.create_model(
                    name, load_weights=pretrained != "none", require_pretrained=not pretrained,
                    **options,
                )  # fmt: skip
            except Exception as error:  # pickle, safetensors, torch and the hub: each has its own
                told = " ".join(str(error).split())[:300]
                raise TeacherError(f"teacher {name} cannot be loaded: {told}") from None
        return model, config, notes, "unknown", _tokenizer(name, config) if spec.texts else None

    config, preprocess, source = _local_or_named_config(name, texts=spec.texts)
    options |= size_options(name, config, spec.img_size)
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
        if any(key in state for key in _OPENAI_KEYS):
            state = {k: v for k, v in state.items() if k not in _OPENAI_KEYS}
            if not config.get("quick_gelu", False):
                config = {**config, "quick_gelu": True}
                notes.append(f"{file.name} is of OpenAI's making: {name} runs QuickGELU")
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        # The one way to hand open_clip a config: a folder in the layout of its hub.
        whole = {"model_cfg": config, "preprocess_cfg": preprocess}
        Path(folder, "open_clip_config.json").write_text(json.dumps(whole))
        torch.manual_seed(0)
        try:
            model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, **options)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise TeacherError(f"the model config of {name} is not usable: {error}") from None
        tokenizer = None
        if spec.texts:
            tokenizer = _tokenizer(f"local-dir:{folder}" if source else name, config)
    if state is not None:
        _load_visual(model, state, name, pretrained)
        if spec.texts:
            _load_text(model, state, name, pretrained)
    return model, config, notes, licence, tokenizer


def _tokenizer(name: str, config: dict) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(name)
    except Exception as error:  # transformers and hub clients raise many kinds
        raise TeacherError(
            f"the tokenizer of {name} cannot be loaded: {' '.join(str(error).split())[:300]}",
            fix="without --texts, or the packages and files that it names",
        ) from None


def _published_config(name: str) -> dict:
    import open_clip

    kind, where = name.split(":", 1)
    try:
        if kind == "local-dir":
            config = json.loads(Path(where, "open_clip_config.json").read_text())["model_cfg"]
        else:
            config = open_clip.factory._get_hf_config(where)["model_cfg"]
        config["vision_cfg"].keys(), config["embed_dim"]
        return config
    except Exception as error:  # hub clients raise many kinds; all mean: no such teacher here
        raise TeacherError(
            f"teacher {name} cannot be loaded: {type(error).__name__}: {error}",
            expected="a folder with open_clip_config.json and weights"
            if kind == "local-dir"
            else f"{where} on the hub, or in its local cache",
            fix=f"download {where} elsewhere and use --teacher local-dir:FOLDER"
            if kind == "hf-hub"
            else "",
        ) from None


def _local_or_named_config(name: str, *, texts: bool) -> tuple[dict, dict, Path | None]:
    """(model config, preprocessing, its file) of a JSON path or of a name of open_clip."""
    import open_clip

    # Unused, any text tower, also one of another library, becomes the least.
    least = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    replaced = {} if texts else {"text_cfg": least}
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise TeacherError(f"no model config at {name}", expected="an open_clip model config")
        try:
            read = json.loads(path.read_text())
            config = read.get("model_cfg", read)
            config["vision_cfg"].keys(), config["embed_dim"]
            if texts and "text_cfg" not in config:
                raise no_texts(f"the model config {name}")
        except (ValueError, KeyError, AttributeError):
            raise TeacherError(
                f"{name} is no open_clip model config",
                expected="JSON with embed_dim, vision_cfg and text_cfg",
            ) from None
        return {**config, **replaced}, read.get("preprocess_cfg", {}), path
    config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        raise TeacherError(
            f"unknown teacher {name!r}",
            expected="an open_clip name, timm:NAME, hf-hub:…, local-dir:… or a config file",
            fix="--teacher " + (nearest(name, known) or DEFAULT_TEACHER),
        )
    return {**config, **replaced}, {}, None


def _download(name: str, tag: str, entry: dict, *, offline: bool) -> Path:
    import open_clip

    repository = entry.get("hf_hub", "").rstrip("/")
    url = entry.get("url", "")
    held = Path("~/.cache/clip").expanduser() / os.path.basename(url) if url else None
    wanted = (
        f"open_clip_model.safetensors of https://huggingface.co/{repository}" if repository else url
    )
    what = f"{tag} of {name}"
    if offline and not repository and held and not held.exists():
        raise not_here(what, wanted, offline=True)
    try:
        return Path(open_clip.pretrained.download_pretrained(entry))
    except Exception as error:  # hub clients raise many kinds; all mean: not to be had
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
        left = model.load_state_dict(text, strict=False).missing_keys
        if len(text) < len(own):
            raise RuntimeError("missing " + ", ".join(k for k in left if k in own))
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
