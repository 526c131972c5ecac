"""The public names of milan: pretraining on cached targets, and what it leaves behind.

Names load on first use, so that `import milan` costs nothing and `milan --help` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from milan.version import __version__

if TYPE_CHECKING:
    from milan.cache import TargetCache
    from milan.checkpoint import load_encoder, load_published
    from milan.data import CachedDataset, open_cache
    from milan.errors import MilanError
    from milan.pretraining import pretrain
    from milan.settings import PretrainConfig, ProbeConfig
    from milan.transfer import linear_probe

_HOME = {
    "CachedDataset": "milan.data",
    "MilanError": "milan.errors",
    "PretrainConfig": "milan.settings",
    "ProbeConfig": "milan.settings",
    "TargetCache": "milan.cache",
    "linear_probe": "milan.transfer",
    "load_encoder": "milan.checkpoint",
    "load_published": "milan.checkpoint",
    "open_cache": "milan.data",
    "pretrain": "milan.pretraining",
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
    "ProbeConfig",
    "MilanError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'milan' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
