"""What training pays for pixels: originals decoded in every epoch, or views kept in the store."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from milan.errors import DataError, ImageFault
from milan.images.decode import decode
from milan.images.manifest import data_root
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, checksum, pack, render, unpack, view_of
from pipeline.extraction.plan import Plan

TRAINING = 6_000.0
"""Images a second that training is assumed to reach: ViT-B/16, 75 % masked, on eight A100."""
CORES = 96
"""That such a machine is assumed to have."""
STORED = "jpeg:95"
"""How views are stored where nothing else was asked for."""
_IMAGES, _SECONDS = 24, 2.0  # a measurement of so many images, or as long, is enough


@dataclass(frozen=True)
class Decoding:
    """What a core of a training machine needs for a view."""

    original: float
    """Seconds for one of an original: read, decoded, cropped, resized, compared."""
    stored: float
    """Seconds for one that the store keeps."""
    bytes: float
    """Of a view as the store keeps it."""

    def starves(self, train: float | None) -> bool:
        """Whether decoding originals keeps devices waiting that train at `train` images/s."""
        return self.original * (train or TRAINING) > cores(train)


def cores(train: float | None) -> int:
    """Cores that decode: this machine's for a speed that was given, else the assumed one's."""
    return (os.cpu_count() or 1) if train else CORES


def measure_decoding(work: Plan) -> Decoding | None:
    """Both ways on the first images (rows are shuffled); None if none of them can be decoded.

    A thread's own processor time, so that waiting for a disk or for others is not in it.
    """
    part, kept = work.parts[0], work.parts[0].spec.stored_views
    how = STORED if kept == "none" else kept
    law = ViewSpec.from_law(part.spec.view_law)
    source = ImageSource(part.manifest, data_root(work.source))
    original, stored, sizes = 0.0, 0.0, list[int]()
    began = time.perf_counter()
    for row in range(min(_IMAGES, len(part.manifest))):
        if sizes and time.perf_counter() - began > _SECONDS:
            break
        started = time.thread_time()
        try:
            image = decode(source.read(row))
        except (ImageFault, DataError):
            continue
        view = view_of(law, row, view=0, height=image.height, width=image.width)
        pixels = render(image, view, size=law.size)
        checksum(pixels)
        original += time.thread_time() - started
        data = pack(pixels, how)
        started = time.thread_time()
        checksum(unpack(data))
        stored += time.thread_time() - started
        sizes.append(len(data))
    n = len(sizes)
    return Decoding(original / n, stored / n, sum(sizes) / n) if n else None
