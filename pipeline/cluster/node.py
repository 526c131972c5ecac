"""What one machine of a cluster has, asked by `milan doctor`; imports nothing heavy."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError

from milan.core.paths import as_path
from milan.core.versions import version
from milan.errors import MilanError

PACKAGES = ("milan-pretrain", "ray", "torch")
"""Whose versions have to be the same everywhere."""


def versions() -> dict[str, str]:
    """Of Python and PACKAGES in this process; `none` for one that is not installed."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "none"
    return installed


class Node:
    """Hosted by an actor on each node."""

    def look(self, paths: list[str]) -> tuple[dict[str, str], list[str]]:
        """(versions, those of `paths` that cannot be seen from here)."""
        unseen = []
        for path in paths:
            try:
                seen = as_path(path).exists()
            except (MilanError, OSError):
                seen = False
            if not seen:
                unseen.append(path)
        return versions(), unseen
