"""The formats: each writes weights and configuration into a folder, and says how they are opened.

Weights of every format are those of `Source.state` under other names (milan.models.layouts).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from milan.core.size import height_width, size_in_words
from milan.errors import ConfigError
from milan.exchange.onnx import write_onnx
from milan.exchange.source import Source
from milan.models.layouts import (
    MMLAB,
    OFFICIAL_DECODER,
    PLAIN,
    TORCHVISION,
    TRANSFORMERS,
    parted,
    renamed,
)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_PTH = "model.pth"
_USUAL_EPS = 1e-6  # of the norms of torchvision's ViT and of MAE's
_USUAL_NORMS: tuple[str, str, tuple[str, ...]] = "", "", ()


@dataclass(frozen=True)
class Written:
    """What a format says in the model card."""

    use: str
    """Python that opens the folder, FOLDER in place of its name."""
    library: str
    """As model cards name it; empty: none."""
    notes: tuple[str, ...] = ()
    """What differs there from the network that was exported."""


def write_timm(source: Source, folder: Path) -> Written:
    """A folder that timm opens by local-dir: and hf-hub:, and transformers by its Auto classes."""
    vit, classes = source.network, list(source.classes)
    config: dict[str, Any] = {
        "architecture": source.model,
        "num_classes": len(classes),
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "model_args": {k: v for k, v in source.args.items() if k != "norm_eps"}
        | {"img_size": source.size},
        "pretrained_cfg": {
            "input_size": [vit.patch_embed.proj.in_channels, *height_width(source.size)],
            "mean": list(source.mean), "std": list(source.std),
            "crop_pct": source.crop_share, "crop_mode": "center", "interpolation": "bicubic",
            "num_classes": len(classes), "pool_size": None, "fixed_input_size": True,
            "first_conv": "patch_embed.proj", "classifier": "head", "custom_load": False,
        },
    }  # fmt: skip
    if classes:
        config["label_names"] = classes
    _json(folder / CONFIG, config)
    save_file(source.state, folder / WEIGHTS, metadata={"format": "pt"})
    kind = "AutoModelForImageClassification" if classes else "AutoModel"
    imports, norms, notes = _USUAL_NORMS
    if "norm_eps" in source.args:  # config.json cannot say it
        imports, norms, notes = _told_norms(vit, "timm", "timm.layers.LayerNorm")
    if source.channels:  # transforms of timm are for pictures
        return Written(
            f"""{imports}import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True{norms}).eval()  # timm 1.0.26 or newer
data = timm.data.resolve_model_data_config(model)  # mean and std of each channel
tokens = model.forward_features(images)  # {source.input}""",
            "timm",
            notes,
        )
    return Written(
        f"""{imports}import timm
from transformers import {kind}  # opens the same folder, if it is installed

model = timm.create_model("local-dir:FOLDER", pretrained=True{norms}).eval()  # timm 1.0.26 or newer
data = timm.data.resolve_model_data_config(model)  # mean, std, size, crop
transform = timm.data.create_transform(**data, is_training=False)
same = {kind}.from_pretrained("FOLDER")""",
        "timm",
        notes,
    )


def write_transformers(source: Source, folder: Path) -> Written:
    """ViTModel, or ViTForImageClassification of a classifier by its class token."""
    vit = _plain(source, "transformers' ViTModel")
    classes = dict(enumerate(source.classes))
    state = renamed(parted(source.state), TRANSFORMERS)
    width, (high, wide) = vit.embed_dim, height_width(source.size)
    config: dict[str, Any] = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
        **_sizes(source, "hidden_size", "num_hidden_layers", "num_attention_heads"),
        "intermediate_size": _hidden(vit), "hidden_act": "gelu", "num_channels": 3,
        "image_size": source.size, "patch_size": vit.patch_embed.patch_size[0],
        "qkv_bias": vit.blocks[0].attn.qkv.bias is not None,
        "layer_norm_eps": _eps(vit), "pooler_act": "linear", "pooler_output_size": width,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "torch_dtype": "float32",
    }  # fmt: skip
    if classes:
        config["id2label"] = {str(i): name for i, name in classes.items()}
        config["label2id"] = {name: i for i, name in classes.items()}
        state = {k if k.startswith("classifier.") else f"vit.{k}": v for k, v in state.items()}
    else:  # else a pooler would be drawn anew at each load: this one hands the class token on
        state["pooler.dense.weight"] = torch.eye(width)
        state["pooler.dense.bias"] = torch.zeros(width)
    _json(folder / CONFIG, config)
    _json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": round(high / source.crop_share)}
        if high == wide else {"height": high, "width": wide},
        "resample": 3, "do_center_crop": high == wide,
        "crop_size": {"height": high, "width": wide},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(source.mean), "image_std": list(source.std),
    })  # fmt: skip
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    kind = "AutoModelForImageClassification" if classes else "AutoModel"
    notes = []
    if high != wide:
        notes.append("The processor squeezes whole images into this shape: cut them to it first.")
    if source.averages:
        notes.append("`pooler_output` is the class token, which the training left alone: take the "
                     "mean of `last_hidden_state[:, 1:]`.")  # fmt: skip
    return Written(
        f"""from transformers import AutoImageProcessor, {kind}

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = {kind}.from_pretrained("FOLDER").eval()""",
        "transformers",
        tuple(notes),
    )


def write_mmpretrain(source: Source, folder: Path) -> Written:
    """A checkpoint for MMPretrain's VisionTransformer, and a config that opens it."""
    vit = _plain(source, "MMPretrain's VisionTransformer", mean=True, scale=True)
    whole = source.state
    head = {name: whole.pop(name) for name in list(whole) if name.startswith("head.")}
    state = renamed(whole, MMLAB, "backbone.")
    state |= {name.replace("head.", "head.fc."): tensor for name, tensor in head.items()}
    torch.save({"meta": {"milan": source.about.get("milan", "")}, "state_dict": state},
               folder / _PTH)  # fmt: skip
    arch = _sizes(source, "embed_dims", "num_layers", "num_heads")
    arch["feedforward_channels"] = _hidden(vit)
    pooled = "avg_featmap" if source.classes and source.averages else "cls_token"
    backbone = {
        "type": "VisionTransformer", "arch": arch, "img_size": source.size,
        "patch_size": vit.patch_embed.patch_size[0],
        "qkv_bias": vit.blocks[0].attn.qkv.bias is not None,
        "out_type": pooled if source.classes else "raw",
        "final_norm": hasattr(vit.norm, "weight"), "norm_cfg": {"type": "LN", "eps": _eps(vit)},
        "layer_scale_init_value": 1e-5 if hasattr(vit.blocks[0].ls1, "gamma") else 0.0,
    }  # fmt: skip
    model: dict[str, Any] = {"type": "ImageClassifier", "backbone": backbone}
    if source.classes:
        model["head"] = {"type": "LinearClsHead", "num_classes": len(source.classes),
                         "in_channels": vit.embed_dim, "topk": (1,)}  # fmt: skip
    pixels = {"mean": [round(255 * m, 4) for m in source.mean],
              "std": [round(255 * s, 4) for s in source.std], "to_rgb": True}  # fmt: skip
    (folder / "config.py").write_text(
        f"model = {model!r}\ndata_preprocessor = {pixels!r}\nclasses = {list(source.classes)!r}\n",
        encoding="utf-8",
    )
    return Written(
        f"""from mmpretrain import get_model

model = get_model("FOLDER/config.py", pretrained="FOLDER/model.pth")
features = model.backbone(images)  # {source.input}""",
        "mmpretrain",
        () if source.classes else ("`out_type='raw'`: class token and patches, after the norm.",),
    )


def write_detectron2(source: Source, folder: Path) -> Written:
    """A checkpoint for detectron2's ViT backbone, as ViTDet's configs name it."""
    vit = _plain(source, "detectron2's ViT", square=True)
    if source.classes:
        raise ConfigError(
            "detectron2 takes a backbone, and this is a classifier",
            expected="a pretraining",
            fix="--format timm",
        )
    state = {f"backbone.net.{k}": v for k, v in source.state.items()
             if not k.startswith(("cls_token", "norm."))}  # fmt: skip
    torch.save({"model": state, "__author__": "milan", "matching_heuristics": False}, folder / _PTH)
    sizes = _sizes(source, "embed_dim", "depth", "num_heads")
    sizes |= {
        "img_size": source.size, "pretrain_img_size": source.size,
        "patch_size": vit.patch_embed.patch_size[0], "mlp_ratio": _hidden(vit) / vit.embed_dim,
        "qkv_bias": vit.blocks[0].attn.qkv.bias is not None, "pretrain_use_cls_token": True,
    }  # fmt: skip
    pixels = {
        "pixel_mean": [round(255 * m, 4) for m in source.mean],
        "pixel_std": [round(255 * s, 4) for s in source.std],
        "input_format": "RGB",
    }
    arguments = "".join(f"    {name}={value!r},\n" for name, value in sizes.items())
    (folder / "config.py").write_text(
        "from functools import partial\n\nimport torch\nfrom detectron2.config import LazyCall as L"
        "\nfrom detectron2.modeling import ViT\n\nnet = L(ViT)(\n" + arguments
        + f"    norm_layer={_norms(vit, 'torch.nn.LayerNorm')},\n)\n"
        + "".join(f"{name} = {value!r}\n" for name, value in pixels.items()),
        encoding="utf-8",
    )  # fmt: skip
    return Written(
        """# in a lazy config of ViTDet: `net` of config.py as model.backbone.net, and
train.init_checkpoint = "FOLDER/model.pth\"""",
        "detectron2",
        ("detectron2's ViT has no class token and no last norm: both are left out, and features "
         "differ from those of the encoder with them.",),
    )  # fmt: skip


def write_torchvision(source: Source, folder: Path) -> Written:
    """A state dict of torchvision's VisionTransformer, and its arguments."""
    vit = _plain(source, "torchvision's VisionTransformer", square=True)
    if vit.blocks[0].attn.qkv.bias is None:
        raise _no_place("torchvision's VisionTransformer", "queries without a bias")
    torch.save(renamed(source.state, TORCHVISION), folder / _PTH)
    sizes = _sizes(source, "hidden_dim", "num_layers", "num_heads")
    _json(folder / CONFIG, {
        "arguments": sizes | {
            "image_size": source.size, "patch_size": vit.patch_embed.patch_size[0],
            "mlp_dim": _hidden(vit), "num_classes": len(source.classes) or 1,
        },
        "mean": list(source.mean), "std": list(source.std), "classes": list(source.classes),
        "crop_share": source.crop_share, "interpolation": "bicubic",
    })  # fmt: skip
    bare = "" if source.classes else "model.heads = torch.nn.Identity()\n"
    imports, norms, notes = _USUAL_NORMS
    if _eps(vit) != _USUAL_EPS:
        imports, norms, notes = _told_norms(vit, "torchvision", "torch.nn.LayerNorm")
    if source.averages:
        notes += ("Its output is the class token, which the training left alone.",)
    return Written(
        f"""{imports}import json
import torch
from torchvision.models import VisionTransformer

arguments = json.load(open("FOLDER/config.json"))["arguments"]
model = VisionTransformer(**arguments{norms})
{bare}model.load_state_dict(torch.load("FOLDER/model.pth", weights_only=True))
model.eval()""",
        "torchvision",
        notes,
    )


def write_official(source: Source, folder: Path) -> Written:
    """The layout of MILAN's and MAE's authors; with the decoder, where the run has it."""
    state = renamed(source.state, PLAIN)
    if source.decoder:
        state |= renamed(source.decoder, OFFICIAL_DECODER)
    torch.save({"model": state}, folder / "checkpoint.pth")
    notes = [] if source.decoder or source.classes else ["There is no decoder in it."]
    if (eps := _eps(source.network)) != _USUAL_EPS:
        notes.append(f"The eps of its norms is {eps:g}, that of the authors' networks 1e-6.")
    return Written(
        """import torch

state = torch.load("FOLDER/checkpoint.pth", weights_only=True)["model"]""",
        "",
        tuple(notes),
    )


Writer = Callable[[Source, Path], Written]
WRITERS: dict[str, Writer] = {
    "timm": write_timm,
    "transformers": write_transformers,
    "mmpretrain": write_mmpretrain,
    "detectron2": write_detectron2,
    "torchvision": write_torchvision,
    "onnx": lambda source, folder: Written(write_onnx(source, folder), "onnx"),
    "official": write_official,
}


# --- what they share ------------------------------------------------------------------------------


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sizes(source: Source, width: str, depth: str, heads: str) -> dict[str, Any]:
    """Width, depth and heads under a library's names."""
    vit = source.network
    return {
        width: vit.embed_dim, depth: len(vit.blocks), heads: vit.blocks[0].attn.num_heads
    }  # fmt: skip


def _eps(vit: Any) -> float:
    """Of all norms."""
    return float(vit.blocks[0].norm1.eps)


def _norms(vit: Any, kind: str) -> str:
    """What makes its norms, in Python; `kind`: the library's class."""
    return f"partial({kind}, eps={_eps(vit):g})"


def _told_norms(vit: Any, library: str, kind: str) -> tuple[str, str, tuple[str, ...]]:
    """(import, argument, note) for a library whose norms have another eps unless it is told."""
    note = f"The eps of its norms is {_eps(vit):g}: without `norm_layer` {library} takes another."
    return "from functools import partial\n\n", f", norm_layer={_norms(vit, kind)}", (note,)


def _hidden(vit: Any) -> int:
    return int(vit.blocks[0].mlp.fc1.out_features)


def _plain(
    source: Source, what: str, *, mean: bool = False, scale: bool = False, square: bool = False
) -> Any:
    """The network, if it is one that `what` can hold. Raises ConfigError.

    `mean`: it may average, for a classifier; `scale`: it may have layer scales; `square`: its
    images must be squares.
    """
    vit = source.network
    for there, part in (
        (bool(source.channels), f"channels {source.channels} in place of RGB"),
        (
            square and not isinstance(source.size, int),
            f"images of {size_in_words(source.size)}",
        ),
        (vit.cls_token is None, "no class token"),
        (vit.reg_token is not None, "registers"),
        (vit.no_embed_class, "a class token without a position"),
        (bool(source.classes) and source.averages and not mean, "the mean of patches with a head"),
        (not source.classes and not hasattr(vit.norm, "weight"), "its norm behind the average"),
        (hasattr(vit.blocks[0].ls1, "gamma") and not scale, "layer scales"),
        (hasattr(vit.norm_pre, "weight"), "a norm before the blocks"),
    ):
        if there:
            raise _no_place(what, part)
    return vit


def _no_place(what: str, part: str) -> ConfigError:
    return ConfigError(
        f"{what} has no place for this network: {part}",
        expected="a plain ViT, of the class token",
        fix="--format timm, which transformers opens too",
    )
