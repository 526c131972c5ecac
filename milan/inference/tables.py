"""Tables that are written row by row, whole or not at all: CSV or Parquet, as the ending says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from milan.core.atomic import cannot_write, ensure_writable
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


@contextmanager
def written(path: Path, schema: pa.Schema) -> Iterator[Table]:
    """Inside, rows of `schema` are added; then the table is at `path`, and not before.

    Raises ConfigError for another ending than ENDINGS, DataError for a place that cannot be
    written.
    """
    check_ending(path)
    with replaced(path) as part:
        kind: Any = pq.ParquetWriter if path.suffix.lower() == ".parquet" else pa.csv.CSVWriter
        with kind(part, schema) as table:
            yield table


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; at the end it takes the place of `path`.

    What was at `path` stays as it is until then; a folder has to be new. Raises DataError if it
    cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        ensure_writable(path.parent)
        _remove(part)  # of a killed command
        yield part
        part.replace(path)
    except OSError as error:
        found, fix = cannot_write(path.parent, error) or ("", "")
        if not found and error.filename not in (str(part), str(path), str(path.parent)):
            raise
        raise DataError(
            found or f"{path} cannot be written: {error.strerror}",
            expected="a file on a disk with room",
            fix=fix or "--out elsewhere",
        ) from None
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
