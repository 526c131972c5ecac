"""The public names of milan: pretraining on cached targets, and what it leaves behind.

Names load on first use, so that `import milan` costs nothing and `milan --help` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from milan.version import __version__

if TYPE_CHECKING:
    from milan.config import PretrainConfig
    from milan.core.progress import NoProgress
    from milan.data.dataset import CachedDataset, open_cache
    from milan.errors import MilanError
    from milan.evaluation.config import (
        DetectConfig,
        EvaluationConfig,
        FinetuneConfig,
        SegmentConfig,
    )
    from milan.evaluation.evaluate import evaluate
    from milan.evaluation.linear_probe import linear_probe
    from milan.exchange.config import ExportConfig
    from milan.exchange.export import export
    from milan.inference.neighbours import neighbours
    from milan.inference.predict import predict
    from milan.models.classifier import load_classifier
    from milan.models.detector import find_boxes, load_detector
    from milan.models.export import load_encoder
    from milan.models.published import load_published
    from milan.models.segmenter import load_segmenter, predict_masks
    from milan.reporting.contact_sheet import contact_sheet
    from milan.reports.page import report
    from milan.store.cache import TargetCache
    from milan.training.detect import detect
    from milan.training.finetune import finetune
    from milan.training.pretrain import pretrain
    from milan.training.segment import segment

    # For type checkers alone: milan never imports the pipeline, it loads these by name.
    from pipeline.config import ExtractConfig
    from pipeline.embed import embed
    from pipeline.extract import extract_targets
    from pipeline.repair import repair
    from pipeline.verify import verify
    from pipeline.zero_shot import zero_shot

_HOME = {
    "CachedDataset": "milan.data.dataset",
    "DetectConfig": "milan.evaluation.config",
    "EvaluationConfig": "milan.evaluation.config",
    "ExportConfig": "milan.exchange.config",
    "ExtractConfig": "pipeline.config",
    "FinetuneConfig": "milan.evaluation.config",
    "MilanError": "milan.errors",
    "NoProgress": "milan.core.progress",
    "PretrainConfig": "milan.config",
    "SegmentConfig": "milan.evaluation.config",
    "TargetCache": "milan.store.cache",
    "contact_sheet": "milan.reporting.contact_sheet",
    "detect": "milan.training.detect",
    "embed": "pipeline.embed",
    "evaluate": "milan.evaluation.evaluate",
    "export": "milan.exchange.export",
    "extract_targets": "pipeline.extract",
    "find_boxes": "milan.models.detector",
    "finetune": "milan.training.finetune",
    "linear_probe": "milan.evaluation.linear_probe",
    "load_classifier": "milan.models.classifier",
    "load_detector": "milan.models.detector",
    "load_encoder": "milan.models.export",
    "load_published": "milan.models.published",
    "load_segmenter": "milan.models.segmenter",
    "neighbours": "milan.inference.neighbours",
    "open_cache": "milan.data.dataset",
    "predict": "milan.inference.predict",
    "predict_masks": "milan.models.segmenter",
    "pretrain": "milan.training.pretrain",
    "repair": "pipeline.repair",
    "report": "milan.reports.page",
    "segment": "milan.training.segment",
    "verify": "pipeline.verify",
    "zero_shot": "pipeline.zero_shot",
}
_SHOW_PROGRESS = (
    "extract_targets",
    "pretrain",
    "linear_probe",
    "evaluate",
    "finetune",
    "detect",
    "predict",
    "embed",
    "export",
    "neighbours",
    "report",
    "segment",
    "zero_shot",
    "verify",
    "repair",
)

__all__ = [
    "extract_targets",
    "ExtractConfig",
    "verify",
    "repair",
    "open_cache",
    "TargetCache",
    "CachedDataset",
    "contact_sheet",
    "pretrain",
    "PretrainConfig",
    "load_encoder",
    "export",
    "ExportConfig",
    "load_published",
    "linear_probe",
    "evaluate",
    "EvaluationConfig",
    "finetune",
    "FinetuneConfig",
    "load_classifier",
    "detect",
    "DetectConfig",
    "load_detector",
    "find_boxes",
    "predict",
    "embed",
    "neighbours",
    "zero_shot",
    "report",
    "segment",
    "SegmentConfig",
    "load_segmenter",
    "predict_masks",
    "NoProgress",
    "MilanError",
    "__version__",
]


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # a type checker would take any name for right

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'milan' has no attribute {name!r}")
        from milan.core.beside import ours
        from milan.core.progress import shown

        with ours():
            value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value = shown(value) if name in _SHOW_PROGRESS else value
        return value
