"""Files that belong to images: of the same name below another folder, whatever their endings."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from milan.core.paths import AnyPath, as_path, files_below, is_local, probe, read_below
from milan.core.retry import described
from milan.errors import ConfigError, DataError, ImageFault
from milan.images.channels import Channels
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
    """The files of channels that belong to images, by row; none, where no folder was named."""

    def __init__(self, folder: str | None, keys: Sequence[str], *, of: AnyPath) -> None:
        """`keys` are the images', in order, and they lie `of` there. Raises DataError if there is
        no such folder."""
        self.root, self.of = None if folder is None else as_path(folder), of
        self.paths: list[tuple[str, int | None] | None] = []
        """(path below root, bytes) of each row's, None where there is none."""
        if self.root is None:
            return
        if not self.root.is_dir():
            raise DataError(
                f"no folder at {self.root}",
                expected="files of the images' names, whatever their endings",
                fix="--student-data FOLDER",
            )
        files = FilesBeside.below(self.root, EXTENSIONS)
        self.paths = files.of_images(list(keys), OF_CHANNELS)

    def check(self, *networks: Channels | None) -> None:
        """Raises ConfigError if no folder was named and one of `networks` sees channels of files
        beside the images, and if a folder was named and none of them does."""
        for channels in networks:
            self._check_named(channels)
        if self.root is not None and not any(seen and seen.paired for seen in networks):
            raise ConfigError(
                f"files beside the images in {self.root}, which the encoder does not see",
                expected="an encoder that was pretrained with --student-data, as run.json says",
                fix="the same line without --student-data and --val-student-data",
            )

    def _check_named(self, channels: Channels | None) -> None:
        if channels and channels.paired and self.root is None:
            raise ConfigError(
                f"channels {channels.spelled} of files beside the images of {self.of}",
                expected="the folder of these files",
                fix="--student-data FOLDER, and --val-student-data FOLDER for those of --val-data",
            )

    def read(self, row: int, channels: Channels | None) -> bytes:
        """The bytes of a row's file; none for `channels` that are not of files beside the images.

        Raises ImageFault, and MachineError.
        """
        if channels is None or not channels.paired:
            return b""
        self._check_named(channels)
        file = self.paths[row]
        if self.root is None or file is None:
            raise ImageFault("missing", f"no file of its name in {self.root}")
        return read_beside(self.root, file[0])

    def identity_for(self, identity: str, channels: Channels | None) -> str:
        """`identity`, and that of the files beside the images, for a network that sees these.

        Raises ConfigError if it sees these, and no folder was named.
        """
        self._check_named(channels)
        if channels is None or not channels.paired or self.root is None:
            return identity
        sha = hashlib.sha256(identity.encode())
        for file in self.paths:
            state = size_and_time(self.root / file[0]) if file and is_local(self.root) else None
            sha.update(repr((file, state)).encode(errors="surrogatepass"))
        return sha.hexdigest()


def size_and_time(file: AnyPath) -> tuple[int, int] | None:
    """(bytes, nanoseconds of the last change) of a local file; None if it cannot be looked at."""
    try:
        state = os.stat(file)  # type: ignore[arg-type]
    except OSError:
        return None  # it is listed, and will be counted as rejected
    return state.st_size, state.st_mtime_ns


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
