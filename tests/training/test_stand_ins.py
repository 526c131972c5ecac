"""What stands in for images that cannot be read, whatever the size of a batch."""

import numpy as np
import pytest

from milan.errors import DataError, ImageFault
from milan.training.stand_ins import read_batch


def _read(broken: set[int]):
    def read(row: int) -> str:
        if row in broken:
            raise ImageFault("not-an-image")
        return f"image {row}"

    return read


@pytest.mark.parametrize(
    ("rows", "broken", "stand_in"),
    [
        ([3, 4, 5], {3, 5}, [4, 4, 4]),
        ([3], {3}, [4]),  # of its own batch there is none
        ([8, 9], {8, 9, 0}, [1, 1]),  # behind the last image comes the first
    ],
)
def test_another_image_stands_in(rows: list[int], broken: set[int], stand_in: list[int]) -> None:
    """One of its batch, else the next that can be read; who was asked for is said."""
    images, of, readable = read_batch(rows, _read(broken), count=10, name=str)
    assert of == stand_in
    assert images == [f"image {row}" for row in stand_in]
    np.testing.assert_array_equal(readable, [row not in broken for row in rows])


def test_none_can_be_read() -> None:
    """Refused in one line that names the first, after 64 tries at most."""
    tried = list[int]()

    def read(row: int) -> str:
        tried.append(row)
        raise ImageFault("not-an-image")

    with pytest.raises(DataError, match=r"no image of a batch of 2, .* be read: name 0: .*; try: "):
        read_batch([0, 1], read, count=1000, name="name {}".format)
    assert len(tried) == 66
