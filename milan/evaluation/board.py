"""The figures of a protocol for TensorBoard, beside the tables of its classes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_board(folder: Path, name: str, keys: Iterable[str], metrics: dict[str, Any]) -> None:
    """Scalars NAME/KEY of an evaluation, at step 0, in `folder`/tensorboard; those of its baseline
    in a run of their own below it, so that both are in one chart.

    What an evaluation before left there is replaced.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    place = folder / "tensorboard"
    shutil.rmtree(place, ignore_errors=True)
    for part, figures in (("", metrics), ("baseline", metrics.get("baseline", {}))):
        known = {key: figures[key] for key in keys if figures.get(key) is not None}
        if known:
            with SummaryWriter(str(place / part)) as board:
                for key, value in known.items():
                    board.add_scalar(f"{name}/{key}", value, 0)
