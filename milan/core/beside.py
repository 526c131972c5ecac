"""The packages that are installed beside `milan`, `pipeline` and `stages`, told from another's.

Their names are common words. A program may have a package or a folder of its own called so, which
Python searches first. Both can be used in one process: within `ours` the names mean the packages in
the folder that milan itself is in, outside what they mean to the program. For the same reason
neither has an `__init__.py`: an installed one would hide a program's folder that has none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parents[2]
_PACKAGES = ("pipeline", "stages")
_set_aside: dict[str, dict[str, ModuleType]] = {package: {} for package in _PACKAGES}
"""Modules of ours, by package, while another's have their names."""


@contextmanager
def ours() -> Iterator[None]:
    """In the block `import pipeline` and `import stages` give ours. Not for several threads."""
    theirs = {p: _take(p) for p in _PACKAGES if not _is_ours(sys.modules.get(p))}
    for package in theirs:
        sys.modules.update(_set_aside[package] or {package: _load(package)})
    try:
        yield
    finally:
        for package, modules in theirs.items():
            taken = _take(package)
            if not modules and _is_ours(find_spec(package)):  # nobody else uses the name
                modules = taken
            _set_aside[package] = taken
            sys.modules.update(modules)


def _take(package: str) -> dict[str, ModuleType]:
    """Remove what is imported of a package; name -> module."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def _is_ours(package: object) -> bool:
    """Whether a package, or its spec, is looked for first in the folder that milan is in."""
    folders = getattr(package, "submodule_search_locations", None) or getattr(
        package, "__path__", []
    )
    return any(Path(folder).resolve().parent == _HERE for folder in list(folders)[:1])


def _load(package: str) -> ModuleType:
    """The package with our folder alone: Python itself would join all folders called so."""
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(_HERE / package)]
    return module_from_spec(spec)
