"""Versions of installed packages."""

from functools import cache
from importlib import metadata


@cache
def version(package: str) -> str:
    """That of an installed `package`, by its name on PyPI; its metadata take milliseconds to read.

    Raises importlib.metadata.PackageNotFoundError.
    """
    return metadata.version(package)
