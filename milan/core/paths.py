"""Where images and stores lie: a local path, or a URL that fsspec reads (s3://, gs://, memory://).

A `Url` answers the few questions of a `Path` that names and roots are asked. Local files never pass
through fsspec. Whatever a protocol's library raises leaves this module as an OSError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from milan.errors import DataError, ImageFault, MilanError

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
_S3 = (
    "credentials in the environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), "
    "AWS_ENDPOINT_URL for a server that is not Amazon's, FSSPEC_S3_ANON=true for a public bucket"
)
_GS = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
_HINTS = {"s3": _S3, "s3a": _S3, "gs": _GS, "gcs": _GS}
_PIECE = 1 << 16  # of a remote file that is skipped through: one request brings several tar headers
_LARGE = 8 << 20  # of a file that is read from end to end
_AT_ONCE = 16  # requests for small files


@dataclass(frozen=True)
class Url:
    """A folder or file of another store than the local disk; only its text, so it may be sent."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, below: str) -> Url:
        return Url(self.text + ("" if self.text.endswith("//") else "/") + below)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that holds it."""
        scheme, _, rest = self.text.partition("://")
        return Url(f"{scheme}://{rest.rpartition('/')[0]}")

    def resolve(self) -> Url:
        """Itself: a URL is absolute."""
        return self

    def exists(self) -> bool:
        """Whether there is something. Raises DataError if the store does not say."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether it is a file. Raises DataError if the store does not say."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder. Raises DataError if the store does not say."""
        return (self._info() or {}).get("type") == "directory"

    def at(self, below: str = "") -> tuple[Any, str]:
        """fsspec's file system, and what it calls the file `below`. Raises DataError if none."""
        scheme, _, rest = self.text.partition("://")
        fs = _filesystem(scheme, rest.partition("/")[0], os.getpid())
        base = fs._strip_protocol(self.text).rstrip("/")
        return fs, f"{base}/{below}" if below else base

    def _info(self) -> dict | None:
        fs, path = self.at()
        with as_data_error(self), os_errors():
            fs.invalidate_cache()  # what was listed a moment ago may be gone
            try:
                return fs.info(path)
            except FileNotFoundError as error:
                # fsspec's http calls a server that does not answer a missing file.
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None
                return None


AnyPath = Path | Url


def as_path(where: str | AnyPath) -> AnyPath:
    """The place that a path or URL means; file:// is a path. Raises DataError for a password."""
    if isinstance(where, Path | Url):
        return where
    match = _URL.fullmatch(where)
    if match is None:
        return Path(where).expanduser()
    scheme, rest = match[1].lower(), match[2]
    if scheme in ("file", "local"):
        return Path(rest)
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user:
        raise DataError(
            f"a password in {scheme}://{user.partition(':')[0]}:…@…",
            expected="credentials in the environment: the URL is kept in the store",
        )
    return Url(f"{scheme}://{rest.rstrip('/')}")


def is_local(where: AnyPath) -> TypeGuard[Path]:
    """Whether a path is of the local disk."""
    return isinstance(where, Path)


def read_below(root: AnyPath, below: str, *, offset: int | None = None, size: int | None) -> bytes:
    """The file `below` root; with `offset` only the `size` bytes from there, or fewer at its end.

    One read, or one request: a `size` that is not 0 tells that there is something to ask for.
    Raises OSError.
    """
    if isinstance(root, Path):
        if offset is None:
            return (root / below).read_bytes()
        with open(root / below, "rb") as file:
            file.seek(offset)
            return file.read(size)
    if offset is not None and not size:
        return b""
    fs, path = root.at(below)
    with os_errors():
        if offset is not None:
            return fs.cat_file(path, start=offset, end=offset + (size or 0))
        # An open range: asked for the whole, s3fs first asks for the size. Nothing has no range.
        return fs.cat_file(path, start=0 if size else None)


@contextmanager
def open_below(root: AnyPath, below: str, *, skip: bool = False) -> Iterator[BinaryIO]:
    """The file `below` root, opened for reading. Raises OSError, also while it is read.

    `skip`: it will be walked in small steps forward; else what is asked for is read, and no more.
    What the content is found to be is the caller's to say inside: an exception of another kind is
    taken for the connection's.
    """
    if isinstance(root, Path):
        with open(root / below, "rb") as file:
            yield file
        return
    fs, path = root.at(below)
    pieces = {"block_size": _PIECE, "cache_type": "readahead"} if skip else {"cache_type": "none"}
    with os_errors(), fs.open(path, "rb", **pieces) as file:
        yield file


def read_file(where: AnyPath, *, first: int = 0, size: int | None = None) -> bytes:
    """A file of a store, or `size` bytes of it from `first` on; one request.

    Raises OSError if it cannot be read; where a URL's store does not answer, DataError.
    """
    with _answered(where):
        if size is not None or isinstance(where, Path):
            return read_below(where, "", offset=None if size is None else first, size=size)
        try:
            return read_below(where, "", size=1)
        except FileNotFoundError:
            raise
        except OSError:
            if size_of(where) == 0:  # nothing has no range
                return b""
            raise


def read_files(folder: AnyPath, names: Iterable[str]) -> Iterator[bytes]:
    """Small files of a folder one after the other; of a URL several are asked for at once."""
    if isinstance(folder, Path):
        yield from ((folder / name).read_bytes() for name in names)
        return
    left = iter(names)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while some := list(islice(left, 4 * _AT_ONCE)):
            yield from pool.map(read_file, [folder / name for name in some])


def size_of(where: AnyPath) -> int | None:
    """Bytes of a file; None if there is none. Raises as read_file does."""
    try:
        if isinstance(where, Path):
            return os.stat(where).st_size
        with _answered(where):
            fs, path = where.at()
            with os_errors():
                fs.invalidate_cache()
                found = fs.info(path)
        return found["size"] if found["type"] == "file" else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def sizes_below(root: AnyPath) -> Callable[[str], int | None]:
    """How large the file of a name below root is: looked up, of a URL in a listing made now."""
    if isinstance(root, Path):
        return lambda name: size_of(root / name)
    return dict(_find(root)).get


def pieces_of(where: AnyPath) -> Iterator[bytes]:
    """A file from end to end, some megabytes at a time. Raises as read_file does."""
    if isinstance(where, Path):
        with open(where, "rb") as file:
            while piece := file.read(_LARGE):
                yield piece
        return
    size = size_of(where)
    if size is None:
        raise FileNotFoundError(f"{where} is gone")
    for first in range(0, size, _LARGE):
        yield read_file(where, first=first, size=min(_LARGE, size - first))


def names_in(folder: AnyPath) -> Iterator[str]:
    """Names of what lies right in a folder, in any order; nothing if there is no folder."""
    if isinstance(folder, Path):
        try:
            with os.scandir(folder) as entries:
                yield from (entry.name for entry in entries)
        except FileNotFoundError:
            return
    else:
        yield from (entry["name"].rstrip("/").rpartition("/")[2] for entry in _ls(folder))


def folders_in(folder: AnyPath) -> set[str]:
    """Names of the folders right in a folder that is there."""
    if isinstance(folder, Path):
        return {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    listed = [entry for entry in _ls(folder) if entry["type"] == "directory"]
    return {entry["name"].rstrip("/").rpartition("/")[2] for entry in listed}


def _ls(folder: Url) -> list[dict]:
    fs, path = folder.at()
    with as_data_error(folder), os_errors():
        fs.invalidate_cache()
        try:
            return fs.ls(path, detail=True)
        except FileNotFoundError:
            return []


def files_below(root: AnyPath) -> Iterator[tuple[str, int | None]]:
    """(path below root as POSIX, size) of every file, hidden ones apart, in any order.

    Raises DataError for a folder that cannot be listed: its images would be missing in silence.
    """
    return _walk(root) if isinstance(root, Path) else _find(root)


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Follows links, once each.

    A folder that has several names is listed by its own, else by the first in order of names:
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
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = list(listing)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = f"{below}/{entry.name}" if below else entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                    continue
                size = entry.stat().st_size
            except OSError:
                size = 0  # a link to nothing, or to itself: a row with a reason, not a hole
            yield path, size


def _find(root: Url) -> Iterator[tuple[str, int | None]]:
    fs, base = root.at()
    with as_data_error(root), os_errors():
        fs.invalidate_cache()
        found = fs.find(base, detail=True).values() if _lists_flat(fs) else _visit(fs, base)
    for entry in found:
        path = entry["name"].removeprefix(base).removeprefix("/")
        # Some tools make a "folder" of an object store by an empty object whose name ends in /.
        hidden = any(part.startswith(".") for part in path.split("/"))
        if path and not hidden and not path.endswith("/"):
            yield path, entry.get("size")


def _lists_flat(fs: Any) -> bool:
    """Whether it lists all below a folder at once, as object stores do, not folder by folder."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    kind: Any = type(fs)
    own = getattr(kind, "_find", AsyncFileSystem._find)
    return kind.find is not AbstractFileSystem.find or own is not AsyncFileSystem._find


def _visit(fs: Any, base: str) -> list[dict]:
    """Every file, folder by folder. fsspec's own walk leaves out what it cannot list."""
    found, folders = [], [base]
    while folders:
        folder = folders.pop()
        for entry in fs.ls(folder, detail=True):
            if entry["type"] != "directory":
                found.append(entry)
            elif entry["name"].rstrip("/") != folder.rstrip("/"):  # some list it in itself
                folders.append(entry["name"])
    return found


@contextmanager
def as_data_error(where: AnyPath, *, doing: str = "read") -> Iterator[None]:
    """An OSError inside becomes a DataError that says what cannot be read, and what may help."""
    try:
        yield
    except OSError as error:
        why = error.strerror if error.strerror and isinstance(where, Path) else str(error)
        scheme = where.text.partition(":")[0] if isinstance(where, Url) else ""
        fix = _HINTS.get(scheme, "") if scheme else "leave to read it: chmod, or another user"
        raise DataError(
            f"{where} cannot be {doing}: {why or type(error).__name__}",
            expected="a folder or file that this user may read" if doing == "read" else "",
            fix=fix,
        ) from None


@contextmanager
def _answered(where: AnyPath) -> Iterator[None]:
    """A file that is gone stays a FileNotFoundError; what else a URL's store says is told."""
    try:
        with os_errors():
            yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(where, Path):
            raise
        with as_data_error(where):
            raise error


@contextmanager
def os_errors() -> Iterator[None]:
    """Whatever a protocol's library raises inside becomes an OSError."""
    try:
        yield
    except (OSError, MilanError, ImageFault, MemoryError):
        raise
    except Exception as error:
        # Broad: protocols raise whatever their libraries do, botocore's, aiohttp's, google's own.
        raise OSError(f"{type(error).__name__}: {error}") from error


@lru_cache(maxsize=32)
def _filesystem(scheme: str, host: str, process: int) -> Any:
    """fsspec's file system, one for all threads: each has its connections and credentials.

    `process`, because connections do not survive a fork.
    """
    url = f"{scheme}://{host}"
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)[0]
    except ImportError as error:
        known = scheme in ("s3", "s3a")
        raise DataError(
            f"{url} needs a package that is not installed ({error})",
            fix="pip install 'milan-pretrain[s3]'" if known else "pip install it",
        ) from None
    except ValueError as error:
        raise DataError(
            f"{url} cannot be opened: {error}",
            expected="a path, or a URL of a protocol that fsspec knows, such as s3://bucket/folder",
        ) from None
