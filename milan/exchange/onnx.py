"""ONNX: one file that onnxruntime runs, for any number of images at once."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milan.errors import ConfigError
from milan.exchange.source import Source, example

MODEL = "model.onnx"
_LARGEST = 1.8e9  # bytes: a protocol buffer ends at 2 GiB; beyond, weights lie beside it


class _Outputs(nn.Module):
    """What the file gives: logits of a classifier; tokens and pooled features of an encoder."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.vit, self.classifies = source.network, bool(source.classes)

    def forward(self, images: torch.Tensor) -> Any:
        """Images [B, channels, H, W], normalised."""
        if self.classifies:
            return self.vit(images)
        tokens = self.vit.forward_features(images)
        return tokens, self.vit.forward_head(tokens, pre_logits=True)


def write_onnx(source: Source, folder: Path) -> str:
    """Write model.onnx, with mean, std and names of classes in its metadata; how it is opened.

    Raises ConfigError where onnx and onnxscript are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ConfigError(
            f"no {error.name}",
            expected="onnx and onnxscript",
            fix="pip install 'milan-pretrain[export]'",
        ) from None
    names = ["logits"] if source.classes else ["tokens", "pooled"]
    weights = sum(p.numel() * p.element_size() for p in source.network.parameters())
    path = folder / MODEL
    quiet = logging.getLogger("torch.onnx")
    before = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Outputs(source).eval(), (example(source),), str(path), dynamo=True,
                input_names=["images"], output_names=names, verbose=False,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=weights > _LARGEST,
            )  # fmt: skip
    finally:
        quiet.setLevel(before)
    file = onnx.load(str(path), load_external_data=False)
    pooled = "mean of patches" if source.averages else "class token"
    about = {
        "mean": source.mean, "std": source.std, "size": source.size,
        "crop_share": source.crop_share, "interpolation": "bicubic",
        "classes": source.classes, "pooled": pooled, "channels": source.channels or "rgb",
    }  # fmt: skip
    onnx.helper.set_model_props(file, {k: json.dumps(v) for k, v in about.items()})
    path.write_bytes(file.SerializeToString())
    return f"""import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/{MODEL}")
# {source.input}
{", ".join(names)} = session.run(None, {{"images": images}})  # numpy arrays"""
