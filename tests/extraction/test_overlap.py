"""A block's shards are staged while the next block is computed, in one process and under Ray."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from threading import Condition, Event, Lock
from typing import Any

import numpy as np
import pytest
from fake_ray import Died, fake_ray
from helpers import EXTRACTION, tree

from milan.data.dataset import CachedDataset
from pipeline import verify
from pipeline.cluster import pool
from pipeline.cluster.connect import RemoteClass
from pipeline.extract import extract_targets
from pipeline.extraction import worker
from pipeline.extraction.worker import BLOCKS_AT_ONCE, Extractor
from pipeline.teachers.load import Teacher


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_block_is_staged_while_the_next_is_computed(
    executor: str, photos: Path, store: Path, teacher_files: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three blocks; none is staged before the teacher runs for a second one. The same bytes."""
    computed, news = list[int](), Condition()
    compute, stage, run = Extractor._compute, worker.stage_shard, Extractor.run
    in_work, most, lock = 0, 0, Lock()

    def computing(self: Extractor, block: Any, images: Any) -> None:
        with news:
            computed.append(block.number)
            news.notify_all()
        compute(self, block, images)

    def staging(folder: Any, spec: Any, block: int, *more: Any) -> list[dict]:
        with news:
            assert news.wait_for(lambda: len(computed) > 1, 60)
        return stage(folder, spec, block, *more)

    def running(self: Extractor, *more: Any) -> list[dict]:
        nonlocal in_work, most
        with lock:
            in_work += 1
            most = max(most, in_work)
        records = run(self, *more)
        with lock:
            in_work -= 1
        return records

    monkeypatch.setattr(Extractor, "_compute", computing)
    monkeypatch.setattr(worker, "stage_shard", staging)
    monkeypatch.setattr(Extractor, "run", running)
    monkeypatch.setattr(pool, "_BACKUP_SECONDS", 1000.0)  # nor is a slow block tried a second time
    out = tmp_path / "t.zarr"
    with fake_ray():
        settings = {**EXTRACTION, **teacher_files, "executor": executor}
        extract_targets(str(photos), out=str(out), **settings)
    assert most == BLOCKS_AT_ONCE
    assert tree(out) == tree(store)


def test_an_audit_reads_while_the_teacher_computes(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's batch is not over before the next one is read."""
    begun, batches, (read, targets) = [], 3, (CachedDataset.pixels, Teacher.targets)
    next_read = [Event() for _ in range(batches + 1)]

    def reading(self: CachedDataset, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        begun.append(len(rows))
        next_read[len(begun) - 1].set()
        return read(self, rows, views)

    def computing(self: Teacher, pixels: Any) -> Any:
        at = sum(event.is_set() for event in next_read)
        assert at == batches or next_read[at].wait(60)
        return targets(self, pixels)

    monkeypatch.setattr(verify, "_BATCH", 4)
    monkeypatch.setattr(CachedDataset, "pixels", reading)
    monkeypatch.setattr(Teacher, "targets", computing)
    verdict = verify.verify(store, audit=verify.Audit(4 * batches))
    assert (verdict.code, begun) == (verify.GOOD, [4] * batches)
    assert verdict.checked["audited views"] == 4 * batches


class Toy:
    """A worker that computes one block at a time, as an Extractor does; some end badly."""

    def __init__(self, killers: Counter[int], hangs: Counter[int], end: Event) -> None:
        """How often a block kills its worker, or hangs until `end`."""
        self.killers, self.hangs, self.end = killers, hangs, end
        self.images, self.feeding = 0, Lock()

    def run(self, block: int, views: list[int], folder: str) -> list[dict]:
        """A record, or an end."""
        with self.feeding:
            if self.killers[block]:
                self.killers[block] -= 1
                raise Died
            if self.hangs[block]:
                self.hangs[block] -= 1
                self.end.wait(30)
            self.end.wait(0.01)
            self.images += 1
        return [{"block": block}]


@pytest.mark.parametrize(
    ("workers", "killers", "hangs", "lost"),
    [
        (1, {}, {}, set()),
        # The block with it, whichever it was, fails once, and both are tried again alone.
        (1, {2: 3}, {}, {2}),
        (2, {2: 1, 5: 1}, {}, set()),
        (2, {2: 3, 3: 3, 4: 3}, {}, {2, 3, 4}),
        # The worker that hangs is killed; the block that waited behind goes elsewhere.
        (2, {}, {1: 1}, set()),
    ],
)
def test_what_becomes_of_blocks_that_share_a_worker(
    workers: int, killers: dict[int, int], hangs: dict[int, int], lost: set[int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each block is done once or lost for its own fault; none of them holds the others."""
    monkeypatch.setattr(pool, "_BACKUP_SECONDS", 0.2)
    done: Counter[int] = Counter()
    failed: Counter[int] = Counter()
    begun: list[int] = []
    toy = {"killers": Counter(killers), "hangs": Counter(hangs), "end": Event()}

    def folder_of(block: int, attempt: int) -> Path:
        begun.append(block)
        return tmp_path / f"{block}.{attempt}"

    def on_done(block: int, folder: Path, records: list[dict]) -> None:
        assert records == [{"block": block}]
        done[block] += 1

    try:
        with fake_ray(Toy) as fake:
            given_up = pool.map_blocks(
                RemoteClass("", "", toy),
                np.ones((9, 1), bool),
                pool.BlockCallbacks(
                    folder_of, on_done, lambda _: None, lambda block, *_: failed.update([block])
                ),
                pool.Replicas(count=workers, gpus=0, blocks=BLOCKS_AT_ONCE, address=None),
                attempts=3,
            )
    finally:
        toy["end"].set()
    assert set(given_up) == lost
    assert done == Counter(set(range(9)) - lost)
    for block in range(9):  # once more than by its own fault at most
        assert 0 <= failed[block] - killers.get(block, 0) <= 1 or block in lost
    assert len(fake.actors) <= workers + sum(killers.values())
