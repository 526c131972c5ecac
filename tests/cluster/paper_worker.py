"""A worker for tests of the pool: it makes nothing, and one block hangs where it is first tried."""

from __future__ import annotations

import time
from pathlib import Path

from milan.errors import TeacherError


class Paper:
    """Returns what it was asked for. `folder` is shared by all, `slow` the block that hangs."""

    def __init__(self, folder: str, slow: int, seconds: float) -> None:
        self.mark, self.slow, self.seconds = Path(folder) / "taken", slow, seconds
        self.images = 0

    def run(self, block: int, views: list[int], folder: str) -> list[dict]:
        """One record."""
        time.sleep(0.05)
        if block == self.slow and not self.mark.exists():
            self.mark.touch()
            time.sleep(self.seconds)
        self.images += 1
        return [{"block": block, "views": views, "folder": folder}]


class Refusing:
    """A worker that cannot be built."""

    def __init__(self) -> None:
        raise TeacherError("a worker loaded another teacher than the driver")
