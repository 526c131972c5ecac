"""The public names of milan: pretraining on cached targets, and what it leaves behind.

Names load on first use, so that `import milan` costs nothing and `milan --help` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from milan.version import __version__

if TYPE_CHECKING:
    from milan.config import PretrainConfig
    from milan.data.dataset import CachedDataset, open_cache
    from milan.errors import MilanError
    from milan.evaluation.linear_probe import linear_probe
    from milan.evaluation.protocols import EvaluationConfig
    from milan.models.export import load_encoder
    from milan.models.published import load_published
    from milan.store.cache import TargetCache
    from milan.training.pretrain import pretrain

_HOME = {
    "CachedDataset": "milan.data.dataset",
    "EvaluationConfig": "milan.evaluation.protocols",
    "MilanError": "milan.errors",
    "PretrainConfig": "milan.config",
    "TargetCache": "milan.store.cache",
    "linear_probe": "milan.evaluation.linear_probe",
    "load_encoder": "milan.models.export",
    "load_published": "milan.models.published",
    "open_cache": "milan.data.dataset",
    "pretrain": "milan.training.pretrain",
}

__all__ = [
    "open_cache",
    "TargetCache",
    "CachedDataset",
    "pretrain",
    "PretrainConfig",
    "load_encoder",
    "load_published",
    "linear_probe",
    "EvaluationConfig",
    "MilanError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'milan' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
