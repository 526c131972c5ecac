"""Images that changed since extraction: found before a run begins."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.data.dataset import CachedDataset
from milan.errors import ImageFault
from milan.images.decode import content_digest

CSV = "changed-images.csv"
"""The list in a run's folder."""
_THREADS = 16  # they wait for a disk, which is often across a network
_AT_ONCE = 1024


def changed_images(
    dataset: CachedDataset, rows: np.ndarray, *, stop: Stop, progress: Progress
) -> dict[int, str]:
    """Which of `rows` (ascending) have an image that is gone or has other bytes; with the reason.

    Reads every image once, until it is asked to `stop`, and compares its bytes with the content
    checksum in the records.
    """
    changed: dict[int, str] = {}

    def compare(row: int, digest: str) -> str | None:
        try:
            data = dataset.source.read(row)
        except ImageFault as fault:
            return str(fault)
        return None if content_digest(data) == digest else "other bytes than at extraction"

    progress.begin("check images", len(rows), "images")
    _ = dataset.source  # opened once, before the threads
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(rows), _AT_ONCE):
            if stop.by:
                break
            some = rows[first : first + _AT_ONCE].tolist()
            digests = [dataset.cache.content_digest(row, 0) for row in some]
            for row, why in zip(some, pool.map(compare, some, digests), strict=True):
                if why:
                    changed[row] = why
            progress.advance(first + len(some), f"{len(changed)} changed")
    progress.end()
    return changed
