"""Patches of labelled images: kept on disk as float16 where they fit, else computed in every pass.

Patches are some hundred times as large as pooled features: 0.3 MB an image for ViT-B, 385 GB for
ImageNet. What is kept lies beside other features and is read in the same way, in files of an eighth
of the rows. What is not kept is computed again, piece by piece, whenever it is asked for; then the
files hold only which images can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from milan.core.progress import NoProgress
from milan.core.signals import Stop
from milan.core.units import format_bytes
from milan.errors import ConfigError, DataError
from milan.evaluation import features as kept
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.corruptions import Corruption
from milan.evaluation.features import Context, Features, content_of, decoded, features_of
from milan.evaluation.frozen import Frozen
from milan.evaluation.splits import LabelledSet

_SMALLER = 8


def features_for(
    frozen: Frozen,
    data: LabelledSet,
    folder: Path,
    config: EvaluationConfig,
    context: Context,
    corruption: Corruption | None = None,
) -> Features:
    """The features of all rows of `data` that a protocol looks at; arguments as of features_of.

    Raises as features_of, and ConfigError for a network that gives no patches.
    """
    limit = config.kept_bytes
    if limit is None:
        return features_of(frozen, data, folder, config, context, corruption=corruption)
    with torch.inference_mode():
        one = frozen.features(frozen.blank(context.device))
    if one.ndim != 3:
        raise ConfigError(
            f"{frozen.name} gives one vector an image",
            expected="patches, float16 [B, N, E]",
            fix="milan linear-probe, which takes vectors",
        )
    needed = one.nbytes * len(data.labels)
    if needed <= limit:
        return features_of(
            frozen, data, folder, config, context, file_rows=file_rows(), corruption=corruption
        )
    context.progress.note(
        f"patches of {len(data.labels):,} images are {format_bytes(needed)}, more than "
        f"{format_bytes(limit)} (--keep): computed in every pass"
    )
    nothing = replace(
        frozen,
        features=lambda pixels: torch.empty(len(pixels), 0),
        name="no network",
        identity={"features": "none"} if frozen.identity else None,
    )
    readable = features_of(nothing, data, folder, config, context, file_rows=file_rows())
    return _Computed(readable, one.shape[-1], frozen, data, config, context, corruption)


def file_rows() -> int:
    """Rows of a file of patches, and of a piece."""
    return max(1, kept.FILE_ROWS // _SMALLER)


class _Computed(Features):
    """Features that are on no disk."""

    def __init__(
        self, readable: Features, width: int, frozen: Frozen, data: LabelledSet,
        config: EvaluationConfig, context: Context, corruption: Corruption | None,
    ) -> None:  # fmt: skip
        """`readable` says which images can be read."""
        super().__init__(readable.files, readable.source)
        self.width, self.frozen, self.data, self.config = width, frozen, data, config
        self.corruption = corruption
        # Whoever asks for pieces is asked to stop between two of them.
        self.context = replace(context, progress=NoProgress(), stop=Stop())

    def pieces(self, numbers: Sequence[int]) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """As Features has them; images of the next are decoded while the network has one."""
        ranges = [self.files.ranges[number] for number in numbers]
        ends = [np.searchsorted(self.rows, (rows[0], rows[-1] + 1)) for rows in ranges]
        rows = [self.rows[first:last] for first, last in ends]
        files = decoded(self.data, rows, self.frozen, self.config, self.context, self.corruption)
        with closing(files):
            for batches in files:
                content = content_of(batches, self.frozen, self.context, lambda _: None)
                assert content is not None  # its context is never asked to stop
                if content.rejected:
                    raise DataError(
                        f"an image that could be read cannot be read any more: "
                        f"{content.rejected[0]}",
                        expected="images that stay as they are during an evaluation",
                        fix="the same line again",
                    )
                yield content.features, content.rows
