"""The frozen CLIP tower that gives targets. The only module that imports open_clip.

Shapes: B views, S pixels an edge, N patches, T = 1 + N tokens with the class token first,
C the joint width of image and text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import nn

from milan.device import MEAN, STD, autocast, normalise, pick_device
from milan.errors import TeacherError, nearest
from milan.transfer import Frozen

DEFAULT_TEACHER: Final = "ViT-B-16-quickgelu"
DEFAULT_PRETRAINED: Final = "openai"

# Licences of published weights by the start of open_clip's tag, where the publisher states one.
_LICENCES: Final = {"openai": "MIT", "laion": "MIT", "datacomp": "MIT", "metaclip": "CC-BY-NC-4.0"}
# What OpenAI's converted checkpoints carry beside weights; their models run QuickGELU.
_OPENAI_KEYS: Final = ("input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class TeacherSpec:
    """Which teacher to load, as the user named it."""

    name: str = DEFAULT_TEACHER
    """An open_clip name, `hf-hub:…`, `local-dir:…`, or the path of a model config (JSON)."""
    pretrained: str | None = None
    """A tag of open_clip, a file (.safetensors, or .pt loaded safely), or `none`: random weights.
    Left out it means `openai` for the default teacher."""
    norm: str | None = None
    """`imagenet` (what the published results used; default of the default teacher) or `own`."""
    img_size: int | None = None
    """Edge in pixels; position embeddings are interpolated. Default: the teacher's own."""
    precision: str = "auto"
    """fp32, bf16 or fp16 (autocast); auto: fp16 on CUDA as published, else fp32."""
    offline: bool = False
    """Never use the network; say which file to place where instead."""


class Teacher:
    """A loaded tower. `identity` determines its outputs; `about` tells people of its origin."""

    def __init__(self, visual: Any, *, identity: dict, about: dict, device: torch.device) -> None:
        self.visual: Any = visual.to(device).eval().requires_grad_(False)
        self.identity, self.about, self.device = identity, about, device
        self.size: int = identity["image_size"]
        self.patch: int = identity["patch_size"]
        self.tokens = 1 + (self.size // self.patch) ** 2
        self.channels: int = identity["channels"]
        self._seen: dict[str, torch.Tensor] = {}
        for block in self._blocks():
            if isinstance(block.attn, nn.MultiheadAttention):
                block.attention = partial(_attend, block.attn)
        self._blocks()[-1].register_forward_pre_hook(self._keep_input)
        visual.get_submodule("transformer").register_forward_hook(self._keep_output)

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
            self.visual(images)
            tokens = self.visual.ln_post(self._seen.pop("output")) @ self.visual.proj
        attention = class_attention(self._blocks()[-1], self._seen.pop("input"))
        return tokens.float(), attention

    def _blocks(self) -> Any:
        return self.visual.get_submodule("transformer").get_submodule("resblocks")

    def _keep_input(self, _: nn.Module, args: tuple) -> None:
        self._seen["input"] = args[0]

    def _keep_output(self, _: nn.Module, __: tuple, output: torch.Tensor) -> None:
        self._seen["output"] = output


def _attend(attn: nn.MultiheadAttention, q_x: torch.Tensor, **_: Any) -> torch.Tensor:
    """Self-attention of [B, T, W] by the weights of `attn`.

    nn.MultiheadAttention transposes to [T, B, W] first; under autocast on a CPU its projection of
    that copies the weights once a token, and ViT-B/16 in bf16 takes four times as long as here.
    """
    batch, tokens, width = q_x.shape
    qkv = nn.functional.linear(q_x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.view(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return attn.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def class_attention(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The class token's attention to each patch inside `block`, mean over heads.

    `x` [B, T, W] is the block's input; returns [B, N] float32, strictly positive, not renormalised
    (rows sum to 1 minus the class token's attention to itself). One query row, no second
    attention: q·(W_k y) = (W_k^T q)·y, so the keys are never projected, and the key's bias adds
    the same to every logit of a row, which softmax does not see.
    """
    attn = block.attn
    heads, width = attn.num_heads, x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.layer_norm(
            x.float(),
            (width,),
            block.ln_1.weight.float(),
            block.ln_1.bias.float(),
            block.ln_1.eps,
        )
        weight_q, weight_k, _ = attn.in_proj_weight.float().chunk(3)
        q = y[:, 0] @ weight_q.T + attn.in_proj_bias.float()[:width]  # [B, W]
        q = q.view(-1, heads, width // heads)
        back = torch.einsum("bhd,hdw->bhw", q, weight_k.view(heads, width // heads, width))
        logits = back @ y.transpose(1, 2) * (width // heads) ** -0.5  # [B, heads, T]
        attention = logits.softmax(dim=-1).mean(dim=1)[:, 1:]
    # A softmax tail can underflow; sampling must never meet a zero weight.
    return attention.clamp_min(torch.finfo(torch.float32).tiny)


def load_teacher(spec: TeacherSpec, *, device: str = "auto") -> Teacher:
    """Build and load the teacher that `spec` names. Raises TeacherError, with nearest names."""
    if spec.offline:
        _go_offline()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    place = pick_device(device)
    name, pretrained = spec.name, _pretrained(spec)
    if spec.norm not in (None, "imagenet", "own"):
        raise TeacherError(f"--teacher-norm {spec.norm}", expected="imagenet or own")
    if spec.precision not in ("auto", "fp32", "bf16", "fp16"):
        raise TeacherError(f"--precision {spec.precision}", expected="auto, fp32, bf16 or fp16")
    precision = spec.precision
    if precision == "auto":
        precision = "fp16" if place.type == "cuda" else "fp32"

    with _quiet():
        model, config, notes, licence = _build(name, pretrained, spec)
    visual = model.visual
    _check_native(name, visual)
    own_norm = dict(getattr(visual, "preprocess_cfg", {}))
    choice = spec.norm or ("imagenet" if name == DEFAULT_TEACHER else "own")
    mean, std = (MEAN, STD) if choice == "imagenet" else (own_norm["mean"], own_norm["std"])
    vision = config["vision_cfg"]
    identity = {
        "weights": weights_digest(visual),
        "architecture": {
            key: vision[key] for key in sorted(vision) if key not in ("image_size", "patch_dropout")
        }
        | {"quick_gelu": bool(config.get("quick_gelu", False))},
        "channels": int(visual.proj.shape[1]),
        "image_size": int(visual.image_size[0]),
        "patch_size": int(visual.patch_size[0]),
        "normalisation": {"mean": [float(m) for m in mean], "std": [float(s) for s in std]},
        "precision": precision,
    }
    about = {
        "name": _display_name(name),
        "pretrained": Path(pretrained).name if pretrained else "its own",
        "random_weights": pretrained == "none",
        "normalisation": choice,
        "licence": licence,
        "notes": notes,
    }
    return Teacher(visual, identity=identity, about=about, device=place)


def frozen_teacher(
    name: str | None, pretrained: str | None, norm: str | None, device: str
) -> Frozen:
    """The teacher as a linear probe sees it: class feature and mean of patch features, [B, 2C]."""
    teacher = load_teacher(TeacherSpec(name or DEFAULT_TEACHER, pretrained, norm), device=device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        tokens, _ = teacher.targets(pixels)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    return Frozen(features, teacher.size, f"teacher {teacher.about['name']}")


def weights_digest(visual: nn.Module) -> str:
    """SHA-256 of the image tower's tensors as float32, by name; file formats do not matter."""
    sha = hashlib.sha256()
    for key, tensor in sorted(visual.state_dict().items()):
        sha.update(f"{key}{list(tensor.shape)}".encode())
        sha.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def _display_name(name: str) -> str:
    if not name.endswith(".json"):
        return name
    path = Path(name)
    plain = path.stem in ("config", "open_clip_config")  # then the folder's name says more
    return path.resolve().parent.name if plain else path.stem


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs on the root logger what milan says itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _go_offline() -> None:
    # The hub's client reads its switch once, when it is imported, and timm has imported it.
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True


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


def _build(name: str, pretrained: str, spec: TeacherSpec) -> tuple[Any, dict, list[str], str]:
    """(model, its config, notes for the user, licence of the weights)."""
    import open_clip

    notes: list[str] = []
    options: dict[str, Any] = {"force_patch_dropout": 0.0}
    if spec.img_size:
        options["force_image_size"] = spec.img_size
    if name.startswith(("hf-hub:", "local-dir:")):
        config = _published_config(name, spec)
        _check_config(name, config)
        _check_size(spec.img_size, config)
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
        return model, config, notes, "unknown"

    config, preprocess, source = _local_or_named_config(name)
    _check_config(name, config)
    _check_size(spec.img_size, config)
    state, licence = None, "none (random weights)"
    if pretrained != "none":
        tag = open_clip.get_pretrained_cfg(name, pretrained) if not source else {}
        if tag:
            preprocess = {key: tag[key] for key in ("mean", "std") if key in tag}
            quick = bool(tag.get("quick_gelu", False))
            if quick != bool(config.get("quick_gelu", False)):
                config = {**config, "quick_gelu": quick}
                notes.append(
                    f"{pretrained} weights were trained with {'Quick' if quick else 'exact '}GELU: "
                    f"{name} runs it"
                )
            file = _download(name, pretrained, tag, offline=spec.offline)
            found = [text for key, text in _LICENCES.items() if pretrained.startswith(key)]
            licence = found[0] if found else "unknown"
        else:
            file = _weight_file(name, pretrained, named=not source)
            licence = _stated_licence(file)
        state = _read_weights(file)
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
    if state is not None:
        _load_visual(model, state, name, pretrained)
    return model, config, notes, licence


def _published_config(name: str, spec: TeacherSpec) -> dict:
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


def _local_or_named_config(name: str) -> tuple[dict, dict, Path | None]:
    """(model config, preprocessing, its file) of a JSON path or of a name of open_clip."""
    import open_clip

    # Only the image tower is used: any text tower, also one of another library, becomes the least.
    least = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise TeacherError(f"no model config at {name}", expected="an open_clip model config")
        try:
            read = json.loads(path.read_text())
            config = read.get("model_cfg", read)
            config["vision_cfg"].keys(), config["embed_dim"]
        except (ValueError, KeyError, AttributeError):
            raise TeacherError(
                f"{name} is no open_clip model config",
                expected="JSON with embed_dim, vision_cfg and text_cfg",
            ) from None
        return {**config, "text_cfg": least}, read.get("preprocess_cfg", {}), path
    config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        raise TeacherError(
            f"unknown teacher {name!r}",
            expected="an open_clip name, hf-hub:…, local-dir:… or a config file",
            fix="--teacher " + (nearest(name, known) or DEFAULT_TEACHER),
        )
    return {**config, "text_cfg": least}, {}, None


def _weight_file(name: str, pretrained: str, *, named: bool) -> Path:
    file = Path(pretrained).expanduser()
    if file.is_file():
        return file
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name) if named else []
    near = nearest(pretrained, tags) or " or ".join(tags[:4])
    raise TeacherError(
        f"--pretrained {pretrained} is neither a file nor a tag of {name}",
        expected="a .safetensors or .pt file, a tag, or none",
        fix=f"--pretrained {near}" if near else "",
    )


def _download(name: str, tag: str, entry: dict, *, offline: bool) -> Path:
    import open_clip

    repository = entry.get("hf_hub", "").rstrip("/")
    url = entry.get("url", "")
    held = Path("~/.cache/clip").expanduser() / os.path.basename(url) if url else None
    wanted = (
        f"open_clip_model.safetensors of https://huggingface.co/{repository}" if repository else url
    )
    fix = f"place {wanted} on this machine and use --pretrained FILE"
    if offline and not repository and held and not held.exists():
        raise TeacherError(f"--offline, and the weights {tag} of {name} are not here", fix=fix)
    try:
        return Path(open_clip.pretrained.download_pretrained(entry))
    except Exception as error:  # hub clients raise many kinds; all mean: not to be had
        why = "--offline, and" if offline else f"no network ({type(error).__name__}), and"
        raise TeacherError(f"{why} the weights {tag} of {name} are not here", fix=fix) from None


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    from open_clip.factory import load_state_dict

    try:
        state = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zip and torch each have their own
        first = " ".join(str(error).split())[:160] or "an empty file"
        raise TeacherError(
            f"{file} cannot be loaded safely: {type(error).__name__}: {first}",
            expected="a state dict: .safetensors, or .pt without code in it (no TorchScript)",
        ) from None
    return dict(state)


def _load_visual(model: Any, state: dict, name: str, pretrained: str) -> None:
    from open_clip.model import resize_pos_embed

    prefix = "visual."
    try:
        visual = {k: v.float() for k, v in state.items() if k.startswith(prefix)}
        resize_pos_embed(visual, model)  # in float32: there is no interpolation of halves
        visual = {k.removeprefix(prefix): v for k, v in visual.items()}
        model.visual.load_state_dict(visual, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[:3]]
        raise TeacherError(
            f"the weights {pretrained} do not fit the image tower of {name}: "
            + " ".join(lines)[:300]
        ) from None


def _stated_licence(file: Path) -> str:
    if file.suffix != ".safetensors":
        return "unknown"
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get("licence", "unknown")
    except Exception:  # _read_weights says what is wrong with the file
        return "unknown"


def _check_size(img_size: int | None, config: dict) -> None:
    patch = config["vision_cfg"].get("patch_size")
    if img_size and patch and img_size % patch:
        low = max(patch, img_size // patch * patch)
        raise TeacherError(
            f"--img-size {img_size} is not a whole number of the teacher's {patch}-pixel patches",
            fix=f"--img-size {low} or {low + patch}",
        )


def _check_config(name: str, config: dict) -> None:
    """Refuse by the config what need not be built to be known: some have billions of weights."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        _refuse(name, f"its image tower is timm's {vision['timm_model_name']}")
    if isinstance(vision.get("layers"), list):
        _refuse(name, "its image tower is a ResNet")


def _check_native(name: str, visual: Any) -> None:
    from open_clip.transformer import VisionTransformer

    why = ""
    if not isinstance(visual, VisionTransformer):
        why = f"its image tower is a {type(visual).__name__}"
    elif visual.attn_pool is not None:
        why = "it pools by attention, so ln_post and proj do not apply to its tokens"
    elif visual.image_size[0] != visual.image_size[1]:
        why = f"its images are not square: {visual.image_size}"
    elif visual.image_size[0] % visual.patch_size[0]:
        why = f"{visual.patch_size[0]}-pixel patches do not tile {visual.image_size[0]} pixels"
    elif not isinstance(visual.transformer.resblocks[-1].attn, nn.MultiheadAttention):
        why = "its attention is not a plain one"
    elif not hasattr(visual.transformer.resblocks[-1].ln_1, "eps"):
        why = "its blocks are not pre-norm"
    if why:
        _refuse(name, why)


def _refuse(name: str, why: str) -> NoReturn:
    raise TeacherError(
        f"teacher {name} cannot give targets: {why}",
        expected="a native open_clip ViT with a class token",
        fix=f"--teacher {DEFAULT_TEACHER}",
    )
