"""Paths of images and stores: a `Path` on the local disk, or a `Url` that fsspec reads.

Every function here takes either. `_files` chooses the implementation of `FileSystem`: `LocalFiles`
below, which never uses fsspec, or milan.core.remote.RemoteFiles.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager as ContextManager
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeGuard, TypeVar

from milan.core.remote import RemoteFiles, Url, cannot_be
from milan.core.retry import SAME_LINE, passes, patiently
from milan.errors import DataError, MachineError

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_PIECE = 8 << 20  # of a file that is read from end to end

AnyPath = Path | Url
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins, a small text in place of a file that was not fetched."""
P = TypeVar("P", contravariant=True)
T = TypeVar("T")
R = TypeVar("R")


def as_path(where: str | AnyPath) -> AnyPath:
    """The path or URL that `where` means; file:// is a path.

    Raises DataError for a password, no path at all, and a path that is not Unicode.
    """
    if not isinstance(where, str):
        return where
    if not where or "\0" in where:
        raise DataError(f"the path {where!r}", expected="a path or a URL")
    check_unicode(where, "the path")
    match = _URL.fullmatch(where)
    scheme, rest = (match[1].lower(), match[2]) if match else ("", where)
    if scheme in ("", "file", "local"):
        path = Path(rest) if scheme else Path(rest).expanduser()
        check_unicode(os.path.realpath(path), "the path")  # also of the working folder, of links
        return path
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user:
        raise DataError(
            f"a password in {scheme}://{user.partition(':')[0]}:…@…",
            expected="credentials in the environment: the URL is kept in the store",
        )
    return Url(f"{scheme}://{rest.rstrip('/')}")


def is_local(where: AnyPath) -> TypeGuard[Path]:
    """Whether a path is on the local disk."""
    return isinstance(where, Path)


def check_unicode(text: str, what: str, *, fix: str = "rename it") -> None:
    """Raises DataError for a name of bytes that are not UTF-8: no table or JSON could hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{what} {text!r} is not UTF-8", expected="names in UTF-8", fix=fix
        ) from None


class FileSystem(Protocol[P]):
    """Reading files of one kind of path. The functions of these names say what a method does.

    They raise OSError, once: `answered` tries again. data_error is what as_data_error raises.
    """

    def read_below(self, root: P, below: str, *, offset: int | None, size: int | None) -> bytes: ...
    def open_below(self, root: P, below: str, *, skip: bool) -> ContextManager[BinaryIO]: ...
    def read_file(self, where: P, *, first: int, size: int | None) -> bytes: ...
    def read_parts(self, where: P, parts: Sequence[tuple[int, int]]) -> list[bytes]: ...
    def size_of(self, where: P) -> int | None: ...
    def sizes_below(self, root: P) -> Callable[[str], int | None]: ...
    def names_in(self, folder: P) -> Iterator[str]: ...
    def folders_in(self, folder: P) -> set[str]: ...
    def files_below(self, root: P, left_out: Counter[str]) -> Iterator[tuple[str, int | None]]: ...
    def map_files(self, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]: ...
    def probe(self, where: P) -> None: ...
    def data_error(self, where: P, error: OSError, *, doing: str) -> DataError: ...


def answered(where: object, do: Callable[[], R]) -> R:
    """`do()`, which reads `where`: tried again while the machine or the network errs.

    Raises MachineError with the errno's name if that does not pass (milan.core.retry). What `do`
    raises about the file itself stays as it is.
    """
    try:
        return patiently(do)
    except (OSError, MemoryError) as error:
        if not passes(error):
            raise
        if isinstance(where, Path | Url) and isinstance(error, OSError):
            raise _files(where).data_error(where, error, doing="read") from None
        raise cannot_be(where, "read", error) from None


def read_below(root: AnyPath, below: str, *, offset: int | None = None, size: int | None) -> bytes:
    """The file `below` root; with `offset` only the `size` bytes from there, or fewer at its end.

    One read, or one request. Without `offset`, `size` is what the file had when it was listed,
    None if that is unknown; a file that has changed is read as it is. Raises OSError for a file
    that is absent or none, and MachineError where the machine or the network fails.
    """
    files, where = _files(root), root / below

    def read() -> bytes:
        data = files.read_below(root, below, offset=offset, size=size)
        if size is not None and len(data) != size:
            _check_length(files, where, len(data), offset, size)
        return data

    return answered(where, read)


def _check_length(
    files: FileSystem[Any], where: AnyPath, arrived: int, offset: int | None, size: int
) -> None:
    """Raises OSError, EIO, if so many bytes arrived and the file has more, or fewer."""
    there = files.size_of(where)
    if there is not None:
        expected = there if offset is None else min(size, max(0, there - offset))
        if arrived != expected:
            raise OSError(errno.EIO, f"{arrived:,} of {expected:,} bytes arrived")


def open_below(root: AnyPath, below: str, *, skip: bool = False) -> ContextManager[BinaryIO]:
    """The file `below` root, opened for reading. Raises OSError, also while it is read.

    `skip`: it is walked forward in small steps, so read ahead; else only what is requested is read.
    An exception of another kind inside the block is taken for the connection's: it becomes an
    OSError for a Url.
    """
    return _files(root).open_below(root, below, skip=skip)


def read_file(where: AnyPath, *, first: int = 0, size: int | None = None) -> bytes:
    """A whole file, or `size` bytes of it from `first` on; one request.

    Raises OSError for a file that is absent or none, and MachineError where the machine or the
    network fails.
    """
    files = _files(where)

    def read() -> bytes:
        data = files.read_file(where, first=first, size=size)
        if size is not None and len(data) != size:
            _check_length(files, where, len(data), first, size)
        return data

    return answered(where, read)


def read_lines(where: str | AnyPath, what: str) -> list[str]:
    """The lines of a small text, which should be `what`. Raises DataError; waits for no pipe."""
    path = as_path(where)
    try:
        return read_file(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(
            f"{where} is not UTF-8 text", expected=what, fix="save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(
            f"{where} cannot be read: {error.strerror}",
            expected=what,
            fix="the path of such a file",
        ) from None


def read_parts(where: AnyPath, parts: Sequence[tuple[int, int]]) -> list[bytes]:
    """Parts of a file, each (first byte, bytes); it is opened once. Raises as read_file does."""
    files = _files(where)

    def read() -> list[bytes]:
        pieces = files.read_parts(where, parts)
        for data, (first, size) in zip(pieces, parts, strict=True):
            if len(data) != size:
                _check_length(files, where, len(data), first, size)
        return pieces

    return answered(where, read)


def read_files(folder: AnyPath, names: Iterable[str]) -> Iterator[bytes]:
    """Small files of a folder, in order; of a URL several are requested at once."""
    return map_files(folder, lambda name: read_file(folder / name), names)


def map_files(root: AnyPath, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`do` of every item, in order; where root is a URL, several at once."""
    return _files(root).map_files(do, items)


def size_of(where: AnyPath) -> int | None:
    """Bytes of a file; None if there is none. Raises as read_file does."""
    try:
        return answered(where, lambda: _files(where).size_of(where))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if missing or error.errno == errno.ENAMETOOLONG:  # no file can be called so
            return None
        raise


def sizes_below(root: AnyPath) -> Callable[[str], int | None]:
    """A function from the name of a file below root to its bytes; for a URL from one listing."""
    return _files(root).sizes_below(root)


def pieces_of(where: AnyPath) -> Iterator[bytes]:
    """A file from end to end, 8 MiB at a time. Raises as read_file does."""
    size = size_of(where)
    if size is None:
        raise FileNotFoundError(f"{where} is gone")
    for first in range(0, size, _PIECE):
        yield read_file(where, first=first, size=min(_PIECE, size - first))


def names_in(folder: AnyPath) -> Iterator[str]:
    """Names of the files and folders right in a folder, in any order; nothing if it is missing."""
    return _files(folder).names_in(folder)


def folders_in(folder: AnyPath) -> set[str]:
    """Names of the folders right in a folder that exists."""
    return _files(folder).folders_in(folder)


def files_below(
    root: AnyPath, left_out: Counter[str] | None = None
) -> Iterator[tuple[str, int | None]]:
    """(path below root as POSIX, bytes) of every file that is not hidden, in any order.

    What is left out is counted in `left_out`: hidden files and folders, what is no file (it could
    be waited on for ever), folders under a second name. Raises DataError for a folder that cannot
    be listed: its images would be missing in silence.
    """
    return _files(root).files_below(root, Counter() if left_out is None else left_out)


def probe(where: AnyPath) -> None:
    """Raises DataError if the folder `where` is gone or empty, or its server does not answer.

    Then nothing can be said about a file that is not found below it.
    """
    answered(where, lambda: _files(where).probe(where))


@contextmanager
def as_data_error(where: AnyPath, *, doing: str = "read") -> Iterator[None]:
    """An OSError inside becomes a DataError that names the path and gives a hint."""
    try:
        yield
    except OSError as error:
        raise _files(where).data_error(where, error, doing=doing) from None


class LocalFiles:
    """Files on the local disk. Errors are the system's own: OSError."""

    def read_below(self, root: Path, below: str, *, offset: int | None, size: int | None) -> bytes:
        """One read."""
        with _open(root / below) as file:
            file.seek(offset or 0)
            return file.read(-1 if offset is None or size is None else size)

    @contextmanager
    def open_below(self, root: Path, below: str, *, skip: bool) -> Iterator[BinaryIO]:
        """The system reads ahead by itself."""
        with _open(root / below) as file:
            yield file

    def read_file(self, where: Path, *, first: int, size: int | None) -> bytes:
        """One read."""
        return self.read_below(where, "", offset=None if size is None else first, size=size)

    def read_parts(self, where: Path, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """A read each."""
        with _open(where) as file:
            return [os.pread(file.fileno(), size, first) for first, size in parts]

    def size_of(self, where: Path) -> int | None:
        """Raises FileNotFoundError if there is none."""
        return os.stat(where).st_size

    def sizes_below(self, root: Path) -> Callable[[str], int | None]:
        """Looks each up when it is called."""
        return lambda name: size_of(root / name)

    def names_in(self, folder: Path) -> Iterator[str]:
        """Nothing if there is no folder."""
        try:
            with os.scandir(folder) as entries:
                yield from (entry.name for entry in entries)
        except FileNotFoundError:
            return

    def folders_in(self, folder: Path) -> set[str]:
        """Links to folders count."""
        return {entry.name for entry in os.scandir(folder) if entry.is_dir()}

    def files_below(self, root: Path, left_out: Counter[str]) -> Iterator[tuple[str, int | None]]:
        """Follows links, each folder once.

        A folder with several names is listed by its own name, else by the first in order of names,
        whatever order the file system lists it in.
        """
        seen: set[tuple[int, int]] = set()
        folders: list[str] = [""]
        links: list[str] = []
        while folders or links:
            if not folders:
                links.sort(reverse=True)
            below = folders.pop() if folders else links.pop()
            folder = root / below
            with as_data_error(folder):
                status = folder.stat()
                if (status.st_dev, status.st_ino) in seen:
                    left_out["links to a folder that is listed"] += 1
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as listing:
                    entries = list(listing)
            for entry in entries:
                if entry.name.startswith("."):
                    left_out["hidden"] += 1
                    continue
                path = f"{below}/{entry.name}" if below else entry.name
                try:
                    if entry.is_dir():
                        (links if entry.is_symlink() else folders).append(path)
                        continue
                    status = entry.stat()
                    if not stat.S_ISREG(status.st_mode):
                        left_out["no files but pipes, sockets or devices"] += 1
                        continue
                    size = status.st_size
                except OSError:
                    size = 0  # a link to nothing, or to itself: a row with a reason, not a hole
                yield path, size

    def map_files(self, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """One after the other."""
        return map(do, items)

    def probe(self, where: Path) -> None:
        """A disk that is no longer mounted leaves an empty folder, or none."""
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(where) as entries:
            if next(entries, None):
                return
        raise MachineError(
            f"{where} cannot be read: it is empty or gone",
            expected="the files, where they were listed",
            fix=f"mount or restore it; {SAME_LINE}",
        )

    def data_error(self, where: Path, error: OSError, *, doing: str) -> DataError:
        """Names the system's reason."""
        return cannot_be(where, doing, error)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading. Raises OSError for a pipe or device, which may never answer."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.ENXIO, "not a file, but a pipe or device", str(path))
        yield file


_LOCAL, _REMOTE = LocalFiles(), RemoteFiles()


def _files(where: AnyPath) -> FileSystem[Any]:
    """The implementation for a path: the only place, with is_local, that checks its type."""
    return _LOCAL if isinstance(where, Path) else _REMOTE
