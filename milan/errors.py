"""All error types. A message says what was found, what was expected and what to type next.

MilanError            exit code 1, one message, no traceback
├── DataError         images, manifests, data sets; a remote store that does not answer
│   └── MachineError  the machine, a disk or the network fails: nothing is said about the data
├── TeacherError      the frozen teacher: its name, weights, shape
├── CacheError        a store that is missing, incomplete, damaged or another's
├── ConfigError       parameters and model arguments
└── TrainError        a run that cannot go on
RankError             ranks that cannot meet or lost each other: exit code 1, one message; it counts
                      as a crash, since a restart may help
ImageFault            one image that cannot be read; a reason in a record, not the end of a run
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MilanError(Exception):
    """An error a user can fix: what was `found`, what was `expected`, and what to type (`fix`)."""

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found]
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"try: {fix}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple:
        # Exceptions cross process borders (loader workers, Ray); keyword arguments must survive.
        return (_rebuild, (type(self), self.found, self.expected, self.fix))


def _rebuild(kind: type[MilanError], found: str, expected: str, fix: str) -> MilanError:
    return kind(found, expected=expected, fix=fix)


class DataError(MilanError):
    """Images or a manifest that cannot be used."""


class MachineError(DataError):
    """The machine, a disk or the network fails while data are read; the same line may succeed."""


class TeacherError(MilanError):
    """A teacher that is unknown, unsafe to load or of a shape that does not fit."""


class CacheError(MilanError):
    """A store that is missing, incomplete, damaged or written by something else."""


class ConfigError(MilanError):
    """A parameter that is unknown or out of range."""


class TrainError(MilanError):
    """A training run that cannot go on."""


class RankError(Exception):
    """This rank cannot reach the others: most likely because one of them crashed."""


class ImageFault(Exception):
    """One image that cannot be read. `reason` is a short code, stored in records and counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple:
        return (ImageFault, (self.reason, self.detail))


def none_readable(of: str, why: str = "") -> DataError:
    """Of images none of which can be read: where they are, and `why` the first cannot be."""
    return DataError(
        f"no image of {of} can be read" + (f": {why}" if why else ""),
        expected="images that another program can open",
        fix="copy them anew",
    )


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """The names most like `name`, as a phrase for an error's `fix`; empty if none is near."""
    known = list(known)
    part = name.lower()
    close = [k for k in known if len(part) > 2 and part in k.lower()]  # dinov2, vit_base
    close = sorted(close, key=lambda k: (not k.lower().startswith(part), len(k)))[:count]
    if not close:
        close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if not close:
        lowered = {k.lower(): k for k in known}
        close = [
            lowered[k]
            for k in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.4)
        ]
    return " or ".join(close)
