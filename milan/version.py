"""The version of milan, read without importing anything else, and those of other packages."""

from functools import cache

__version__ = "1.0.0"


@cache
def installed_version(package: str) -> str:
    """Of an installed `package`, by its name on PyPI; its metadata take milliseconds to read."""
    from importlib.metadata import version

    return version(package)
