"""Files behind a URL that fsspec reads: s3://, gs://, https://, memory:// and others.

A `Url` has the few methods of a `Path` that milan needs. Whatever a protocol's library raises
leaves this module as an OSError, or as a DataError with a hint.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, TypeVar

from milan.core.retry import described, fix_for, number_of, passes, patiently
from milan.errors import DataError, ImageFault, MachineError, MilanError

_S3 = (
    "credentials in the environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), "
    "AWS_ENDPOINT_URL for a server that is not Amazon's, FSSPEC_S3_ANON=true for a public bucket"
)
_GS = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
_HINTS = {"s3": _S3, "s3a": _S3, "gs": _GS, "gcs": _GS}
_SKIP_BLOCK = 1 << 16  # of a file that is skipped through: one request brings several tar headers
_THREADS = 16  # requests at once, each of which waits for its reply
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Url:
    """A folder or file behind a URL; only its text, so it may be sent to another process."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, below: str) -> Url:
        return Url(self.text + ("" if self.text.endswith("//") else "/") + below)

    @property
    def scheme(self) -> str:
        """The protocol, such as s3."""
        return self.text.partition(":")[0]

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

    def is_absolute(self) -> bool:
        """True."""
        return True

    def exists(self) -> bool:
        """Whether there is a file or folder. Raises DataError if the server does not answer."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether it is a file. Raises DataError if the server does not answer."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether it is a folder. Raises DataError if the server does not answer."""
        return (self._info() or {}).get("type") == "directory"

    def at(self, below: str = "") -> tuple[Any, str]:
        """fsspec's file system, and its name for the file `below`.

        Raises DataError for a protocol that fsspec does not know or whose package is missing.
        """
        _, _, rest = self.text.partition("://")
        fs = _filesystem(self.scheme, rest.partition("/")[0], os.getpid())
        base = fs._strip_protocol(self.text).rstrip("/")
        return fs, f"{base}/{below}" if below else base

    def _info(self) -> dict | None:
        fs, path = self.at()

        def ask() -> dict:
            with os_errors(numbered=True):
                fs.invalidate_cache()  # what was listed a moment ago may be gone
                return fs.info(path)

        with _as_data_error(self):
            try:
                return patiently(ask)
            except FileNotFoundError:
                return None


class RemoteFiles:
    """The file operations of milan.core.paths for a Url."""

    def read_below(self, root: Url, below: str, *, offset: int | None, size: int | None) -> bytes:
        """One request. Raises OSError."""
        if offset is not None and not size:
            return b""
        fs, path = root.at(below)
        with os_errors(numbered=True):
            if offset is None:
                # An open range: for a whole file s3fs first asks its size. Empty ones have none.
                return fs.cat_file(path, start=0 if size else None)
            data = fs.cat_file(path, start=offset, end=offset + (size or 0))
        if len(data) > (size or 0):
            raise _no_ranges(f"{root / below} came with {len(data):,} bytes for {size:,}")
        return data

    @contextmanager
    def open_below(self, root: Url, below: str, *, skip: bool) -> Iterator[BinaryIO]:
        """Raises OSError."""
        fs, path = root.at(below)
        options: dict[str, Any] = {"cache_type": "none"}
        if skip:
            options = {"block_size": _SKIP_BLOCK, "cache_type": "readahead"}
        with os_errors(), fs.open(path, "rb", **options) as file:
            yield _Answering(file, root / below)  # type: ignore[misc]

    def read_file(self, where: Url, *, first: int, size: int | None) -> bytes:
        """One request. Raises OSError."""
        if size is not None:
            return self.read_below(where, "", offset=first, size=size)
        try:
            return self.read_below(where, "", offset=None, size=1)
        except FileNotFoundError:
            raise
        except OSError:
            if self.size_of(where) == 0:  # an empty file has no range
                return b""
            raise

    def read_parts(self, where: Url, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """A request each. Raises OSError."""
        return [self.read_file(where, first=first, size=size) for first, size in parts]

    def size_of(self, where: Url) -> int | None:
        """Raises OSError; None for a folder."""
        fs, path = where.at()
        with os_errors(numbered=True):
            fs.invalidate_cache()
            info = fs.info(path)
        return info["size"] if info["type"] == "file" else None

    def sizes_below(self, root: Url) -> Callable[[str], int | None]:
        """From one listing, made now."""
        return dict(self.files_below(root, Counter())).get

    def names_in(self, folder: Url) -> Iterator[str]:
        """Nothing if there is no folder. Raises DataError."""
        return (_last_part(entry) for entry in _list(folder))

    def folders_in(self, folder: Url) -> set[str]:
        """Raises DataError."""
        return {_last_part(entry) for entry in _list(folder) if entry["type"] == "directory"}

    def files_below(self, root: Url, left_out: Counter[str]) -> Iterator[tuple[str, int | None]]:
        """One listing of an object store; else folder by folder. Raises DataError."""
        fs, base = root.at()

        def ask() -> list[dict]:
            with os_errors(numbered=True):
                fs.invalidate_cache()
                flat = _lists_flat(fs)
                return list(fs.find(base, detail=True).values()) if flat else _walk(fs, base)

        with _as_data_error(root):
            entries = patiently(ask)
        for entry in entries:
            path = entry["name"].removeprefix(base).removeprefix("/")
            size = entry.get("size")
            # A key may have any parts: `.` and `..` are neither folders nor hidden.
            if any(p.startswith(".") and p not in (".", "..") for p in path.split("/")):
                left_out["hidden"] += 1
            elif path and not path.endswith("/"):
                yield path, size
            elif size:  # an empty object is a mark that some tools make for a folder
                left_out["named like a folder"] += 1

    def map_files(self, do: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """In threads: each call waits for replies. A bounded number of results is kept ready."""
        remaining = iter(items)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="remote") as pool:
            while batch := list(islice(remaining, 4 * _THREADS)):
                yield from pool.map(do, batch)

    def probe(self, where: Url) -> None:
        """Raises DataError unless the server answers and, where it can be asked, has the folder."""
        if not where.exists() and where.scheme not in ("http", "https"):
            raise MachineError(
                f"{where} cannot be read: it is empty or gone",
                expected="the images, where they were listed",
                fix="restore it; then the same line goes on",
            )

    def data_error(self, where: Url, error: OSError, *, doing: str) -> DataError:
        """Names the credentials that the protocol reads."""
        own = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this machine
        hint = None if error.errno in own else _HINTS.get(where.scheme)
        return cannot_be(where, doing, error, hint)


class _Answering:
    """An open file whose errors are those of the connection, whoever reads it."""

    def __init__(self, file: Any, where: Url) -> None:
        self._file, self._where = file, where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        """Tried again while the server errs. Raises OSError."""
        return patiently(lambda: self._asked(self._file.read, size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Raises OSError."""
        return self._asked(self._file.seek, offset, whence)

    def _asked(self, do: Callable[..., Any], *arguments: int) -> Any:
        with os_errors(numbered=True):
            try:
                return do(*arguments)
            except ValueError as error:
                # fsspec's words for a server that sends a file from its beginning only.
                if "range requests" in str(error) or "Cannot seek streaming" in str(error):
                    raise _no_ranges(f"{self._where} comes as a whole") from None
                raise


def cannot_be(
    where: object, doing: str, error: OSError | MemoryError, hint: str | None = None
) -> DataError:
    """The error for a file or folder that cannot be read (or what `doing` says).

    It is a MachineError if the file itself is not to blame.
    """
    denied = number_of(error) in (None, errno.EACCES, errno.EPERM)
    expected = (
        "a folder or file that this user may read" if denied else "a disk or server that answers"
    )
    kind = MachineError if passes(error) else DataError
    return kind(
        f"{where} cannot be {doing}: {described(error)}",
        expected=expected if doing == "read" else "",
        fix=hint or fix_for(error),
    )


def _no_ranges(what: str) -> DataError:
    return DataError(
        f"{what}: the server sends whole files where a part is requested",
        expected="a server with range requests, as object stores and nginx have them",
        fix="fetch the file, and give its path to --data",
    )


@contextmanager
def os_errors(*, numbered: bool = False) -> Iterator[None]:
    """Whatever a protocol's library raises inside becomes an OSError with an errno.

    `numbered`: an OSError without one is the protocol's too, not a parser's within the block.
    """
    try:
        yield
    except (MilanError, ImageFault, MemoryError):
        raise
    except FileNotFoundError as error:
        # fsspec's http calls a file missing whatever the server did.
        cause = error.__cause__
        status = getattr(cause, "status", 404)
        if isinstance(cause, OSError):
            raise cause from None
        if status not in (404, 410):
            denied = status in (401, 403)
            raise OSError(errno.EACCES if denied else errno.EIO, f"HTTP {status}") from None
        raise
    except OSError as error:
        if numbered and number_of(error) is None:
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error
        raise
    except Exception as error:
        # Broad: protocols raise whatever their libraries do, botocore's, aiohttp's, google's own.
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


@contextmanager
def _as_data_error(where: Url) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RemoteFiles().data_error(where, error, doing="read") from None


def _list(folder: Url) -> list[dict]:
    fs, path = folder.at()

    def ask() -> list[dict]:
        with os_errors(numbered=True):
            fs.invalidate_cache()
            return fs.ls(path, detail=True)

    with _as_data_error(folder):
        try:
            return patiently(ask)
        except FileNotFoundError:
            return []


def _last_part(entry: dict) -> str:
    return entry["name"].rstrip("/").rpartition("/")[2]


def _lists_flat(fs: Any) -> bool:
    """Whether it lists everything below a folder at once, as object stores do."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    kind: Any = type(fs)
    own = getattr(kind, "_find", AsyncFileSystem._find)
    return kind.find is not AbstractFileSystem.find or own is not AsyncFileSystem._find


def _walk(fs: Any, base: str) -> list[dict]:
    """Every file, folder by folder. fsspec's own walk skips folders that it cannot list."""
    files, folders = [], [base]
    while folders:
        folder = folders.pop()
        for entry in fs.ls(folder, detail=True):
            if entry["type"] != "directory":
                files.append(entry)
            elif entry["name"].rstrip("/") != folder.rstrip("/"):  # some list it in itself
                folders.append(entry["name"])
    return files


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
