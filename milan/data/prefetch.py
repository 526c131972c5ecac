"""A thread that copies shards into the local cache before the loader workers need them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

from milan.errors import MilanError
from milan.store.generation import Generation
from milan.store.local_cache import RETRY_SECONDS

Shard = tuple[Generation, int, int]
"""(generation, block, view)"""


class Prefetcher(Thread):
    """Copies the shards of the current window and of the next one (LocalCopies.fetch).

    `windows` yields (batches consumed by the end of the window, its shards) in order. The run sets
    `consumed`. An error ends the thread without a message: the loader worker that needs the shard
    meets the same error and reports it.
    """

    def __init__(self, windows: Iterator[tuple[int, list[Shard]]]) -> None:
        super().__init__(daemon=True)
        self.windows, self.consumed, self.stopped = windows, 0, Event()

    def run(self) -> None:
        """Until the windows end, an error, or `stopped`."""
        current: deque[tuple[int, set[Path]]] = deque()  # (end, markers) of windows not yet over
        try:
            for end, shards in self.windows:
                current.append((end, {g.local.marker(b, v) for g, b, v in shards if g.local}))
                while len(current) > 2 and self._wait(current):
                    pass
                for generation, block, view in shards:
                    protected = set().union(*(markers for _, markers in current))
                    while not generation.fetch(block, view, protected=protected) and self._wait(
                        current
                    ):
                        protected = set().union(*(markers for _, markers in current))
                    if self.stopped.is_set():
                        return
        except MilanError:
            return

    def _wait(self, current: deque[tuple[int, set[Path]]]) -> bool:
        """Wait a little and drop the windows that are over; False once `stopped`."""
        stopped = self.stopped.wait(RETRY_SECONDS)
        while len(current) > 1 and current[0][0] <= self.consumed:
            current.popleft()
        return not stopped
