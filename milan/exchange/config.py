"""Settings of `milan export`. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

from milan.core.config_fields import check_fields, setting

FORMATS = ("timm", "transformers", "mmpretrain", "detectron2", "torchvision", "onnx", "official")


@dataclass(frozen=True)
class ExportConfig:
    """What `milan export` does."""

    checkpoint: str = "runs/pretrain"
    """The folder of a pretraining or fine-tuning, its .safetensors file, or another library's
    checkpoint."""
    format: str = setting("timm", choices=FORMATS)
    """timm (transformers opens it too), transformers (ViTModel), mmpretrain, detectron2,
    torchvision, onnx, or official (the layout of MILAN's authors)."""
    out: str = "export"
    """The folder to make: weights, configuration, model card."""
    size: int | None = setting(None, unit="pixels", least=1)
    """Edge of the images that it will see; default: as in training. Positions are made for it."""

    def check(self) -> None:
        """Raises ConfigError for the first value out of its range."""
        check_fields(self)
