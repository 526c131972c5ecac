"""Bytes and durations as text. KB is 1,000 bytes, KiB is 1,024."""

from __future__ import annotations

import re

from milan.errors import ConfigError

_SIZE = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([KMGTP]?)(i?)B?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """The bytes of a size such as 20GB, 512 MiB or 1e9. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match:
        base = 1024 if match[3] else 1000
        count = float(match[1]) * base ** " KMGTP".index(match[2].upper() or " ")
        if 1 <= count < 2**63:
            return int(count)
    raise ConfigError(
        f"{text!r} is not a size",
        expected="a number and a unit: KB, MB, GB, TB, KiB, MiB, ...",
        fix="20GB",
    )


def format_bytes(count: float) -> str:
    """Bytes for people, three digits: 999 B, 1.5 KB, 131 GB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:,.3g} {unit}"


def format_duration(seconds: float) -> str:
    """A time for people: 1.2 ms, 0.0 s, 3.4 s, and from 100 s on hours:minutes:seconds, 2:05:00."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:,.3g} ms"
    if seconds < 100:
        return f"{seconds:,.1f} s"
    whole = round(seconds)
    return f"{whole // 3600:,}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
