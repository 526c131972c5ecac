"""The size of a view or an image in pixels: square or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Size: TypeAlias = int | tuple[int, int]
"""The edge of a square, or (height, width), in pixels: what timm calls img_size.

A square is always one number, so that what is written of it does not depend on how it was given.
"""


def as_size(value: int | Sequence[int]) -> Size:
    """A size of one number or of (height, width), as read from JSON or from a network."""
    if isinstance(value, Sequence):
        height, width = (int(edge) for edge in value)
        return height if height == width else (height, width)
    return int(value)


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size, in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_in_words(size: Size) -> str:
    """`224 px`, or `128 x 256 px (height x width)`."""
    if isinstance(size, int):
        return f"{size} px"
    return f"{size[0]} x {size[1]} px (height x width)"


def same_shape(a: Size, b: Size) -> bool:
    """Whether two sizes have the same ratio of height to width."""
    (height, width), (tall, wide) = height_width(a), height_width(b)
    return height * wide == tall * width


def grid_of(patches: int, size: Size) -> tuple[int, int]:
    """(rows, columns) of so many square patches that tile a view of this shape.

    Only the ratio of height to width counts: a view that is scaled has the same grid.
    """
    height, width = height_width(size)
    rows = max(1, round(math.sqrt(patches * height / width)))
    return rows, patches // rows
