"""Images that changed since extraction: found before a run begins, and taken out of its plan."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from milan.core.atomic import write_json
from milan.core.distributed import Ranks
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.data.dataset import CachedDataset
from milan.data.order import Stream
from milan.errors import ImageFault
from milan.images.decode import content_digest

CSV = "changed-images.csv"
_THREADS = 16  # what is waited for is the disk, often a network away
_AT_ONCE = 1024


def changed_images(
    dataset: CachedDataset, rows: np.ndarray, *, stop: Stop, progress: Progress
) -> dict[int, str]:
    """Which of `rows` (ascending) have an image that is gone or has other bytes; with the reason.

    Reads every image once, or until it is asked to `stop`. Compared are the bytes, with the content
    checksum in the records.
    """
    found: dict[int, str] = {}

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
                    found[row] = why
            progress.advance(first + len(some), f"{len(found)} changed")
    progress.end()
    return found


def take_out(
    run: Path,
    dataset: CachedDataset,
    stream: Stream,
    *,
    policy: str,
    step: int,
    ranks: Ranks,
    stop: Stop,
    progress: Progress,
) -> Stream:
    """The stream without the images that changed: those saved with the run, and new ones.

    With the policy `drop` all images are looked at; what is found is saved in run.json, with the
    `step` the run starts from in this call. Of a run at its beginning such rows leave the plan as
    bad ones do; of a run that goes on their places are taken by other rows, so that an epoch keeps
    its steps. Raises ConfigError if too few images are left.
    """
    dropped = ranks.on_rank0(lambda: _saved(run))
    if policy == "drop" and not dataset.stored:  # stored views are proven with their targets
        left = dataset.good[~np.isin(dataset.good, list(dropped))]
        found = changed_images(
            dataset, left[ranks.rank :: ranks.size], stop=stop, progress=progress
        )
        new = {
            row: (step, why) for _, part in ranks.gather_objects(found) for row, why in part.items()
        }
        dropped |= new
        if new:
            ranks.on_rank0(lambda: _save(run, dropped))
    if not dropped:
        return stream
    ranks.on_rank0(lambda: _list(run, dropped, dataset))
    progress.note(f"dropped: {len(dropped):,} images changed since extraction, see {run / CSV}")
    first = [row for row, (at, _) in dropped.items() if at == 0]
    later = [row for row, (at, _) in dropped.items() if at > 0]
    return stream.dropped(np.array(first, np.int64), np.array(later, np.int64))


def _saved(run: Path) -> dict[int, tuple[int, str]]:
    """row -> (step it was found at, reason), of earlier calls."""
    about = json.loads((run / "run.json").read_text())
    return {int(row): tuple(fact) for row, fact in about.get("dropped", {}).items()}


def _save(run: Path, dropped: dict[int, tuple[int, str]]) -> None:
    about = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", about | {"dropped": dropped})


def _list(run: Path, dropped: dict[int, tuple[int, str]], dataset: CachedDataset) -> None:
    with open(run / CSV, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "key", "reason", "from_step"])
        for row, (at, why) in sorted(dropped.items()):
            writer.writerow([row, dataset.cache.manifest.key(row), why, at])
