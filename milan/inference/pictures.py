"""The images of a folder one after the other, decoded ahead; those that cannot be read are named.

Whatever predicts for images reads them here: one that cannot be read stops nothing. Of several
ranks each reads a share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from milan.core.ahead import Ahead
from milan.core.machine import cpu_count, decoding_threads
from milan.errors import ImageFault, none_readable
from milan.evaluation.features import Context
from milan.images.channels import Channels
from milan.images.manifest import build_manifest, describe_source, resolve_data
from milan.images.pairing import FilesOfImages
from milan.images.source import ImageSource
from milan.images.splits import WantedSplit
from milan.inference.config import ImagesConfig

_AT_ONCE, _BATCHES_AHEAD = 64, 2


class Picture(NamedTuple):
    """One image that could be read."""

    row: int
    """In the manifest."""
    prepared: Any
    """What `prepare` made of it."""


class Pictures:
    """The images that settings name, in the order of their places, so that files are read once."""

    def __init__(
        self,
        config: ImagesConfig,
        context: Context,
        *,
        channels: Channels | None = None,
        wanted: WantedSplit | None = None,
    ) -> None:
        """List them; progress is told which they are. Raises DataError if there are none,
        ConfigError if nobody says where the files beside them are that `channels` are of.

        `wanted`: the split that is taken; default: that of the settings, by extraction's rule. All
        ranks must call this: the first one lists.
        """
        self.config, self.context, self.progress = config, context, context.progress
        self.place = source = resolve_data(config.data, config.data_root)
        """The folder or file of the images, in which and over which nothing is written."""
        wanted = wanted or WantedSplit(config.split)
        self.manifest = context.ranks.on_rank0(
            lambda: build_manifest(source, seed=0, limit=config.limit, split=wanted)
        )
        for line in describe_source(self.manifest, wanted.flag):
            self.progress.note(line)
        self.classes, self.labels = self.manifest.classes, self.manifest.labels()
        self.rejected: dict[int, str] = {}
        """row -> why it cannot be read; complete, on all ranks, once `batches` is at its end."""
        self.channels = channels
        """What a network sees of them in place of RGB."""
        self._source = ImageSource(self.manifest, self.manifest.root)
        self._beside = FilesOfImages(config.student_data, self.manifest.keys(), of=source)
        self._beside.check(channels)

    def __len__(self) -> int:
        return len(self.manifest)

    def sample(self, count: int) -> frozenset[int]:
        """So many rows, always the same: the manifest's order is a shuffled one."""
        return frozenset(range(min(count, len(self))))

    def batches(
        self, prepare: Callable[[int, bytes, bytes], Any], *, at_once: int = _AT_ONCE
    ) -> Iterator[list[Picture]]:
        """This rank's images that can be read, `batch_size` at once, or `at_once` without it.

        `prepare(row, data, beside)` is called in threads, with the bytes of the image's file and of
        the file beside it (as milan.images.channels.whole_image takes them); it may raise
        ImageFault too. All ranks must go to the end. There it raises DataError if no
        image could be read, and Stopped if one of them was asked to stop.
        """
        ranks, stop = self.context.ranks, self.context.stop
        threads = self.config.num_workers or decoding_threads(cpu_count() // ranks.on_node)
        size = self.config.batch_size or at_once

        def load(row: int) -> Picture | str:
            try:
                beside = self._beside.read(row, self.channels)
                return Picture(row, prepare(row, self._source.read(row), beside))
            except ImageFault as fault:
                return str(fault)

        read, rows = 0, np.array_split(self._by_place(), ranks.size)[ranks.rank].tolist()
        with (
            ThreadPoolExecutor(threads) as pool,
            Ahead(load, rows, pool, _BATCHES_AHEAD * size) as loaded,
        ):
            answers = zip(rows, loaded, strict=True)
            while not stop.by and (together := list(islice(answers, size))):
                self.rejected |= {row: why for row, why in together if isinstance(why, str)}
                if good := [answer for _, answer in together if isinstance(answer, Picture)]:
                    yield good
                read += len(together)
                self.progress.advance(min(len(self), read * ranks.size))
        self.context.check_stop()
        self.rejected = {
            row: why for _, part in ranks.gather_objects(self.rejected) for row, why in part.items()
        }
        if self.rejected:
            row, why = min(self.rejected.items())
            first = f"{self.manifest.key(row)} ({why})"
            if len(self.rejected) == len(self):
                raise none_readable(self.config.data, first)
            self.progress.note(f"rejected files: {len(self.rejected)}, the first is {first}")

    def _by_place(self) -> np.ndarray:
        sort_keys = [(name, "ascending") for name in ("path", "group", "offset", "index")]
        return pc.sort_indices(self.manifest.table, sort_keys=sort_keys).to_numpy()
