"""What training pays for pixels: decoding originals in every epoch, or views kept in the store."""

from __future__ import annotations

import time
from dataclasses import dataclass

from milan.core.machine import cpu_count
from milan.core.paths import AnyPath
from milan.data.feeding import cores_needed
from milan.errors import ImageFault
from milan.images.manifest import Manifest
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, checksum, pack, render, unpack, view_of
from pipeline.extraction.plan import Plan

TRAINING_SPEED = 6_000.0
"""Images a second that training is assumed to reach: ViT-B/16, 75 % masked, on eight A100."""
TRAINING_SOURCE = (
    "the published 400 epochs in 39 h on eight A100 less the teacher's 41 % of the operations; "
    "96 cores as a p4d.24xlarge has beside them"
)
TRAINING_CORES = 96
"""Cores that such a machine is assumed to have."""
STORED_VIEWS = "jpeg:95"
"""How views are stored where nothing else was asked for."""
_MAX_IMAGES, _MAX_SECONDS = 24, 2.0  # of a measurement


@dataclass(frozen=True)
class Decoding:
    """What a core of a training machine needs for a view."""

    original: float
    """Seconds for a view of an original: read, decoded, cropped, resized, compared."""
    stored: float
    """Seconds for a view that the store keeps."""
    bytes: float
    """Of a view as the store keeps it."""

    def is_bottleneck(self, train: float | None) -> bool:
        """Whether decoding originals is slower than training at `train` images/s.

        None: at TRAINING_SPEED.
        """
        return cores_needed(train or TRAINING_SPEED, self.original) > training_cores(train)


def training_cores(train: float | None) -> int:
    """Cores that decode: this machine's if the speed is given, else those of the assumed one."""
    return cpu_count() if train else TRAINING_CORES


def measure_decoding(work: Plan) -> Decoding | None:
    """Both ways on the first images (rows are shuffled); None if none of them can be decoded."""
    spec, manifest = work.parts[0].spec, work.parts[0].manifest
    stored_as = STORED_VIEWS if spec.stored_views == "none" else spec.stored_views
    return decoding_of(manifest, work.root, ViewSpec.from_law(spec.view_law), stored_as)


def decoding_of(
    manifest: Manifest, root: AnyPath, view_spec: ViewSpec, stored_as: str = STORED_VIEWS
) -> Decoding | None:
    """The same of the images of a manifest below `root`, with views of `view_spec`.

    In processor time of this thread, without waiting for the disk or for other processes.
    """
    source = ImageSource(manifest, root)
    original, stored, sizes = 0.0, 0.0, list[int]()
    began = time.perf_counter()
    for row in range(min(_MAX_IMAGES, len(manifest))):
        if sizes and time.perf_counter() - began > _MAX_SECONDS:
            break
        started = time.thread_time()
        try:
            image = view_spec.decode(source.read(row))
        except ImageFault:
            continue
        view = view_of(view_spec, row, view=0, height=image.shape[0], width=image.shape[1])
        pixels = render(image, view, size=view_spec.size)
        checksum(pixels)
        original += time.thread_time() - started
        data = pack(pixels, stored_as)
        started = time.thread_time()
        checksum(unpack(data))
        stored += time.thread_time() - started
        sizes.append(len(data))
    n = len(sizes)
    return Decoding(original / n, stored / n, sum(sizes) / n) if n else None
