"""Tests of milan/core/units.py: bytes and durations as people write and read them."""

from __future__ import annotations

import pytest

from milan.core.units import format_bytes, format_duration, parse_bytes
from milan.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [("2TB", 2e12), ("1.5 GB", 1.5e9), ("500mb", 5e8), ("1TiB", 2**40), ("512MiB", 2**29),
     ("7", 7), ("3k", 3e3), ("1e6", 10**6)],
)  # fmt: skip
def test_sizes(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "TB", "much", "-1GB", "0", "1..2GB", "2XB", "nan", "inf", "20 bananas", "1e30"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


def test_figures_for_people() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 131.3e9, 2.1e12, 4e16)] == [
        "0 B", "999 B", "1 KB", "131 GB", "2.1 TB", "40,000 TB"
    ]  # fmt: skip
    assert [format_duration(s) for s in (0, 0.0012, 3.44, 99.9, 100, 7500)] == [
        "0.0 s", "1.2 ms", "3.4 s", "99.9 s", "0:01:40", "2:05:00"
    ]  # fmt: skip
