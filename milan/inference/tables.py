"""Tables that are written row by row, whole or not at all: CSV or Parquet, as the ending says.

Of several ranks each writes its rows; the table has those of the first rank first.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from milan.core.atomic import cannot_write, ensure_writable, lock_file
from milan.core.distributed import SINGLE, Ranks
from milan.errors import ConfigError, DataError

ENDINGS = (".csv", ".parquet")


class Table(Protocol):
    """A table that is being written."""

    def write_table(self, rows: pa.Table) -> None:
        """Add rows of the table's schema."""


def check_ending(path: Path, endings: tuple[str, ...] = ENDINGS) -> None:
    """Raises ConfigError for a name whose ending says no format that is written here."""
    if path.suffix.lower() not in endings:
        raise ConfigError(
            f"--out {path}: unknown ending {path.suffix!r}",
            expected="one of " + ", ".join(endings),
            fix=f"--out {path.with_suffix(endings[0])}",
        )


def check_place(path: Path, *, folder: bool = False) -> None:
    """Before long work: raises DataError if no file could be written to `path` at its end.

    `folder`: a folder that is there already is no fault.
    """
    try:
        ensure_writable(path.parent)
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with suppress(FileNotFoundError):
            path.with_name(_part_name(path)).stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}",
            expected="a file in a folder, on a disk with room",
            fix="--out elsewhere",
        ) from None


@contextmanager
def written(path: Path, schema: pa.Schema, ranks: Ranks = SINGLE) -> Iterator[Table]:
    """Inside, rows of `schema` are added, by all `ranks`; then the table is at `path`, not before.

    Raises ConfigError for another ending than ENDINGS, DataError for a place that cannot be
    written.
    """
    check_ending(path)
    kind: Any = pq.ParquetWriter if path.suffix.lower() == ".parquet" else pa.csv.CSVWriter
    with ExitStack() as until_end:
        part = ranks.on_rank0(lambda: until_end.enter_context(replaced(path)))
        shares = [part.with_name(f"{part.name}.{rank}") for rank in range(1, ranks.size)]
        if ranks.is_rank0:
            with kind(part, schema) as table:
                yield table
                ranks.wait()  # until the others have written their shares
                for share in shares:
                    for rows in pq.ParquetFile(share).iter_batches():
                        table.write_table(pa.Table.from_batches([rows]))
        else:
            share = until_end.enter_context(_share(shares[ranks.rank - 1], path))
            with pq.ParquetWriter(share, schema) as table:
                yield table
            ranks.wait()
        ranks.wait()  # until the first rank has read them


@contextmanager
def _share(share: Path, path: Path) -> Iterator[Path]:
    """The file of a rank's rows of the table at `path`; it is gone at the end."""
    try:
        yield share
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        share.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; at the end it takes the place of `path`.

    What was at `path` stays as it is until then; a folder has to be new. Raises DataError if it
    cannot be written, or another command writes it.
    """
    part = path.with_name(_part_name(path))
    try:
        ensure_writable(path.parent)
        with _claimed(path):
            _remove(part)  # of a killed command
            try:
                yield part
                part.replace(path)
            finally:
                _remove(part)
    except OSError as error:
        if error.filename not in (str(part), str(path), str(path.parent)) and not cannot_write(
            path.parent, error
        ):
            raise
        raise _not_written(path, error) from None


def _part_name(path: Path) -> str:
    """Of the file beside `path` that takes its place once it is whole."""
    return f".{path.name}.part"


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Inside, nobody else writes `path`. Raises DataError if another command does."""
    claim, lock = path.with_name(f".{path.name}.lock"), None
    try:
        lock = lock_file(claim)
    except BlockingIOError as owner:
        raise DataError(
            f"{path} is being written by {owner}",
            expected="one command that writes it",
            fix="--out elsewhere, or wait for the other",
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        if lock:
            claim.unlink(missing_ok=True)
            lock.close()


def _not_written(path: Path, error: OSError) -> DataError:
    found, fix = cannot_write(path.parent, error) or ("", "")
    return DataError(
        found or f"{path} cannot be written: {error.strerror}",
        expected="a file on a disk with room",
        fix=fix or "--out elsewhere",
    )


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
