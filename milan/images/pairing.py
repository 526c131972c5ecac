"""Files that belong to images: of the same name below another folder, whatever their endings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from milan.core.paths import AnyPath, files_below, probe, read_below
from milan.core.retry import described
from milan.errors import DataError, ImageFault
from milan.images.samples import EXTENSIONS

OF_CHANNELS = "channel file"
"""What files beside images are, in words."""


@dataclass(frozen=True)
class FilesBeside:
    """The files of a folder, by name without ending."""

    root: AnyPath
    by_stem: dict[str, list[tuple[str, int | None]]]
    """(path below root, bytes) of those of a name."""
    others: Counter[str]
    """Files of other endings, counted by ending."""

    @classmethod
    def below(cls, root: AnyPath, endings: tuple[str, ...]) -> FilesBeside:
        """The files below `root` that end so, in any case."""
        by_stem: dict[str, list[tuple[str, int | None]]] = {}
        others: Counter[str] = Counter()
        for path, size in files_below(root):
            if path.lower().endswith(endings):
                by_stem.setdefault(stem_of(path), []).append((path, size))
            else:
                others[Path(path).suffix.lower() or "without an ending"] += 1
        return cls(root, by_stem, others)

    def of_images(self, keys: list[str], what: str) -> list[tuple[str, int | None] | None]:
        """(path, bytes) of the file of each image, None where there is none.

        Raises DataError for two files of one image, or two images of one file; `what` the files
        are, in words.
        """
        stems = [stem_of(key) for key in keys]
        for stem in stems:
            if len(self.by_stem.get(stem, ())) > 1:
                paths = " and ".join(sorted(path for path, _ in self.by_stem[stem]))
                raise DataError(
                    f"two {what}s for one image in {self.root}: {paths}", fix="remove one of them"
                )
        if len(set(stems)) < len(stems):
            counts = Counter(stems)
            twice = next(stem for stem in stems if counts[stem] > 1)
            both = " and ".join(key for key, stem in zip(keys, stems, strict=True) if stem == twice)
            raise DataError(
                f"two images have one {what}: {both}", fix=f"rename one, with its {what}"
            )
        return [self.by_stem.get(stem, [None])[0] for stem in stems]


class FilesOfImages:
    """The files of channels of images, by row."""

    def __init__(self, root: AnyPath, keys: list[str]) -> None:
        """`keys` are the images', in order. Raises DataError if there is no such folder."""
        if not root.is_dir():
            raise DataError(
                f"no folder at {root}",
                expected="files of the images' names, whatever their endings",
                fix="--student-data FOLDER",
            )
        self.root = root
        self.paths = FilesBeside.below(root, EXTENSIONS).of_images(keys, OF_CHANNELS)
        """(path below root, bytes) of each row's, None where there is none."""

    def read(self, row: int) -> bytes:
        """The bytes of a row's file. Raises ImageFault, and MachineError."""
        found = self.paths[row]
        if found is None:
            raise ImageFault("missing", f"no file of its name in {self.root}")
        return read_beside(self.root, found[0])


def read_beside(root: AnyPath, path: str) -> bytes:
    """The bytes of a file below `root`. Raises ImageFault, missing or unreadable; MachineError."""
    try:
        return read_below(root, path, size=None)
    except (FileNotFoundError, NotADirectoryError):
        probe(root)
        raise ImageFault("missing", str(root / path)) from None
    except OSError as error:
        raise ImageFault("unreadable", f"{path}: {described(error)}") from None


def stem_of(path: str) -> str:
    """A path without its ending."""
    folder, _, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    return f"{folder}/{stem}" if folder else stem
